"""What a fast hybrid layer computes, in plain PyTorch on any device: the formulas, in fp32 within each function."""

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from ..architectures import DeltaNet


def short_convolution(mixed: Tensor, weight: Tensor, state: Tensor | None, columns: Tensor, net: DeltaNet) -> tuple[Tensor, ...]:
    """`(q [B, T, Hk, K], k [B, T, Hk, K], v [B, T, Hv, V])`: causal depthwise convolution and SiLU; q and k have unit length.

    Args:
        mixed: `[B, T, R]`, rows that hold the heads at `columns`.
        weight: `[C, W]`, the taps of the heads' channels in their order; the last tap is the token itself.
        state: `[B, C, W]`, the inputs of the last W tokens before these; None = zeros.
        columns: int32 `[2 Hk + Hv]`, first column of every head.
    """
    B, T, _ = mixed.shape
    widths = [net.key_dim] * (2 * net.key_heads) + [net.value_dim] * net.value_heads
    order = torch.cat([start + torch.arange(width) for start, width in zip(columns.tolist(), widths)]).to(mixed.device)
    x = mixed[..., order].float()  # [B, T, C]
    W = weight.shape[1]
    before = x.new_zeros(B, W - 1, x.shape[-1]) if state is None else state[..., 1:].transpose(1, 2).float()
    padded = torch.cat([before, x], 1)
    out = sum(padded[:, w : w + T] * weight[:, w].float() for w in range(W))
    out = silu(out).to(mixed.dtype)
    q, k, v = out.split([net.key_heads * net.key_dim] * 2 + [net.value_heads * net.value_dim], -1)
    q, k = (_unit(part.unflatten(-1, (net.key_heads, net.key_dim))) for part in (q, k))
    return q, k, v.unflatten(-1, (net.value_heads, net.value_dim)).contiguous()


def gates(raw: Tensor, columns: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """`(g, beta)`, both `[B, T, Hv]`: the log of the decay, fp32, and `sigmoid(b)`, in raw's dtype.

    `g = -exp(A_log) softplus(a + dt_bias)`. raw: `[B, T, 2 Hv]` with b and a at `columns` (int32 `[2 Hv]`, those of b first).
    """
    b, a = raw[..., columns.long()].float().chunk(2, -1)
    return -A_log.float().exp() * softplus(a + dt_bias.float()), b.sigmoid().to(raw.dtype)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """`(out [B, T, Hv, V], state fp32 [B, Hv, K, V] or None)`: the gated delta rule, token by token.

    `S = exp(g) S + k beta (v - k^T exp(g) S)^T`, `out = q^T S / sqrt(K)`. keep: whether the last state is wanted.
    """
    B, T, Hv, V = v.shape
    K = q.shape[-1]
    q, k = (part.float().repeat_interleave(Hv // part.shape[2], 2) for part in (q, k))
    S = v.new_zeros(B, Hv, K, V, dtype=torch.float32) if state is None else state.float()
    out = []
    for t in range(T):
        S = S * g[:, t, :, None, None].exp()
        wrong = v[:, t].float() - torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], wrong * beta[:, t, :, None].float())
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) * K**-0.5)
    return torch.stack(out, 1).to(v.dtype), S if keep else None


def gated_norm(x: Tensor, gate: Tensor, columns: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`[B, T, Hv * V]`: RMSNorm over each head of x `[B, T, Hv, V]`, times weight, times SiLU of the head's gate.

    gate: `[B, T, R]` with the heads' gates at `columns`, int32 `[Hv]`.
    """
    V = x.shape[-1]
    order = (columns.long()[:, None] + torch.arange(V, device=x.device)).flatten()
    z = gate[..., order].unflatten(-1, x.shape[-2:])
    normed = (x.float() * _rsqrt_mean_square(x, eps)).to(x.dtype)
    return (weight * normed * silu(z.float())).to(x.dtype).flatten(-2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, times `1 + weight`; contiguous, in x's dtype."""
    return (x.float() * _rsqrt_mean_square(x, eps) * (1.0 + weight.float())).to(x.dtype).contiguous()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, of one shape; may be written over `gate`."""
    return silu(gate) * up


def _unit(x: Tensor) -> Tensor:
    return (x.float() * (x.float().square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def _rsqrt_mean_square(x: Tensor, eps: float) -> Tensor:
    return (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
