"""select_tokens in Triton: the exact k-th largest score of a row by its bits, eleven at a time, then one pass that writes what
lies above it, and of what equals it the smallest positions, in ascending order. Deterministic, without sorting."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks import sink_ends


@triton.jit
def _ordered(scores, valid, sinks, b, key, first, last, Tk, v_t, SINK: tl.constexpr, RECENT: tl.constexpr, PADDED: tl.constexpr):
    """Scores as unsigned integers of the same order: 0 where no query sees the key or the score is NaN, the largest where it is
    always kept."""
    score = tl.load(scores + key, mask=key < Tk, other=float("-inf"))
    bits = (score + 0.0).to(tl.uint32, bitcast=True)  # + 0.0: both zeros are one value
    rank = tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)
    rank = tl.where(score > float("-inf"), rank, tl.zeros(rank.shape, tl.uint32))
    kept = key < 0
    if SINK > 0:
        inside = key < tl.load(sinks + b)
        if PADDED:
            inside = inside & (tl.load(valid + key * v_t, mask=key < Tk, other=0) != 0)
        kept = kept | inside
    if RECENT > 0:
        kept = kept | ((key > first - RECENT) & (key <= last))
    return tl.where(kept & (score != float("-inf")), tl.full(rank.shape, 0xFFFFFFFF, tl.uint32), rank)


@triton.jit
def _histogram(scores, valid, sinks, b, first, last, end, v_t, prefix, SINK: tl.constexpr, RECENT: tl.constexpr,
               PADDED: tl.constexpr, BN: tl.constexpr, SHIFT: tl.constexpr, KNOWN: tl.constexpr, BINS: tl.constexpr):  # fmt: skip
    """How often each value of the bits from SHIFT on occurs among the visible ranks that share `prefix` from bit KNOWN on."""
    histogram = tl.zeros([BINS], tl.int32)
    for start in range(0, end, BN):
        key = start + tl.arange(0, BN)
        rank = _ordered(scores, valid, sinks, b, key, first, last, end, v_t, SINK, RECENT, PADDED)
        counted = rank > 0
        if KNOWN < 32:
            counted = counted & ((rank >> KNOWN) == (prefix >> KNOWN))
        histogram += tl.histogram(((rank >> SHIFT) & (BINS - 1)).to(tl.int32), BINS, mask=counted)
    return histogram


@triton.jit
def _narrow(histogram, prefix, wanted, SHIFT: tl.constexpr, BINS: tl.constexpr):
    """The prefix, longer by the bin that holds the wanted-th largest, and its place within that bin."""
    above = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)  # in bins of larger values
    bin = tl.sum((above >= wanted).to(tl.int32), 0)
    wanted -= tl.sum(tl.where(tl.arange(0, BINS) == bin, above, 0), 0)
    return prefix | (bin.to(tl.uint32) << SHIFT), wanted


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
    histogram = _histogram(scores, valid, sinks, b, first, last, end, v_t, prefix, SINK, RECENT, PADDED, BN, 21, 32, 2048)
    visible = tl.sum(histogram, 0)
    wanted = tl.minimum(wanted, visible)
    prefix, wanted = _narrow(histogram, prefix, wanted, 21, 2048)
    histogram = _histogram(scores, valid, sinks, b, first, last, end, v_t, prefix, SINK, RECENT, PADDED, BN, 10, 21, 2048)
    prefix, wanted = _narrow(histogram, prefix, wanted, 10, 2048)
    histogram = _histogram(scores, valid, sinks, b, first, last, end, v_t, prefix, SINK, RECENT, PADDED, BN, 0, 10, 1024)
    prefix, wanted = _narrow(histogram, prefix, wanted, 0, 1024)
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
