"""What a fast hybrid layer computes, in plain PyTorch on any device: the formulas, in fp32 within each function. op.py says
what goes in and comes out."""

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def short_convolution(
    mixed: Tensor, weight: Tensor, state: Tensor | None, columns: Tensor, key_heads: int, value_heads: int, key_dim: int,
    value_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, _ = mixed.shape
    firsts = columns.long().split([2 * key_heads, value_heads])
    within = (torch.arange(width, device=mixed.device) for width in (key_dim, value_dim))
    order = torch.cat([(first[:, None] + place).flatten() for first, place in zip(firsts, within)])
    x = mixed[..., order].float()  # [B, T, C]
    W = weight.shape[1]
    before = x.new_zeros(B, W - 1, x.shape[-1]) if state is None else state[..., 1:].transpose(1, 2).float()
    padded = torch.cat([before, x], 1)
    out = sum(padded[:, w : w + T] * weight[:, w].float() for w in range(W))
    out = silu(out).to(mixed.dtype)
    q, k, v = out.split([key_heads * key_dim] * 2 + [value_heads * value_dim], -1)
    q, k = (_unit(part.unflatten(-1, (key_heads, key_dim))).contiguous() for part in (q, k))
    return q, k, v.unflatten(-1, (value_heads, value_dim)).contiguous()


def delta_gates(raw: Tensor, columns: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    b, a = raw[..., columns.long()].float().chunk(2, -1)
    return -A_log.float().exp() * softplus(a + dt_bias.float()), b.sigmoid().to(raw.dtype)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    # token by token; in the place of a state that is not wanted, an empty tensor
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
    return torch.stack(out, 1).to(v.dtype), S if keep else S.new_empty(0)


def gated_norm(x: Tensor, gate: Tensor, columns: Tensor, weight: Tensor, eps: float) -> Tensor:
    V = x.shape[-1]
    order = (columns.long()[:, None] + torch.arange(V, device=x.device)).flatten()
    z = gate[..., order].unflatten(-1, x.shape[-2:])
    normed = (x.float() * _rsqrt_mean_square(x, eps)).to(x.dtype)
    return (weight * normed * silu(z.float())).to(x.dtype).flatten(-2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (x.float() * _rsqrt_mean_square(x, eps) * (1.0 + weight.float())).to(x.dtype).contiguous()


def swiglu(gate: Tensor, up: Tensor) -> None:
    gate.copy_(silu(gate) * up)


def _unit(x: Tensor) -> Tensor:
    return (x.float() * (x.float().square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def _rsqrt_mean_square(x: Tensor, eps: float) -> Tensor:
    return (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
