"""select_two_level in Triton. A group of queries is one tile of rows in both levels: blocks are ranked like keys, with two
products per index head, and the keys of a chosen block are one run of memory and one tile of columns."""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks import sink_ends
from ..maxima import larger, largest
from .levels import two_levels

ROW_ELEMENTS = 2048  # slots that one program of `_place` turns into keys


@triton.jit
def _bound(ki, valid, out, Tk, k_b, k_t, k_d, v_b, v_t, D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, PADDED: tl.constexpr):
    """The representatives of one key block: half way from the mean of its valid keys to their maxima, and to their minima."""
    c, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key, d = c * C + tl.arange(0, C), tl.arange(0, DP)
    real = key < Tk
    if PADDED:
        real = real & (tl.load(valid + b * v_b + key * v_t, mask=real, other=0) != 0)
    inside = real[:, None] & (d < D)[None, :]
    keys = tl.load(ki + b * k_b + key[:, None].to(tl.int64) * k_t + d[None, :] * k_d, mask=inside, other=0.0).to(tl.float32)
    held = tl.sum(real.to(tl.int32), 0)
    mean = tl.sum(keys, 0) / tl.maximum(held, 1)
    high = tl.max(tl.where(real[:, None], keys, float("-inf")), 0)
    low = tl.min(tl.where(real[:, None], keys, float("inf")), 0)
    place = out + (b * tl.num_programs(0) + c) * 2 * D + d
    tl.store(place, tl.where(held > 0, (mean + high) * 0.5, 0.0).to(out.dtype.element_ty), mask=d < D)
    tl.store(place + D, tl.where(held > 0, (mean + low) * 0.5, 0.0).to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _rank(qi, bounds, w, kinds, valid, norm, out, R, Nc, Ng, position, key_block, reach, q_b, q_h, q_t, q_d, w_b, w_t, w_h, v_b,
          v_t, HI: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, NORMAL: tl.constexpr,
          WEIGHTED: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The rank of COLS key blocks for a group of ROWS queries; `reach`: how far before it the group keeps everything. With
    NORMAL, scores are less each query's `norm [B, Ng, ROWS]`."""
    b, g = tl.program_id(2).to(tl.int64), tl.program_id(1)
    first_block = tl.program_id(0) * COLS
    c = first_block + tl.arange(0, COLS)
    d = tl.arange(0, DP)
    token = g * ROWS + tl.arange(0, ROWS)
    first = position + g * ROWS
    last = position + tl.minimum((g + 1) * ROWS, R) - 1
    best = tl.full([COLS], float("-inf"), tl.float32)
    if first_block * key_block < first:  # else all of them are the group's own, or ahead
        z = tl.zeros([ROWS, COLS], tl.float32)
        bound = bounds + (b * Nc + c)[None, :].to(tl.int64) * (2 * D) + d[:, None]
        inside = (c < Nc)[None, :] & (d < D)[:, None]
        high = tl.load(bound, mask=inside, other=0.0)  # [DP, COLS]
        low = tl.load(bound + D, mask=inside, other=0.0)
        for h in range(0, HI):
            q = qi + b * q_b + h * q_h + token[:, None].to(tl.int64) * q_t + d[None, :] * q_d
            q = tl.load(q, mask=(token < R)[:, None] & (d < D)[None, :], other=0.0)  # [ROWS, DP]
            zero = tl.zeros_like(q)  # a maximum of bf16 would be fp32
            score = tl.dot(tl.where(q < zero, zero, q), high, input_precision=PRECISION)
            score = larger(tl.dot(tl.where(q < zero, q, zero), low, score, input_precision=PRECISION), 0.0)
            if WEIGHTED:
                weight = tl.load(w + b * w_b + token.to(tl.int64) * w_t + h * w_h, mask=token < R, other=0.0).to(tl.float32)
                score = score * weight[:, None]
            z += score
        if NORMAL:
            z -= tl.load(norm + (b * Ng + g) * ROWS + tl.arange(0, ROWS))[:, None]
        speaks = token < R
        if PADDED:
            speaks = speaks & (tl.load(valid + b * v_b + (position + token) * v_t, mask=speaks, other=0) != 0)
        best = largest(tl.where(speaks[:, None], z, float("-inf")), 0)
        best = tl.where(best == best, tl.minimum(best, 3e38), float("-inf"))  # below the blocks that always belong
    kind = tl.load(kinds + b * Nc + c, mask=c < Nc, other=0)
    best = tl.where(kind == 2, 3.4028234663852886e38, best)
    best = tl.where((c + 1) * key_block > first - reach, float("inf"), best)
    best = tl.where((kind == 0) | (c * key_block > last), float("-inf"), best)
    tl.store(out + (b * Ng + g) * Nc + c, best, mask=c < Nc)


@triton.jit
def _score_block(qi, ki, w, valid, q, b, i, chosen, token, R, Tk, position, scale, q_b, q_h, q_t, q_d, k_b, k_t, k_d, w_b, w_t,
                 w_h, v_b, v_t, HI: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
                 WEIGHTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`(key [C], z [ROWS, C])` of the i-th chosen block: the scores of its keys, with MASKED -inf where the query does not see
    them. `q`: the queries of the only index head, where there is one."""
    d = tl.arange(0, DP)
    key = tl.load(chosen + i) * C + tl.arange(0, C)
    keys = ki + b * k_b + key[None, :].to(tl.int64) * k_t + d[:, None] * k_d
    keys = tl.load(keys, mask=(key < Tk)[None, :] & (d < D)[:, None], other=0.0)  # [DP, C]
    if HI == 1:
        z = larger(tl.dot(q, keys, input_precision=PRECISION) * scale, 0.0)
        if WEIGHTED:
            weight = tl.load(w + b * w_b + token.to(tl.int64) * w_t, mask=token < R, other=0.0).to(tl.float32)
            z = z * weight[:, None]
    else:
        z = tl.zeros([ROWS, C], tl.float32)
        for h in range(0, HI):
            other = qi + b * q_b + h * q_h + token[:, None].to(tl.int64) * q_t + d[None, :] * q_d
            other = tl.load(other, mask=(token < R)[:, None] & (d < D)[None, :], other=0.0)
            product = larger(tl.dot(other, keys, input_precision=PRECISION) * scale, 0.0)
            if WEIGHTED:
                weight = tl.load(w + b * w_b + token.to(tl.int64) * w_t + h * w_h, mask=token < R, other=0.0).to(tl.float32)
                product = product * weight[:, None]
            z += product
    if MASKED:
        sees = (token < R)[:, None] & (key < Tk)[None, :] & (key[None, :] <= (position + token)[:, None])
        if PADDED:
            real = tl.load(valid + b * v_b + key * v_t, mask=key < Tk, other=0) != 0
            speaks = tl.load(valid + b * v_b + (position + token) * v_t, mask=token < R, other=0) != 0
            sees = sees & real[None, :] & speaks[:, None]
        z = tl.where(sees, z, float("-inf"))
    return key, z


@triton.jit
def _score(qi, ki, w, chosen, held, valid, ends, norm, out, R, Tk, Ng, W, position, scale, chunk, q_b, q_h, q_t, q_d, k_b, k_t,
           k_d, w_b, w_t, w_h, v_b, v_t, HI: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
           SPLIT: tl.constexpr, MEAN: tl.constexpr, NORMAL: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
           WEIGHTED: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`chunk` blocks of a group of ROWS queries: their keys' scores, reduced over blocks of SPLIT queries."""
    b, g = tl.program_id(2).to(tl.int64), tl.program_id(1)
    BLOCKS: tl.constexpr = ROWS // SPLIT
    token = g * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    q = qi + b * q_b + token[:, None].to(tl.int64) * q_t + d[None, :] * q_d
    q = tl.load(q, mask=(token < R)[:, None] & (d < D)[None, :], other=0.0)
    chosen += (b * Ng + g) * W
    start = tl.program_id(0) * chunk
    stop = tl.minimum(start + chunk, W)
    filled = tl.minimum(stop, tl.load(held + b * Ng + g))
    # The blocks ascend and the group's own, where queries see unequally, are the last; in a ragged group some rows see nothing
    first, last = position + g * ROWS, position + tl.minimum((g + 1) * ROWS, R) - 1
    equal = tl.load(held + b * Ng + g) - (last // C - first // C + 1)
    if PADDED or (g + 1) * ROWS > R:
        equal = 0
    n = tl.arange(0, BLOCKS)
    row = g * BLOCKS + n
    rows = tl.cdiv(R, SPLIT)
    real_row = (row < rows)[:, None]
    row_first = position + row * SPLIT
    row = out + (b * rows + row)[:, None] * (W * C) + tl.arange(0, C)[None, :]
    high = tl.zeros([ROWS], tl.float32)
    speaking = tl.zeros([BLOCKS], tl.float32)
    if MEAN or NORMAL:
        high = tl.load(norm + (b * Ng + g) * ROWS + tl.arange(0, ROWS))
    if MEAN:
        live = high != float("-inf")
        speaking = tl.sum(tl.reshape(live.to(tl.float32), [BLOCKS, SPLIT]), 1)
        high = tl.where(live, high, 0.0)
    for i in range(start, tl.minimum(filled, equal)):
        key, z = _score_block(qi, ki, w, valid, q, b, i, chosen, token, R, Tk, position, scale, q_b, q_h, q_t, q_d, k_b, k_t, k_d,
                              w_b, w_t, w_h, v_b, v_t, HI, D, DP, ROWS, C, WEIGHTED, PADDED, False, PRECISION)  # fmt: skip
        reduced = _reduced(z, high, speaking, BLOCKS, SPLIT, C, MEAN, NORMAL)
        reduced = _with_kept(reduced, key, row_first, valid, ends, b, Tk, v_b, v_t, SPLIT, SINK, RECENT, PADDED)
        tl.store(row + i * C, reduced, mask=real_row)
    for i in range(tl.maximum(start, equal), filled):
        key, z = _score_block(qi, ki, w, valid, q, b, i, chosen, token, R, Tk, position, scale, q_b, q_h, q_t, q_d, k_b, k_t, k_d,
                              w_b, w_t, w_h, v_b, v_t, HI, D, DP, ROWS, C, WEIGHTED, PADDED, True, PRECISION)  # fmt: skip
        reduced = _reduced(z, high, speaking, BLOCKS, SPLIT, C, MEAN, NORMAL)
        reduced = _with_kept(reduced, key, row_first, valid, ends, b, Tk, v_b, v_t, SPLIT, SINK, RECENT, PADDED)
        tl.store(row + i * C, reduced, mask=real_row)
    for i in range(tl.maximum(start, filled), stop):
        tl.store(row + i * C, tl.full([BLOCKS, C], float("-inf"), tl.float32), mask=real_row)


@triton.jit
def _reduced(z, high, speaking, BLOCKS: tl.constexpr, SPLIT: tl.constexpr, C: tl.constexpr, MEAN: tl.constexpr,
             NORMAL: tl.constexpr):  # fmt: skip
    """`[BLOCKS, C]`: the largest score of every block of queries, with NORMAL less each query's `high`, or the mean of its
    softmax weights."""
    if NORMAL:
        z = tl.where(z != float("-inf"), z - high[:, None], float("-inf"))
    best = largest(tl.reshape(z, [BLOCKS, SPLIT, C]), 1)
    if MEAN:
        weights = tl.where(z != float("-inf"), tl.exp(z - high[:, None]), 0.0)
        mean = tl.sum(tl.reshape(weights, [BLOCKS, SPLIT, C]), 1) / tl.maximum(speaking, 1.0)[:, None]
        best = tl.where(best != float("-inf"), mean, float("-inf"))
    return best


@triton.jit
def _with_kept(reduced, key, first, valid, ends, b, Tk, v_b, v_t, SPLIT: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
               PADDED: tl.constexpr):  # fmt: skip
    """Scores with +inf for the keys that are always kept, below that for all others, and -inf for those that are NaN; `first
    [BLOCKS]`: the position of every block's first query."""
    seen = reduced != float("-inf")
    reduced = tl.where(reduced == reduced, tl.minimum(reduced, 3e38), float("-inf"))
    if SINK > 0:
        kept = key < tl.load(ends + b)
        if PADDED:
            kept = kept & (tl.load(valid + b * v_b + key * v_t, mask=key < Tk, other=0) != 0)
        reduced = tl.where(kept[None, :] & seen, float("inf"), reduced)
    if RECENT > 0:
        kept = (key[None, :] > first[:, None] - RECENT) & (key[None, :] < first[:, None] + SPLIT)
        reduced = tl.where(kept & seen, float("inf"), reduced)
    return reduced


@triton.jit
def _normalise(qi, ki, w, chosen, held, valid, norm, R, Tk, Ng, W, position, scale, q_b, q_h, q_t, q_d, k_b, k_t, k_d, w_b, w_t,
               w_h, v_b, v_t, HI: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
               WEIGHTED: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """log sum exp of every query's scores over its group's candidates; -inf where it sees nothing."""
    b, g = tl.program_id(1).to(tl.int64), tl.program_id(0)
    token = g * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    q = qi + b * q_b + token[:, None].to(tl.int64) * q_t + d[None, :] * q_d
    q = tl.load(q, mask=(token < R)[:, None] & (d < D)[None, :], other=0.0)
    chosen += (b * Ng + g) * W
    high = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for i in range(0, tl.load(held + b * Ng + g)):
        key, z = _score_block(qi, ki, w, valid, q, b, i, chosen, token, R, Tk, position, scale, q_b, q_h, q_t, q_d, k_b, k_t, k_d,
                              w_b, w_t, w_h, v_b, v_t, HI, D, DP, ROWS, C, WEIGHTED, PADDED, True, PRECISION)  # fmt: skip
        higher = tl.maximum(high, tl.max(z, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(high - base) + tl.sum(tl.exp(z - base[:, None]), 1)
        high = higher
    value = tl.where(total == 0, float("-inf"), high + tl.log(total))
    tl.store(norm + (b * Ng + g) * ROWS + tl.arange(0, ROWS), value)


@triton.jit
def _place(slots, count, chosen, out, rows_per_group, Ng, K, W, key_block, BN: tl.constexpr):
    n, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row = b * tl.num_programs(0) + n
    slot = tl.program_id(1) * BN + tl.arange(0, BN)
    used = slot < tl.load(count + row)
    picked = tl.load(slots + row * K + slot, mask=used, other=0)
    block = tl.load(chosen + (b * Ng + n // rows_per_group) * W + picked // key_block, mask=used, other=0)
    key = tl.where(used, block * key_block + picked % key_block, -1)
    tl.store(out + row * K + slot, key, mask=slot < K)


def _inputs(qi: Tensor, w: Tensor | None, valid: Tensor | None) -> tuple[dict, Tensor, Tensor, tuple, tuple]:
    """The arguments that every kernel takes: constants, placeholders for missing tensors, and strides."""
    constants = dict(
        HI=qi.shape[1], D=qi.shape[-1], DP=max(16, triton.next_power_of_2(qi.shape[-1])), WEIGHTED=w is not None,
        PADDED=valid is not None, PRECISION="ieee" if qi.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    rest = (*(w.stride() if w is not None else (0, 0, 0)), *(valid.stride() if valid is not None else (0, 0)))
    return constants, qi if w is None else w, qi if valid is None else valid.view(torch.uint8), qi.stride(), rest


def block_bounds(ki: Tensor, key_block: int, valid: Tensor | None) -> Tensor:
    """As in blocks.py, in one pass."""
    B, Tk, Di = ki.shape
    out = torch.empty((B, triton.cdiv(Tk, key_block), 2, Di), dtype=ki.dtype, device=ki.device)
    real, strides = (ki, (0, 0)) if valid is None else (valid.view(torch.uint8), valid.stride())
    _bound[(out.shape[1], B)](
        ki, real, out, Tk, *ki.stride(), *strides, D=Di, DP=max(16, triton.next_power_of_2(Di)), C=key_block,
        PADDED=valid is not None, num_warps=8 if Di > 128 else 4,
    )  # fmt: skip
    return out


def block_scores(
    qi: Tensor, bounds: Tensor, w: Tensor | None, sinks: Tensor, position: int, key_block: int, group: int, recent: int,
    valid: Tensor | None, partition: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference."""
    B, _, R, _ = qi.shape
    Nc, Ng = bounds.shape[1], triton.cdiv(R, group)
    kinds = sinks.to(torch.uint8) + 1  # 0: all padding, 2: holds a sink
    if valid is not None:
        missing = Nc * key_block - valid.shape[1]
        kinds *= torch.nn.functional.pad(valid, (0, missing)).unflatten(1, (Nc, key_block)).any(-1)
    out = torch.empty((B, Ng, Nc), dtype=torch.float32, device=qi.device)
    constants, weights, real, q_strides, rest = _inputs(qi, w, valid)
    norm = out if partition is None else _by_groups(partition, Ng, group)
    cols = 64 if qi.shape[-1] <= 128 else 32
    _rank[(triton.cdiv(Nc, cols), Ng, B)](
        qi, bounds.contiguous(), weights, kinds, real, norm, out, R, Nc, Ng, position, key_block, max(recent, 1) - 1, *q_strides,
        *rest, ROWS=group, COLS=cols, NORMAL=partition is not None, num_warps=4 if group <= 64 else 8, num_stages=2,
        **constants,
    )  # fmt: skip
    return out


def candidate_scores(
    qi: Tensor, ki: Tensor, w: Tensor | None, chosen: Tensor, held: Tensor, position: int, key_block: int, block: int, group: int,
    reduce: str, sink: int, recent: int, valid: Tensor | None, partition: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference."""
    B, _, R, Di = qi.shape
    Ng, W = chosen.shape[1:]
    Tk = ki.shape[1]
    constants, weights, real, q_strides, rest = _inputs(qi, w, valid)
    inputs = (qi, ki, weights, chosen.contiguous(), held.contiguous(), real)
    sizes = (R, Tk, Ng, W, position, Di**-0.5)
    strides = (*q_strides, *ki.stride(), *rest)
    tile_bytes = key_block * constants["DP"] * ki.element_size()
    stages = 3 if tile_bytes <= 32 << 10 else 2 if tile_bytes <= 64 << 10 else 1  # what shared memory holds
    launch = dict(ROWS=group, C=key_block, num_warps=4 if group <= 64 else 8, num_stages=stages, **constants)
    out = torch.empty((B, triton.cdiv(R, block), W * key_block), dtype=torch.float32, device=qi.device)
    norm = out if partition is None else _by_groups(partition, Ng, group)
    if reduce == "mean":
        norm = torch.empty((B, Ng, group), dtype=torch.float32, device=qi.device)
        _normalise[(Ng, B)](*inputs, norm, *sizes, *strides, **launch)
    chunk = max(1, 1024 // key_block)
    _score[(triton.cdiv(W, chunk), Ng, B)](
        *inputs, sink_ends(sink, B, Tk, valid, qi.device), norm, out, *sizes, chunk, *strides, SPLIT=block, MEAN=reduce == "mean",
        NORMAL=partition is not None, SINK=sink, RECENT=recent, **launch,
    )  # fmt: skip
    return out


def _by_groups(partition: Tensor, Ng: int, group: int) -> Tensor:
    """`[B, R]` -> `[B, Ng, group]`, a ragged last group filled up with zeros."""
    return torch.nn.functional.pad(partition, (0, Ng * group - partition.shape[1])).view(-1, Ng, group)


def keys_of_slots(slots: Tensor, count: Tensor, chosen: Tensor, key_block: int, rows_per_group: int) -> Tensor:
    """As in the reference."""
    B, rows, K = slots.shape
    Ng, W = chosen.shape[1:]
    out = torch.empty_like(slots, memory_format=torch.contiguous_format)
    _place[(rows, triton.cdiv(K, ROW_ELEMENTS), B)](
        slots.contiguous(), count.contiguous(), chosen.contiguous(), out, rows_per_group, Ng, K, W, key_block, BN=ROW_ELEMENTS
    )
    return out


select_two_level = partial(
    two_levels, impl="kernel", block_bounds=block_bounds, block_scores=block_scores, candidate_scores=candidate_scores,
    keys_of_slots=keys_of_slots,
)  # fmt: skip
