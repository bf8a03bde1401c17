"""The functions of reference.py as one pass over memory each, in Triton; the delta rule is flash-linear-attention's.

The kernels round where transformers rounds, except that the convolution is not rounded before its SiLU.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles of a program, and its warps; `scripts/profile_hybrid.py --tiles` times others
CONVOLUTION = 32, 4  # tokens of one head
NORM = 4096, 4  # elements, in whole rows
SWIGLU = 4096, 4  # elements
GATE_TOKENS = 64


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _short_convolution(
    mixed, weight, state, columns, q, k, v, T, x_b, x_t, s_b, s_c, s_w, first_head, first_channel,
    HK: tl.constexpr, HV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, BT: tl.constexpr,
    HAS_STATE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One head of BT tokens; heads from `first_head` on, all of width D: queries, then keys, then values."""
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    head, b = first_head + tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, DP)
    live = (tokens < T)[:, None] & (d < D)[None, :]
    channel = first_channel + tl.program_id(1) * D + d
    rows = mixed + b * x_b + tl.multiple_of(tl.load(columns + head), ALIGNED)
    acc = tl.zeros([BT, DP], tl.float32)
    for w in tl.static_range(W):
        place = tokens + (w - W + 1)
        x = tl.load(rows + place[:, None].to(tl.int64) * x_t + d[None, :], mask=live & (place >= 0)[:, None], other=0.0)
        x = x.to(tl.float32)
        if HAS_STATE and tl.program_id(0) == 0:
            older = state + b * s_b + channel[None, :] * s_c + (W + place)[:, None] * s_w
            x += tl.load(older, mask=live & (place < 0)[:, None], other=0.0).to(tl.float32)
        acc += x * tl.load(weight + channel * W + w, mask=d < D, other=0.0).to(tl.float32)[None, :]
    y = _silu(acc).to(q.dtype.element_ty)
    row = b * T + tokens[:, None]
    if head < 2 * HK:
        wide = y.to(tl.float32)
        y = (wide / tl.sqrt(tl.sum(wide * wide, 1) + 1e-6)[:, None]).to(q.dtype.element_ty)
        if head < HK:
            tl.store(q + (row * HK + head) * D + d[None, :], y, mask=live)
        else:
            tl.store(k + (row * HK + head - HK) * D + d[None, :], y, mask=live)
    else:
        tl.store(v + (row * HV + head - 2 * HK) * D + d[None, :], y, mask=live)


def short_convolution(
    mixed: Tensor, weight: Tensor, state: Tensor | None, columns: Tensor, HK: int, HV: int, K: int, V: int
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, _ = mixed.shape
    W = weight.shape[1]
    q, k = mixed.new_empty(B, T, HK, K), mixed.new_empty(B, T, HK, K)
    v = mixed.new_empty(B, T, HV, V)
    mixed = mixed if mixed.stride(-1) == 1 else mixed.contiguous()
    weight = weight.contiguous()
    strides = (0, 0, 0) if state is None else state.stride()
    sections = [(0, 0, 2 * HK + HV, K)] if K == V else [(0, 0, 2 * HK, K), (2 * HK, 2 * HK * K, HV, V)]
    BT, warps = CONVOLUTION
    for first_head, first_channel, heads, D in sections:
        _short_convolution[triton.cdiv(T, BT), heads, B](
            mixed, weight, state, columns, q, k, v, T, *mixed.stride()[:2], *strides, first_head, first_channel, HK, HV, D,
            triton.next_power_of_2(D), W, BT, state is not None, _alignment(K, V, mixed.stride(1)), num_warps=warps,
        )  # fmt: skip
    return q, k, v


def _alignment(*columns: int) -> int:
    """The largest power of two up to 16 that divides all of these, so that heads load as vectors."""
    return math.gcd(16, *columns)


@triton.jit
def _gates(raw, columns, A_log, dt_bias, g, beta, rows, r_t, H: tl.constexpr, HP: tl.constexpr, BT: tl.constexpr):
    row = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    h = tl.arange(0, HP)
    live = (row < rows)[:, None] & (h < H)[None, :]
    b_column = tl.load(columns + h, mask=h < H, other=0)
    a_column = tl.load(columns + H + h, mask=h < H, other=0)
    b = tl.load(raw + row[:, None] * r_t + b_column[None, :], mask=live, other=0.0).to(tl.float32)
    a = tl.load(raw + row[:, None] * r_t + a_column[None, :], mask=live, other=0.0).to(tl.float32)
    a += tl.load(dt_bias + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
    e = tl.exp(tl.minimum(a, 20.0))
    u = 1.0 + e  # rounded; log(u) e / (u - 1) is log1p(e) all the same
    soft = tl.where(a > 20.0, a, tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0)))
    speed = tl.exp(tl.load(A_log + h, mask=h < H, other=0.0).to(tl.float32))
    place = row[:, None] * H + h[None, :]
    tl.store(g + place, -speed[None, :] * soft, mask=live)
    tl.store(beta + place, (1.0 / (1.0 + tl.exp(-b))).to(beta.dtype.element_ty), mask=live)


