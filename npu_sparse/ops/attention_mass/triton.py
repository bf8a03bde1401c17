"""attention_mass in Triton: a pass for every row's normaliser, then probabilities tile by tile, averaged over heads and reduced
over blocks of queries before they are written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..maxima import larger, largest

LOG2_E = 1.4426950408889634


@triton.jit
def _products(q, k, valid, b, h, kv, token, key, Tq, Tk, offset, scale_log2, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_t,
              D: tl.constexpr, DP: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores in units of log 2 of one head's queries and keys, -inf where the query does not see the key."""
    d = tl.arange(0, DP)
    live, inside = token < Tq, key < Tk
    queries = q + b * q_b + h * q_h + token[:, None].to(tl.int64) * q_t + d[None, :] * q_d
    queries = tl.load(queries, mask=live[:, None] & (d < D)[None, :], other=0.0)
    keys = k + b * k_b + kv * k_h + key[None, :].to(tl.int64) * k_t + d[:, None] * k_d
    keys = tl.load(keys, mask=inside[None, :] & (d < D)[:, None], other=0.0)
    scores = tl.dot(queries, keys, input_precision=PRECISION) * scale_log2
    sees = live[:, None] & inside[None, :] & (key[None, :] <= (offset + token)[:, None])
    if PADDED:
        real = tl.load(valid + b * v_b + key * v_t, mask=inside, other=0) != 0
        speaks = tl.load(valid + b * v_b + (offset + token) * v_t, mask=live, other=0) != 0
        sees = sees & real[None, :] & speaks[:, None]
    return tl.where(sees, scores, float("-inf"))


@triton.jit
def _normalise(q, k, valid, norm, Tq, Tk, offset, scale_log2, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_t,
               Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
               PADDED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """log2 sum exp of every row, float32 `[B, Hq, Tq]`; -inf where the query sees nothing, NaN where a score is NaN."""
    b, h = (tl.program_id(1) // Hq).to(tl.int64), tl.program_id(1) % Hq
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    high = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    end = tl.minimum(Tk, offset + (tl.program_id(0) + 1) * ROWS)
    for start in range(0, end, COLS):
        key = start + tl.arange(0, COLS)
        scores = _products(q, k, valid, b, h, h // G, token, key, Tq, Tk, offset, scale_log2, q_b, q_h, q_t, q_d, k_b, k_h, k_t,
                           k_d, v_b, v_t, D, DP, PADDED, PRECISION)  # fmt: skip
        higher = tl.maximum(high, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(high - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        high = higher
    value = tl.where(total == 0, float("-inf"), high + tl.log2(total))
    tl.store(norm + tl.program_id(1).to(tl.int64) * Tq + token, value, mask=token < Tq)


@triton.jit
def _mass(q, k, valid, norm, out, Tq, Tk, offset, scale_log2, block, chunks, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_t,
          o_b, o_h, o_n, Hq: tl.constexpr, Hs: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
          ROWS: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr, MEAN: tl.constexpr, PADDED: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """SPLIT > 0: the tile holds ROWS / SPLIT whole blocks of SPLIT queries. SPLIT = 0: one block, in `chunks` tiles of ROWS."""
    HEADS: tl.constexpr = Hq // Hs
    b, s = (tl.program_id(2) // Hs).to(tl.int64), tl.program_id(2) % Hs
    key = tl.program_id(0) * COLS + tl.arange(0, COLS)
    best = tl.zeros([COLS], tl.float32)
    speaking = 0.0
    for chunk in range(0, chunks):
        inner = chunk * ROWS + tl.arange(0, ROWS)
        token = tl.program_id(1) * (ROWS if SPLIT else block) + inner
        if SPLIT == 0:
            token = tl.where(inner < block, token, Tq)
        mass = tl.zeros([ROWS, COLS], tl.float32)
        live = tl.zeros([ROWS], tl.float32)
        for g in range(0, HEADS):
            h = s * HEADS + g
            scores = _products(q, k, valid, b, h, h // G, token, key, Tq, Tk, offset, scale_log2, q_b, q_h, q_t, q_d, k_b, k_h,
                               k_t, k_d, v_b, v_t, D, DP, PADDED, PRECISION)  # fmt: skip
            high = tl.load(norm + (b * Hq + h) * Tq + token, mask=token < Tq, other=float("-inf"))
            live = (high != float("-inf")).to(tl.float32)
            mass += tl.where(scores != float("-inf"), tl.exp2(scores - tl.where(live > 0, high, 0.0)[:, None]), 0.0)
        mass = mass / HEADS
        if SPLIT:
            BLOCKS: tl.constexpr = ROWS // SPLIT
            if MEAN:
                count = tl.sum(tl.reshape(live, [BLOCKS, SPLIT]), 1)
                reduced = tl.sum(tl.reshape(mass, [BLOCKS, SPLIT, COLS]), 1) / tl.maximum(count, 1.0)[:, None]
            else:
                reduced = largest(tl.reshape(mass, [BLOCKS, SPLIT, COLS]), 1)
            n = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
            place = out + b * o_b + s * o_h + n[:, None].to(tl.int64) * o_n + key[None, :]
            tl.store(place, reduced, mask=(n * SPLIT < Tq)[:, None] & (key < Tk)[None, :])
        elif MEAN:
            best += tl.sum(mass, 0)
            speaking += tl.sum(live, 0)
        else:
            best = larger(best, largest(mass, 0))
    if SPLIT == 0:
        if MEAN:
            best = best / tl.maximum(speaking, 1.0)
        tl.store(out + b * o_b + s * o_h + tl.program_id(1).to(tl.int64) * o_n + key, best, mask=key < Tk)


def attention_mass(q: Tensor, k: Tensor, scale: float, block: int, reduce: str, per_kv: bool, valid: Tensor | None) -> Tensor:
    B, Hq, Tq, D = q.shape
    Hkv, Tk = k.shape[1], k.shape[2]
    Hs, Nq = (Hkv if per_kv else 1), -(-Tq // block)
    norm = torch.empty((B, Hq, Tq), dtype=torch.float32, device=q.device)
    out = torch.empty((B, Hs, Nq, Tk), dtype=torch.float32, device=q.device)
    inputs = (q, k, q if valid is None else valid.view(torch.uint8), norm)
    sizes = (Tq, Tk, Tk - Tq, scale * LOG2_E)
    strides = (*q.stride(), *k.stride(), *(valid.stride() if valid is not None else (0, 0)))
    wide = D > 128
    common = dict(
        Hq=Hq, G=Hq // Hkv, D=D, DP=max(16, triton.next_power_of_2(D)), COLS=64, PADDED=valid is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=8 if wide else 4, num_stages=2 if wide else 3,
    )  # fmt: skip
    _normalise[(triton.cdiv(Tq, 64), B * Hq)](*inputs, *sizes, *strides, ROWS=64, **common)
    whole = block <= 128 and block & (block - 1) == 0
    rows = max(64, block) if whole else min(128, max(16, triton.next_power_of_2(block)))
    grid = (triton.cdiv(Tk, common["COLS"]), triton.cdiv(Tq, rows) if whole else Nq, B * Hs)
    _mass[grid](
        *inputs, out, *sizes, block, 1 if whole else triton.cdiv(block, rows), *strides, *out.stride()[:3],
        Hs=Hs, ROWS=rows, SPLIT=block if whole else 0, MEAN=reduce == "mean", **common,
    )  # fmt: skip
    return out
