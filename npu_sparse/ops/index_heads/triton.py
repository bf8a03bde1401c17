"""index_heads in Triton: a program computes all heads of a few tokens, so that everything is read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..slices import power_of_two

TOKENS = 16  # tokens that one program computes
HIDDEN = 128  # numbers of a hidden state that a program reads at a time


@triton.jit
def _is_finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")  # NaN is not


@triton.jit
def _finish(
    queries, keys, weights, dots, hidden, cos, sin, norm_weight, norm_bias, line, qi, ki, w, c, finite, T, start, H, eps, factor,
    q_b, q_t, k_b, k_t, w_b, w_t, d_b, d_t, h_b, h_t, h_d, c_b, c_t, c_d, s_b, s_t, s_d,
    HEADS: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, WEIGHTED: tl.constexpr,
    LEARNED: tl.constexpr, TOKENS: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = token < T
    t = token.to(tl.int64)
    d = tl.arange(0, DP)
    TURNED: tl.constexpr = R if R < D else D // 2 * 2
    HALF: tl.constexpr = TURNED // 2
    turned = d < TURNED
    other = tl.where(d < HALF, d + HALF, tl.where(turned, d - HALF, d))  # the dimension that d is rotated with
    column = d if R <= D else d % HALF * (R // 2) // HALF
    mask = live[:, None] & (d < D)[None, :]
    angles = live[:, None] & turned[None, :]
    cosine = tl.load(cos + b * c_b + t[:, None] * c_t + column[None, :] * c_d, mask=angles, other=1.0).to(tl.float32)
    sine = tl.load(sin + b * s_b + t[:, None] * s_t + column[None, :] * s_d, mask=angles, other=0.0).to(tl.float32)
    sine = tl.where((d < HALF)[None, :], -sine, sine)
    good = live
    for h in range(0, HEADS):
        at = queries + b * q_b + t[:, None] * q_t + h * D
        x = tl.load(at + d[None, :], mask=mask, other=0.0).to(tl.float32)  # [TOKENS, DP]
        y = tl.load(at + other[None, :], mask=mask, other=0.0).to(tl.float32)
        rotated = tl.where(turned[None, :], x * cosine + y * sine, x).to(qi.dtype.element_ty)
        tl.store(qi + ((b * HEADS + h) * T + t[:, None]) * D + d[None, :], rotated, mask=mask)
        good = good & (tl.min(tl.where(_is_finite(rotated) | ~mask, 1, 0), 1) != 0)
    at = keys + b * k_b + t[:, None] * k_t
    x = tl.load(at + d[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(at + other[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = (tl.sum(x, 1) / D)[:, None]
    spread = tl.where(mask, x - mean, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(spread * spread, 1) / D + eps)[:, None]
    inside = d < D
    x = spread * scale * tl.load(norm_weight + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = (y - mean) * scale * tl.load(norm_weight + other, mask=inside, other=0.0).to(tl.float32)[None, :]
    x += tl.load(norm_bias + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    y += tl.load(norm_bias + other, mask=inside, other=0.0).to(tl.float32)[None, :]
    rotated = tl.where(turned[None, :], x * cosine + y * sine, x).to(ki.dtype.element_ty)
    tl.store(ki + (b * T + t[:, None]) * D + d[None, :], rotated, mask=mask)
    good = good & (tl.min(tl.where(_is_finite(rotated) | ~mask, 1, 0), 1) != 0)
    if WEIGHTED:
        h = tl.arange(0, HP)
        heads = live[:, None] & (h < HEADS)[None, :]
        scaled = tl.load(weights + b * w_b + t[:, None] * w_t + h[None, :], mask=heads, other=0.0).to(tl.float32) * factor
        scaled = scaled.to(w.dtype.element_ty)
        tl.store(w + (b * T + t[:, None]) * HEADS + h[None, :], scaled, mask=heads)
        good = good & (tl.min(tl.where(_is_finite(scaled) | ~heads, 1, 0), 1) != 0)
    if LEARNED:
        seen = tl.log((start + token + 1).to(tl.float32))
        of_length = tl.load(line).to(tl.float32) + tl.load(line + 1).to(tl.float32) * seen
        tl.store(c + b * T + t, tl.load(dots + b * d_b + t * d_t, mask=live, other=0.0).to(tl.float32) + of_length, mask=live)
    sound = live
    for first in range(0, H, HIDDEN):
        n = first + tl.arange(0, HIDDEN)
        read = live[:, None] & (n < H)[None, :]
        state = tl.load(hidden + b * h_b + t[:, None] * h_t + n[None, :] * h_d, mask=read, other=0.0)
        sound = sound & (tl.min(tl.where(_is_finite(state), 1, 0), 1) != 0)
    tl.store(finite + b * T + t, sound.to(tl.uint8), mask=live)
    tl.store(finite + (tl.num_programs(1) + b) * T + t, good.to(tl.uint8), mask=live)


def index_heads(
    queries: Tensor, keys: Tensor, weights: Tensor | None, dots: Tensor | None, hidden: Tensor, cos: Tensor, sin: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, line: Tensor | None, eps: float, start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, D = keys.shape
    heads = queries.shape[-1] // D
    device, dtype = keys.device, keys.dtype
    queries, keys, weights = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (queries, keys, weights))
    qi = torch.empty((B, heads, T, D), dtype=dtype, device=device)
    ki = torch.empty((B, T, D), dtype=dtype, device=device)
    w = torch.empty((0,) if weights is None else (B, T, heads), dtype=dtype, device=device)
    c = torch.empty((0,) if dots is None else (B, T), dtype=torch.float32, device=device)
    finite = torch.empty((2, B, T), dtype=torch.bool, device=device)
    if not T or not B:
        return qi, ki, w, c, finite
    strides = [queries.stride(0), queries.stride(1), keys.stride(0), keys.stride(1)]
    strides += (0, 0) if weights is None else weights.stride()[:2]
    strides += (0, 0) if dots is None else dots.stride()
    strides += hidden.stride()
    for table in (cos, sin):
        strides += (table.stride(0) if table.shape[0] > 1 else 0, *table.stride()[1:])
    _finish[(-(-T // TOKENS), B)](
        queries, keys, keys if weights is None else weights, keys if dots is None else dots, hidden, cos, sin,
        norm_weight.contiguous(), norm_bias.contiguous(), norm_bias if line is None else line.contiguous(), qi, ki, w, c,
        finite.view(torch.uint8), T, start, hidden.shape[-1], eps, heads**-0.5, *strides,
        HEADS=heads, HP=power_of_two(heads), D=D, DP=power_of_two(D), R=cos.shape[-1],
        WEIGHTED=weights is not None, LEARNED=dots is not None, TOKENS=TOKENS, HIDDEN=HIDDEN, num_warps=4,
    )  # fmt: skip
    return qi, ki, w, c, finite
