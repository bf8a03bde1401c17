"""index_scores in Triton: products of a tile of queries with a tile of keys, ReLU, head weights and the block reduction before
anything is written, so that only `[B, Nq, Tk]` reduced scores leave the chip. The mean of softmax weights takes a first pass for
each query's normaliser."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..maxima import larger, largest
from ..slices import power_of_two
from . import hopper
from .op import select_by_slices


@triton.jit
def _scores(qi, ki, w, valid, b, token, key, Tq, Tk, offset, scale, q_b, q_h, q_t, q_d, k_b, k_t, k_d, w_b, w_t, w_h, v_b, v_t,
            HI: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WEIGHTED: tl.constexpr,
            PADDED: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """`z [ROWS, COLS]` of these queries and keys, -inf where the query does not see the key."""
    live, inside = token < Tq, key < Tk
    z = tl.zeros([ROWS, COLS], tl.float32)
    for h in tl.static_range(HI):
        products = tl.zeros([ROWS, COLS], tl.float32)
        for first in tl.static_range(0, DP, STEP):  # fp32 rounds least in short sums that are added up
            d = first + tl.arange(0, STEP)
            keys = ki + b * k_b + key[None, :].to(tl.int64) * k_t + d[:, None] * k_d
            keys = tl.load(keys, mask=inside[None, :] & (d < D)[:, None], other=0.0)  # [STEP, COLS]
            queries = qi + b * q_b + h * q_h + token[:, None].to(tl.int64) * q_t + d[None, :] * q_d
            queries = tl.load(queries, mask=live[:, None] & (d < D)[None, :], other=0.0)  # [ROWS, STEP]
            products += tl.dot(queries, keys, input_precision=PRECISION)
        products = larger(products * scale, 0.0)
        if WEIGHTED:
            weight = tl.load(w + b * w_b + token.to(tl.int64) * w_t + h * w_h, mask=live, other=0.0).to(tl.float32)
            products = products * weight[:, None]
        z += products
    sees = live[:, None] & inside[None, :] & (key[None, :] <= (offset + token)[:, None])
    if PADDED:
        real = tl.load(valid + b * v_b + key * v_t, mask=inside, other=0) != 0
        speaks = tl.load(valid + b * v_b + (offset + token) * v_t, mask=live, other=0) != 0
        sees = sees & real[None, :] & speaks[:, None]
    return tl.where(sees, z, float("-inf"))


@triton.jit
def _less(z, norm, token, Tq):
    """Every query's scores less its own norm; what it does not see stays at -inf."""
    return tl.where(z != float("-inf"), z - tl.load(norm + token, mask=token < Tq, other=0.0)[:, None], float("-inf"))


@triton.jit
def _reduce(qi, ki, w, valid, norm, out, Tq, Tk, offset, scale, block, chunks,
            q_b, q_h, q_t, q_d, k_b, k_t, k_d, w_b, w_t, w_h, v_b, v_t, n_b, o_b, o_n,
            HI: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr,
            MEAN: tl.constexpr, NORMAL: tl.constexpr, WEIGHTED: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
            STEP: tl.constexpr):  # fmt: skip
    """SPLIT > 0: the tile holds ROWS / SPLIT whole blocks of SPLIT queries. SPLIT = 0: one block, in `chunks` tiles of ROWS. With
    NORMAL, scores are less each query's `norm [B, Tq]`."""
    b = tl.program_id(2).to(tl.int64)
    key = tl.program_id(0) * COLS + tl.arange(0, COLS)
    if SPLIT:
        BLOCKS: tl.constexpr = ROWS // SPLIT
        first_block = tl.program_id(1) * BLOCKS
        token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        z = _scores(qi, ki, w, valid, b, token, key, Tq, Tk, offset, scale, q_b, q_h, q_t, q_d, k_b, k_t, k_d, w_b, w_t, w_h,
                    v_b, v_t, HI, D, DP, ROWS, COLS, WEIGHTED, PADDED, PRECISION, STEP)  # fmt: skip
        if NORMAL:
            z = _less(z, norm + b * n_b, token, Tq)
        if MEAN:
            high = tl.load(norm + b * n_b + token, mask=token < Tq, other=float("-inf"))
            live = high != float("-inf")
            weights = tl.where(z != float("-inf"), tl.exp(z - tl.where(live, high, 0.0)[:, None]), 0.0)
            speaking = tl.sum(tl.reshape(live.to(tl.float32), [BLOCKS, SPLIT]), 1)
            seen = largest(tl.reshape(z, [BLOCKS, SPLIT, COLS]), 1) != float("-inf")
            mean = tl.sum(tl.reshape(weights, [BLOCKS, SPLIT, COLS]), 1) / tl.maximum(speaking, 1.0)[:, None]
            reduced = tl.where(seen, mean, float("-inf"))
        else:
            reduced = largest(tl.reshape(z, [BLOCKS, SPLIT, COLS]), 1)
        n = first_block + tl.arange(0, BLOCKS)
        place = out + b * o_b + n[:, None].to(tl.int64) * o_n + key[None, :]
        tl.store(place, reduced, mask=(n * SPLIT < Tq)[:, None] & (key < Tk)[None, :])
    else:
        n = tl.program_id(1)
        best = tl.full([COLS], float("-inf"), tl.float32)
        total = tl.zeros([COLS], tl.float32)
        speaking = 0.0
        for chunk in range(0, chunks):
            inner = chunk * ROWS + tl.arange(0, ROWS)
            token = tl.where(inner < block, n * block + inner, Tq)
            z = _scores(qi, ki, w, valid, b, token, key, Tq, Tk, offset, scale, q_b, q_h, q_t, q_d, k_b, k_t, k_d, w_b, w_t, w_h,
                        v_b, v_t, HI, D, DP, ROWS, COLS, WEIGHTED, PADDED, PRECISION, STEP)  # fmt: skip
            if NORMAL:
                z = _less(z, norm + b * n_b, token, Tq)
            best = larger(best, largest(z, 0))
            if MEAN:
                high = tl.load(norm + b * n_b + token, mask=token < Tq, other=float("-inf"))
                live = high != float("-inf")
                total += tl.sum(tl.where(z != float("-inf"), tl.exp(z - tl.where(live, high, 0.0)[:, None]), 0.0), 0)
                speaking += tl.sum(live.to(tl.float32), 0)
        reduced = best
        if MEAN:
            reduced = tl.where(best != float("-inf"), total / tl.maximum(speaking, 1.0), float("-inf"))
        tl.store(out + b * o_b + n.to(tl.int64) * o_n + key, reduced, mask=key < Tk)