def delta_gates(raw: Tensor, columns: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    raw = raw.contiguous()
    B, T, _ = raw.shape
    H = A_log.shape[0]
    g, beta = raw.new_empty(B, T, H, dtype=torch.float32), raw.new_empty(B, T, H)
    grid = (triton.cdiv(B * T, GATE_TOKENS),)
    _gates[grid](raw, columns, A_log, dt_bias, g, beta, B * T, raw.stride(1), H, triton.next_power_of_2(H), GATE_TOKENS)
    return g, beta


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    out, last = chunk_gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=keep)
    return out, last if keep else g.new_empty(0)


@triton.jit
def _gated_norm(
    x, gate, columns, weight, out, rows, z_t, eps, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr,
    ALIGNED: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)  # a head of a token
    d = tl.arange(0, DP)
    live = (row < rows)[:, None] & (d < D)[None, :]
    place = row[:, None] * D + d[None, :]
    value = tl.load(x + place, mask=live, other=0.0).to(tl.float32)
    column = tl.multiple_of(tl.load(columns + row % H), ALIGNED)
    z = tl.load(gate + (row // H * z_t + column)[:, None] + d[None, :], mask=live, other=0.0).to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
    scaled = normed.to(x.dtype.element_ty).to(tl.float32)
    scaled *= tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if ROUNDS:  # a product of two tensors of x's dtype
        scaled = scaled.to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + place, (scaled * _silu(z)).to(out.dtype.element_ty), mask=live)


def gated_norm(x: Tensor, gate: Tensor, columns: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, gate = x.contiguous(), gate.contiguous()
    B, T, H, D = x.shape
    out = x.new_empty(B, T, H * D)
    DP = triton.next_power_of_2(D)
    BR, warps = max(1, NORM[0] // DP), NORM[1]
    _gated_norm[triton.cdiv(B * T * H, BR),](
        x, gate, columns, weight, out, B * T * H, gate.shape[-1], eps, H, D, DP, BR, _alignment(D, gate.shape[-1]),
        weight.dtype == x.dtype, num_warps=warps,
    )  # fmt: skip
    return out


@triton.jit
def _rms_norm(x, weight, out, rows, x_r, eps, D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr):
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    d = tl.arange(0, DP)
    live = (row < rows)[:, None] & (d < D)[None, :]
    value = tl.load(x + row[:, None] * x_r + d[None, :], mask=live, other=0.0).to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
    scaled = normed * (1.0 + tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32))[None, :]
    tl.store(out + row[:, None] * D + d[None, :], scaled.to(out.dtype.element_ty), mask=live)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    D = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.reshape(-1, D)  # a view wherever one stride leads from row to row
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    DP = triton.next_power_of_2(D)
    BR, warps = max(1, NORM[0] // DP), NORM[1]
    _rms_norm[triton.cdiv(rows.shape[0], BR),](rows, weight, out, rows.shape[0], rows.stride(0), eps, D, DP, BR, num_warps=warps)
    return out


@triton.jit
def _swiglu(gate, up, elements, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = place < elements
    opened = _silu(tl.load(gate + place, mask=live, other=0.0).to(tl.float32)).to(gate.dtype.element_ty)
    passed = opened.to(tl.float32) * tl.load(up + place, mask=live, other=0.0).to(tl.float32)
    tl.store(gate + place, passed.to(gate.dtype.element_ty), mask=live)


def swiglu(gate: Tensor, up: Tensor) -> None:
    if not gate.is_contiguous():
        raise ValueError(f"gate must be contiguous, as it is written over, got strides {gate.stride()}")
    up = up.contiguous()
    elements, warps = SWIGLU
    _swiglu[triton.cdiv(gate.numel(), elements),](gate, up, gate.numel(), elements, num_warps=warps)
