"""select_tokens in Triton: the exact k-th largest score of a row by its bits, eleven at a time, then one pass that writes what
lies above it, and of what equals it the smallest positions, in ascending order. Deterministic, without sorting."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks import sink_ends


@triton.jit
def _ordered(scores, valid, sinks, b, key, first, last, Tk, v_t, SINK: tl.constexpr, RECENT: tl.constexpr, PADDED: tl.constexpr):
    """Scores as unsigned integers of the same order: 0 where no query sees the key, the largest where it is always kept."""
    score = tl.load(scores + key, mask=key < Tk, other=float("-inf"))
    bits = (score + 0.0).to(tl.uint32, bitcast=True)  # + 0.0: both zeros are one value
    rank = tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)
    kept = key < 0
    if SINK > 0:
        inside = key < tl.load(sinks + b)
        if PADDED:
            inside = inside & (tl.load(valid + key * v_t, mask=key < Tk, other=0) != 0)
        kept = kept | inside
    if RECENT > 0:
        kept = kept | ((key > first - RECENT) & (key <= last))
    rank = tl.where(kept, tl.full(rank.shape, 0xFFFFFFFF, tl.uint32), rank)
    return tl.where(score > float("-inf"), rank, tl.zeros(rank.shape, tl.uint32))


@triton.jit
def _select(scores, valid, sinks, indices, count, k, K, block, queries, offset, Hs, Nq, Tk, s_b, s_h, s_n, v_b, v_t,
            SINK: tl.constexpr, RECENT: tl.constexpr, PADDED: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n, b, h = row % Nq, row // (Nq * Hs), (row // Nq) % Hs
    scores += b * s_b + h * s_h + n * s_n
    valid += b * v_b
    first = (offset + n * block).to(tl.int32)
    last = (offset + tl.minimum((n + 1) * block, queries) - 1).to(tl.int32)
    end = tl.minimum(Tk, last + 1)
    prefix = tl.zeros([1], tl.uint32)  # of the k-th largest value
    wanted = tl.zeros([1], tl.int32) + k  # how many of those that share the prefix
    visible = tl.zeros([1], tl.int32)
    for level in tl.static_range(3):
        SHIFT: tl.constexpr = 21 if level == 0 else (10 if level == 1 else 0)
        BINS: tl.constexpr = 1024 if level == 2 else 2048
        histogram = tl.zeros([BINS], tl.int32)
        for start in range(0, end, BN):
            key = start + tl.arange(0, BN)
            rank = _ordered(scores, valid, sinks, b, key, first, last, end, v_t, SINK, RECENT, PADDED)
            counted = rank > 0
            if level == 1:
                counted = counted & ((rank >> 21) == (prefix >> 21))
            if level == 2:
                counted = counted & ((rank >> 10) == (prefix >> 10))
            histogram += tl.histogram(((rank >> SHIFT) & (BINS - 1)).to(tl.int32), BINS, mask=counted)
        held = tl.sum(histogram, 0)
        if level == 0:
            visible += held
            wanted = tl.minimum(wanted, visible)
        above = held - tl.cumsum(histogram, 0)  # in bins of larger values
        bin = tl.sum((above >= wanted).to(tl.int32), 0)
        wanted -= tl.sum(tl.where(tl.arange(0, BINS) == bin, above, 0), 0)
        prefix = prefix | (bin.to(tl.uint32) << SHIFT)
    taken = tl.minimum(tl.zeros([1], tl.int32) + k, visible)
    at = row * K + tl.zeros([1], tl.int64)
    ties = tl.zeros([1], tl.int32)
    for start in range(0, end, BN):
        key = start + tl.arange(0, BN)
        rank = _ordered(scores, valid, sinks, b, key, first, last, end, v_t, SINK, RECENT, PADDED)
        equal = ((rank == prefix) & (rank > 0)).to(tl.int32)
        turn = ties + tl.cumsum(equal, 0)
        chosen = ((rank > prefix) | ((equal != 0) & (turn <= wanted))).to(tl.int32)
        place = at + tl.cumsum(chosen, 0) - 1
        tl.store(indices + place, key, mask=chosen != 0)
        at += tl.sum(chosen, 0)
        ties += tl.sum(equal, 0)
    tl.store(count + row + tl.arange(0, 1), taken)
    for start in range(0, K, BN):
        slot = start + tl.arange(0, BN)
        tl.store(indices + row * K + slot, tl.full([BN], -1, tl.int32), mask=(slot >= taken) & (slot < K))


def select_tokens(
    scores: Tensor, k: int, sink: int, recent: int, block: int, queries: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, Hs, Nq, Tk = scores.shape
    K = min(k, Tk)
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    indices = torch.empty((B, Hs, Nq, K), dtype=torch.int32, device=scores.device)
    count = torch.empty((B, Hs, Nq), dtype=torch.int32, device=scores.device)
    _select[(B * Hs * Nq,)](
        scores, scores if valid is None else valid.view(torch.uint8), sink_ends(sink, B, Tk, valid, scores.device), indices,
        count, K, K, block, queries, Tk - queries, Hs, Nq, Tk, *scores.stride()[:3],
        *(valid.stride() if valid is not None else (0, 0)), SINK=sink, RECENT=recent, PADDED=valid is not None, BN=2048,
        num_warps=8,
    )  # fmt: skip
    return indices, count