@triton.jit
def _normalise(qi, ki, w, valid, norm, Tq, Tk, offset, scale, q_b, q_h, q_t, q_d, k_b, k_t, k_d, w_b, w_t, w_h, v_b, v_t, n_b,
               HI: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
               WEIGHTED: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """log sum exp of every query's scores; -inf where it sees nothing, NaN where a score is NaN or +inf."""
    b = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    high = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    end = tl.minimum(Tk, offset + (tl.program_id(0) + 1) * ROWS)
    for start in range(0, end, COLS):
        key = start + tl.arange(0, COLS)
        z = _scores(qi, ki, w, valid, b, token, key, Tq, Tk, offset, scale, q_b, q_h, q_t, q_d, k_b, k_t, k_d, w_b, w_t, w_h,
                    v_b, v_t, HI, D, DP, ROWS, COLS, WEIGHTED, PADDED, PRECISION, STEP)  # fmt: skip
        higher = tl.maximum(high, tl.max(z, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(high - base) + tl.sum(tl.exp(z - base[:, None]), 1)
        high = higher
    norm_of = tl.where(total == 0, float("-inf"), high + tl.log(total))  # NaN where a score is
    tl.store(norm + b * n_b + token, norm_of, mask=token < Tq)


def index_scores(
    qi: Tensor, ki: Tensor, w: Tensor | None, block: int, reduce: str, valid: Tensor | None, partition: Tensor | None
) -> Tensor:
    B, Hi, Tq, Di = qi.shape
    Tk = ki.shape[1]
    Nq = -(-Tq // block)
    out = torch.empty((B, Nq, Tk), dtype=torch.float32, device=qi.device)
    inputs, sizes, strides, common = _launch(qi, ki, w, valid)
    norm = out
    if reduce == "mean":
        norm = index_partition(qi, ki, w, valid)
    elif partition is not None:
        norm = partition.contiguous()
    whole = block <= 128 and block & (block - 1) == 0
    rows = max(64, block) if whole else min(128, max(16, power_of_two(block)))
    tiles = -(-Tq // rows) if whole else Nq
    _reduce[(-(-Tk // common["COLS"]), tiles, B)](
        *inputs, norm, out, *sizes, block, -(-block // rows), *strides, Tq, *out.stride()[:2],
        ROWS=rows, SPLIT=block if whole else 0, MEAN=reduce == "mean", NORMAL=partition is not None, **common,
    )  # fmt: skip
    return out


def index_partition(qi: Tensor, ki: Tensor, w: Tensor | None, valid: Tensor | None) -> Tensor:
    B, _, Tq, _ = qi.shape
    inputs, sizes, strides, common = _launch(qi, ki, w, valid)
    norm = torch.empty((B, Tq), dtype=torch.float32, device=qi.device)
    _normalise[(-(-Tq // 64), B)](*inputs, norm, *sizes, *strides, Tq, ROWS=64, **common)
    return norm


def _launch(qi: Tensor, ki: Tensor, w: Tensor | None, valid: Tensor | None) -> tuple[tuple, tuple, tuple, dict]:
    """Inputs, with placeholders for what is missing, sizes, strides and constants that both kernels take."""
    Tq, Tk, Di = qi.shape[2], ki.shape[1], qi.shape[3]
    single, DP = qi.dtype == torch.float32, max(16, power_of_two(Di))
    common = dict(
        HI=qi.shape[1], D=Di, DP=DP, COLS=64 if single else 128, WEIGHTED=w is not None, PADDED=valid is not None,
        PRECISION="ieee" if single else "tf32", STEP=min(32, DP) if single else DP, num_warps=8 if Di > 64 else 4,
        num_stages=2 if single else 3,
    )  # fmt: skip
    inputs = (qi, ki, qi if w is None else w, qi if valid is None else valid.view(torch.uint8))
    strides = (*qi.stride(), *ki.stride(), *(w.stride() if w is not None else (0, 0, 0)))
    strides += valid.stride() if valid is not None else (0, 0)
    return inputs, (Tq, Tk, Tk - Tq, Di**-0.5), strides, common


def select_by_index(
    qi: Tensor, ki: Tensor, w: Tensor | None, k: int, block: int, reduce: str, sink: int, recent: int, valid: Tensor | None,
    partition: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if hopper.serves(qi, ki, w, k, block, reduce, sink, recent, valid):
        return hopper.select_by_index(qi, ki, w, k, block, reduce, sink, recent, valid, partition)
    support = select_by_slices(qi, ki, w, k, block, reduce, sink, recent, valid, partition, impl="kernel")
    return support.indices, support.count
