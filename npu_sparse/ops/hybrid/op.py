"""The operators of the layers around full attention: Gated DeltaNet, norms and the gated feed-forward. None has gradients."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import FLOATS, check_tensor
from . import reference


def _define(op: str, signature: str, fake, **where) -> None:
    dispatch.define(op, signature, getattr(reference, op), fake, folder="hybrid", devices=("cuda",), **where)


def _fake_convolution(mixed, weight, state, columns, key_heads, value_heads, key_dim, value_dim):
    B, T, _ = mixed.shape
    shapes = (key_heads, key_dim), (key_heads, key_dim), (value_heads, value_dim)
    return tuple(mixed.new_empty((B, T, *shape)) for shape in shapes)


def _fake_gates(raw, columns, A_log, dt_bias):
    shape = (*raw.shape[:2], A_log.shape[0])
    return raw.new_empty(shape, dtype=torch.float32), raw.new_empty(shape)


def _fake_rule(q, k, v, g, beta, state, keep):
    B, _, Hv, V = v.shape
    return v.new_empty(v.shape), v.new_empty((B, Hv, q.shape[-1], V) if keep else (0,), dtype=torch.float32)


_define(
    "short_convolution",
    "(Tensor mixed, Tensor weight, Tensor? state, Tensor columns, int key_heads, int value_heads, int key_dim, int value_dim) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_convolution,
)
_define("delta_gates", "(Tensor raw, Tensor columns, Tensor A_log, Tensor dt_bias) -> (Tensor, Tensor)", _fake_gates)
_define(
    "delta_rule",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? state, bool keep) -> (Tensor, Tensor)",
    _fake_rule,
    needs="fla",
)
_define(
    "gated_norm",
    "(Tensor x, Tensor gate, Tensor columns, Tensor weight, float eps) -> Tensor",
    lambda x, gate, columns, weight, eps: x.new_empty((*x.shape[:2], x.shape[2] * x.shape[3])),
)
_define("rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor", lambda x, weight, eps: x.new_empty(x.shape))
_define("swiglu", "(Tensor(a!) gate, Tensor up) -> ()", lambda gate, up: None)


def short_convolution(
    mixed: Tensor, weight: Tensor, state: Tensor | None, columns: Tensor, *, key_heads: int, value_heads: int, key_dim: int,
    value_dim: int, impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`(q [B, T, Hk, K], k [B, T, Hk, K], v [B, T, Hv, V])`: causal depthwise convolution and SiLU; q and k have unit length.

    Args:
        mixed: `[B, T, R]`, rows that hold the heads at `columns`; fp16, bf16 or fp32, the dtype of the results.
        weight: `[C, W]`, the taps of the heads' channels in their order, `C = 2 Hk K + Hv V`; the last tap is the token itself.
        state: `[B, C, W]`, the inputs of the last W tokens before these, of which W - 1 are read; None = zeros.
        columns: int32 `[2 Hk + Hv]`, first column of every query, key and value head.
        key_heads, value_heads, key_dim, value_dim: Hk, Hv, K and V.
        impl: "auto", "reference" or "kernel"; kernels exist for cuda only.
    """
    check_tensor("mixed", mixed, (None, None, None), FLOATS)
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    check_tensor("weight", weight, (channels, None), FLOATS, mixed.device)
    if state is not None:
        check_tensor("state", state, (mixed.shape[0], channels, weight.shape[1]), FLOATS, mixed.device)
    check_tensor("columns", columns, (2 * key_heads + value_heads,), (torch.int32,), mixed.device)
    return dispatch.call(
        "short_convolution", impl, mixed.device.type, mixed, weight, state, columns, key_heads, value_heads, key_dim, value_dim
    )


