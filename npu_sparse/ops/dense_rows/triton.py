"""dense_rows in Triton by flash-decoding: a tile holds rows x the query heads of one KV head. Programs share out its keys; each
keeps a maximum, a sum and an unnormalised output, and a second kernel joins them."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..slices import power_of_two

FEWEST_KEYS = 256  # a split of the keys has at least this many
PROGRAMS_PER_CORE = 2  # so that no multiprocessor waits for the slowest
CORES_INTERPRETED = 4  # stands for a card's multiprocessors under TRITON_INTERPRET
LOG2E = 1.4426950408889634


@triton.jit
def _partial(
    q, k, v, positions, valid, part, high_out, total_out, scale_log2, M, Tk, keys,
    q_b, q_h, q_r, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, p_b, p_r, m_b, m_t,
    Hkv: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of packed rows, row r and head g at r * G + g, over one split of the keys."""
    split, group = tl.program_id(1), tl.program_id(2)
    b, h = group // Hkv, group % Hkv
    packed = tl.program_id(0) * BM + tl.arange(0, BM)
    live = packed < M
    row, head = packed // G, h * G + packed % G
    position = tl.load(positions + b * p_b + row * p_r, mask=live, other=-1)
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    queries = q + b.to(tl.int64) * q_b + head[:, None].to(tl.int64) * q_h + row[:, None].to(tl.int64) * q_r + d[None, :] * q_d
    queries = tl.load(queries, mask=live[:, None] & (d < D)[None, :], other=0.0)  # [BM, D]
    keys_at, values_at = k + b.to(tl.int64) * k_b + h * k_h, v + b.to(tl.int64) * v_b + h * v_h
    high = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DVP], tl.float32)
    first = split * keys
    end = tl.minimum(tl.minimum(first + keys, Tk), tl.max(position, 0) + 1)
    for start in range(first, end, BN):
        key = start + tl.arange(0, BN)
        used = key < end
        if PADDED:
            used = used & (tl.load(valid + b * m_b + key * m_t, mask=used, other=0) != 0)
        place = key.to(tl.int64)
        chosen = tl.load(keys_at + place[None, :] * k_t + d[:, None] * k_d, mask=used[None, :] & (d < D)[:, None], other=0.0)
        scores = tl.dot(queries, chosen, input_precision=PRECISION) * scale_log2  # [BM, BN]
        scores = tl.where(used[None, :] & (key[None, :] <= position[:, None]), scores, float("-inf"))
        higher = tl.maximum(high, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(high - base)
        total = total * decay + tl.sum(weights, 1)
        chosen = tl.load(values_at + place[:, None] * v_t + dv[None, :] * v_d, mask=used[:, None] & (dv < DV)[None, :], other=0.0)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(chosen.dtype), chosen, acc, input_precision=PRECISION)
        high = higher
    line = (group.to(tl.int64) * tl.num_programs(1) + split) * M + packed
    tl.store(high_out + line, high, mask=live)
    tl.store(total_out + line, total, mask=live)
    tl.store(part + line[:, None] * DV + dv[None, :], acc, mask=live[:, None] & (dv < DV)[None, :])


@triton.jit
def _join(
    part, high_in, total_in, out, M, splits, o_b, o_h, o_r,
    Hkv: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The output of a tile of packed rows from the parts of all splits."""
    group = tl.program_id(1)
    b, h = group // Hkv, group % Hkv
    packed = tl.program_id(0) * BM + tl.arange(0, BM)
    live = packed < M
    row, head = packed // G, h * G + packed % G
    dv = tl.arange(0, DVP)
    high = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DVP], tl.float32)
    for split in range(0, splits):
        line = (group.to(tl.int64) * splits + split) * M + packed
        theirs = tl.load(high_in + line, mask=live, other=float("-inf"))
        higher = tl.maximum(high, theirs)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        mine, other = tl.exp2(high - base), tl.exp2(theirs - base)
        total = total * mine + tl.load(total_in + line, mask=live, other=0.0) * other
        more = tl.load(part + line[:, None] * DV + dv[None, :], mask=live[:, None] & (dv < DV)[None, :], other=0.0)
        acc = acc * mine[:, None] + more * other[:, None]
        high = higher
    acc = tl.where(total[:, None] == 0, 0.0, acc / tl.where(total == 0, 1.0, total)[:, None])
    place = out + b.to(tl.int64) * o_b + head[:, None].to(tl.int64) * o_h + row[:, None].to(tl.int64) * o_r + dv[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=live[:, None] & (dv < DV)[None, :])


def dense_rows(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, valid: Tensor | None) -> Tensor:
    B, Hq, R, D = q.shape
    Hkv, Tk, Dv = k.shape[1], k.shape[2], v.shape[-1]
    G = Hq // Hkv
    M = R * G
    out = q.new_empty((B, R, Hq, Dv)).transpose(1, 2)
    DP, DVP = (max(16, power_of_two(size)) for size in (D, Dv))
    wide = max(DP, DVP) > 128
    BM = max(16, min(64 if wide else 128, power_of_two(M)))
    BN = 32 if wide or q.dtype == torch.float32 else 64
    tiles = -(-M // BM)
    splits = max(1, min(-(-PROGRAMS_PER_CORE * _cores(q.device) // (tiles * B * Hkv)), -(-Tk // FEWEST_KEYS)))
    keys = -(-Tk // (splits * BN)) * BN
    splits = -(-Tk // keys)
    lines = B * Hkv * splits * M
    made = torch.empty(lines * (Dv + 2), dtype=torch.float32, device=q.device)
    part, high, total = made, made[lines * Dv :], made[lines * (Dv + 1) :]
    mask = positions if valid is None else valid.view(torch.uint8)
    _partial[(tiles, splits, B * Hkv)](
        q, k, v, positions, mask, part, high, total, scale * LOG2E, M, Tk, keys,
        *q.stride(), *k.stride(), *v.stride(), *positions.stride(), *mask.stride(),
        Hkv=Hkv, G=G, D=D, DP=DP, DV=Dv, DVP=DVP, BM=BM, BN=BN, PADDED=valid is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=8 if BM * max(DP, DVP) > 8192 else 4, num_stages=2,
    )  # fmt: skip
    joined = 16
    _join[(-(-M // joined), B * Hkv)](
        part, high, total, out, M, splits, *out.stride()[:3], Hkv=Hkv, G=G, DV=Dv, DVP=DVP, BM=joined, num_warps=4
    )
    return out


@functools.cache
def _cores(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else CORES_INTERPRETED