def delta_gates(raw: Tensor, columns: Tensor, A_log: Tensor, dt_bias: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """`(g, beta)`, both `[B, T, Hv]`: the log of the decay, fp32, and `sigmoid(b)`, in raw's dtype.

    `g = -exp(A_log) softplus(a + dt_bias)`.

    Args:
        raw: `[B, T, R]`, rows that hold b and a at `columns`; fp16, bf16 or fp32.
        columns: int32 `[2 Hv]`, those of b first.
        A_log, dt_bias: `[Hv]`.
        impl: "auto", "reference" or "kernel"; kernels exist for cuda only.
    """
    check_tensor("raw", raw, (None, None, None), FLOATS)
    check_tensor("A_log", A_log, (None,), FLOATS, raw.device)
    check_tensor("dt_bias", dt_bias, A_log.shape, FLOATS, raw.device)
    check_tensor("columns", columns, (2 * A_log.shape[0],), (torch.int32,), raw.device)
    return dispatch.call("delta_gates", impl, raw.device.type, raw, columns, A_log, dt_bias)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, keep: bool, *, impl: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """`(out [B, T, Hv, V] in v's dtype, state float32 [B, Hv, K, V] or None)`: the gated delta rule over T >= 1 tokens.

    `S = exp(g) S + k beta (v - k^T exp(g) S)^T`, `out = q^T S / sqrt(K)`. The kernel is flash-linear-attention's.

    Args:
        q, k: `[B, T, Hk, K]` of unit length, v: `[B, T, Hv, V]`, of one dtype: fp16, bf16 or fp32; Hk divides Hv.
        g: float32 `[B, T, Hv]`, beta: `[B, T, Hv]`, what `delta_gates` gives.
        state: `[B, Hv, K, V]`, S before the first token; None = zeros.
        keep: whether the last state is wanted; without it None comes in its place.
        impl: "auto", "reference" or "kernel"; a kernel exists for cuda only, where flash-linear-attention is installed.
    """
    check_tensor("q", q, (None, None, None, None), FLOATS)
    B, T, Hk, K = q.shape
    check_tensor("k", k, q.shape, (q.dtype,), q.device)
    check_tensor("v", v, (B, T, None, None), (q.dtype,), q.device)
    Hv, V = v.shape[2:]
    if Hk < 1 or Hv % Hk:
        raise ValueError(f"value heads must be a multiple of key heads, got {Hv} and {Hk}")
    if T < 1:
        raise ValueError("q must hold at least one token, got 0")
    check_tensor("g", g, (B, T, Hv), (torch.float32,), q.device)
    check_tensor("beta", beta, (B, T, Hv), FLOATS, q.device)
    if state is not None:
        check_tensor("state", state, (B, Hv, K, V), FLOATS, q.device)
    out, last = dispatch.call("delta_rule", impl, q.device.type, q, k, v, g, beta, state, keep)
    return out, last if keep else None


def gated_norm(x: Tensor, gate: Tensor, columns: Tensor, weight: Tensor, eps: float, *, impl: str = "auto") -> Tensor:
    """`[B, T, Hv * V]` in x's dtype: RMSNorm over each head of x `[B, T, Hv, V]`, times weight, times SiLU of the head's gate.

    Args:
        x: fp16, bf16 or fp32.
        gate: `[B, T, R]`, rows that hold the heads' gates at `columns`.
        columns: int32 `[Hv]`, first column of every head's gate.
        weight: `[V]`, eps: what is added to the mean square.
        impl: "auto", "reference" or "kernel"; kernels exist for cuda only.
    """
    check_tensor("x", x, (None, None, None, None), FLOATS)
    B, T, Hv, V = x.shape
    check_tensor("gate", gate, (B, T, None), FLOATS, x.device)
    check_tensor("columns", columns, (Hv,), (torch.int32,), x.device)
    check_tensor("weight", weight, (V,), FLOATS, x.device)
    return dispatch.call("gated_norm", impl, x.device.type, x, gate, columns, weight, float(eps))


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, impl: str = "auto") -> Tensor:
    """RMSNorm over the last dimension of x `[..., D]`, times `1 + weight`; contiguous, in x's dtype.

    weight: `[D]`; eps is added to the mean square; impl: "auto", "reference" or "kernel", which exists for cuda only.
    """
    check_tensor("x", x, (None,) * x.dim(), FLOATS)
    check_tensor("weight", weight, (x.shape[-1],), FLOATS, x.device)
    return dispatch.call("rms_norm", impl, x.device.type, x, weight, float(eps))


def swiglu(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """`silu(gate) * up`, of one shape and dtype, written over `gate` where that is contiguous: no third tensor of this size.

    impl: "auto", "reference" or "kernel"; kernels exist for cuda only.
    """
    check_tensor("gate", gate, (None,) * gate.dim(), FLOATS)
    check_tensor("up", up, gate.shape, (gate.dtype,), gate.device)
    gate = gate.contiguous()
    dispatch.call("swiglu", impl, gate.device.type, gate, up)
    return gate
