"""sparse_attention in Triton. A tile is a few neighbouring queries with all query heads of one KV head, so that every gathered
key serves G heads. Shared supports are gathered as they are; finer ones are served by the union of the tile's supports with one
membership bit per support, which is exact."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import workspace
from ..slices import power_of_two
from . import hopper

TILE_ROWS = 128  # query tokens x query heads of a tile
UNION_BITS = 32  # supports that one membership word can hold
MENDED_TOKENS = 16  # queries whose results one program checks for NaN


@triton.jit
def _attend(
    q, k, v, indices, count, member, tail_k, tail_v, tail_n, out, scale_log2, first_tile, Tq, offset, block,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, i_b, i_h, i_n, c_b, c_h, c_n, o_b, o_h, o_t,
    Hkv: tl.constexpr, HEADS_PER_SUPPORT: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, TQ: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr, UNION: tl.constexpr, TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    b, h = tl.program_id(1) // Hkv, tl.program_id(1) % Hkv
    rows = tl.arange(0, TQ * GP)
    token = (first_tile + tile) * TQ + rows // GP
    head = rows % GP
    live_row = (token < Tq) & (head < G)
    position = offset + token
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    queries = q + b * q_b + (h * G + head)[:, None].to(tl.int64) * q_h + token[:, None].to(tl.int64) * q_t + d[None, :] * q_d
    queries = tl.load(queries, mask=live_row[:, None] & (d < D)[None, :], other=0.0)  # [TQ * GP, D]
    if UNION:
        row = tile
        bit = token // block - ((first_tile + tile) * TQ) // block
    else:
        row = ((first_tile + tile) * TQ) // block
        bit = rows * 0
    support = b * i_b + (h // HEADS_PER_SUPPORT) * i_h + row.to(tl.int64) * i_n
    held = tl.load(count + b * c_b + (h // HEADS_PER_SUPPORT) * c_h + row * c_n)
    keys, values = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    high = tl.full([TQ * GP], float("-inf"), tl.float32)
    total = tl.zeros([TQ * GP], tl.float32)
    acc = tl.zeros([TQ * GP, DVP], tl.float32)
    if TAIL:  # the block's tail is the first key; tail_k [B, Hkv, Nq, D], tail_v and tail_n [B, Hs, Nq] are contiguous
        blocks = tl.cdiv(Tq, block)
        line = (tl.program_id(1).to(tl.int64) * blocks + token // block)[:, None]
        mean = tl.load(tail_k + line * D + d[None, :], mask=live_row[:, None] & (d < D)[None, :], other=0.0)
        number = tail_n + (tl.program_id(1) // HEADS_PER_SUPPORT).to(tl.int64) * blocks + token // block
        number = tl.load(number, mask=live_row, other=0.0)
        score = tl.sum(queries.to(tl.float32) * mean.to(tl.float32), 1) * scale_log2
        high = tl.where(number > 0, score + tl.log2(tl.maximum(number, 1.0)), float("-inf"))
        total = tl.where(number > 0, 1.0, 0.0)
        acc = tl.load(tail_v + line * DV + dv[None, :], mask=(number > 0)[:, None] & (dv < DV)[None, :], other=0.0).to(tl.float32)
    for start in range(0, held, BN):
        slot = start + tl.arange(0, BN)
        used = slot < held
        key = tl.load(indices + support + slot, mask=used, other=0)
        place = key.to(tl.int64)
        chosen = tl.load(keys + place[None, :] * k_t + d[:, None] * k_d, mask=used[None, :] & (d < D)[:, None], other=0.0)
        scores = tl.dot(queries, chosen, input_precision=PRECISION) * scale_log2  # [TQ * GP, BN]
        sees = used[None, :] & (key[None, :] <= position[:, None])
        if UNION:
            word = tl.load(member + support + slot, mask=used, other=0)
            sees = sees & (((word[None, :] >> bit[:, None]) & 1) != 0)
        scores = tl.where(sees, scores, float("-inf"))
        higher = tl.maximum(high, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(high - base)
        total = total * decay + tl.sum(weights, 1)
        chosen = tl.load(values + place[:, None] * v_t + dv[None, :] * v_d, mask=used[:, None] & (dv < DV)[None, :], other=0.0)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(chosen.dtype), chosen, acc, input_precision=PRECISION)
        high = higher
    acc = tl.where(total[:, None] == 0, 0.0, acc / tl.where(total == 0, 1.0, total)[:, None])
    place = out + b * o_b + (h * G + head)[:, None].to(tl.int64) * o_h + token[:, None].to(tl.int64) * o_t + dv[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=live_row[:, None] & (dv < DV)[None, :])


@triton.jit
def _mark(indices, count, words, first_tile, block, queries, Tk, i_b, i_h, i_n, c_b, c_h, c_n, Hs: tl.constexpr, TQ: tl.constexpr,
          BN: tl.constexpr):  # fmt: skip
    """For a tile of TQ queries: sets bit r of words[key] where the tile's r-th support holds the key."""
    tile = first_tile + tl.program_id(0)
    b, h = tl.program_id(1) // Hs, tl.program_id(1) % Hs
    words += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * Tk
    first = (tile * TQ) // block
    last = (tl.minimum((tile + 1) * TQ, queries) - 1) // block
    indices += b * i_b + h * i_h + first.to(tl.int64) * i_n
    for n in range(0, last - first + 1):
        held = tl.load(count + b * c_b + h * c_h + (first + n) * c_n)
        source = indices + n * i_n
        for start in range(0, held, BN):
            slot = start + tl.arange(0, BN)
            used = slot < held
            key = tl.load(source + slot, mask=used, other=0)
            tl.atomic_or(words + key, tl.full([BN], 1, tl.int32) << n, mask=used, sem="relaxed")


@triton.jit
def _compact(words, union, member, count, end, Tk, width, BN: tl.constexpr):
    """The keys of a tile that any support holds, ascending, with their words."""
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    words, union, member = words + program * Tk, union + program * width, member + program * width
    total = 0
    for start in range(0, end, BN):
        key = start + tl.arange(0, BN)
        word = tl.load(words + key, mask=key < end, other=0)
        held = (word != 0).to(tl.int32)
        place = total + tl.cumsum(held, 0) - 1
        tl.store(union + place, key, mask=held != 0)
        tl.store(member + place, word, mask=held != 0)
        total += tl.sum(held, 0)
    tl.store(count + program, total)


@triton.jit
def _mend(
    q, k, v, indices, count, tail_k, tail_v, tail_n, out, scale_log2, Tq, offset, block,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, i_b, i_h, i_n, c_b, c_h, c_n, o_b, o_h, o_t,
    Hq: tl.constexpr, Hkv: tl.constexpr, HEADS_PER_SUPPORT: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Computes those of TOKENS queries of one head again whose result holds NaN, reading only the keys that each one sees."""
    b, head = (tl.program_id(1) // Hq).to(tl.int64), tl.program_id(1) % Hq
    h = head // (Hq // Hkv)
    first = tl.program_id(0) * TOKENS
    token = first + tl.arange(0, TOKENS)
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    out += b * o_b + head * o_h
    rows = out + token[:, None].to(tl.int64) * o_t + dv[None, :]
    rows = tl.load(rows, mask=(token < Tq)[:, None] & (dv < DV)[None, :], other=0.0)
    has_nan = tl.max(tl.where(rows != rows, 1, 0), 1)
    if tl.max(has_nan, 0) > 0:
        keys, values = k + b * k_b + h * k_h, v + b * v_b + h * v_h
        for n in range(0, TOKENS):
            t = first + n
            if tl.sum(tl.where(token == t, has_nan, 0), 0) > 0:
                row = t // block
                support = indices + b * i_b + (h // HEADS_PER_SUPPORT) * i_h + row.to(tl.int64) * i_n
                held = tl.load(count + b * c_b + (h // HEADS_PER_SUPPORT) * c_h + row * c_n)
                query = tl.load(q + b * q_b + head * q_h + t.to(tl.int64) * q_t + d * q_d, mask=d < D, other=0.0).to(tl.float32)
                high = tl.full([1], float("-inf"), tl.float32)
                total = tl.zeros([1], tl.float32)
                acc = tl.zeros([DVP], tl.float32)
                if TAIL:
                    blocks = tl.cdiv(Tq, block)
                    line = (b * Hkv + h) * blocks + row
                    number = tl.load(tail_n + (b * Hkv + h) // HEADS_PER_SUPPORT * blocks + row)
                    if number > 0:
                        mean = tl.load(tail_k + line * D + d, mask=d < D, other=0.0).to(tl.float32)
                        high += tl.sum(query * mean, 0) * scale_log2 + tl.log2(number) - high
                        total += 1.0
                        acc += tl.load(tail_v + line * DV + dv, mask=dv < DV, other=0.0).to(tl.float32)
                for start in range(0, held, BN):
                    slot = start + tl.arange(0, BN)
                    key = tl.load(support + slot, mask=slot < held, other=0)
                    sees = (slot < held) & (key <= offset + t)
                    place = key[:, None].to(tl.int64)
                    chosen = tl.load(keys + place * k_t + d[None, :] * k_d, mask=sees[:, None] & (d < D)[None, :], other=0.0)
                    scores = tl.sum(chosen.to(tl.float32) * query[None, :], 1) * scale_log2
                    scores = tl.where(sees, scores, float("-inf"))
                    higher = tl.maximum(high, tl.max(scores, 0))
                    base = tl.where(higher == float("-inf"), 0.0, higher)
                    weights, decay = tl.exp2(scores - base), tl.exp2(high - base)
                    chosen = tl.load(values + place * v_t + dv[None, :] * v_d, mask=sees[:, None] & (dv < DV)[None, :], other=0.0)
                    total = total * decay + tl.sum(weights, 0)
                    acc = acc * decay + tl.sum(weights[:, None] * chosen.to(tl.float32), 0)
                    high = higher
                acc = tl.where(total == 0, 0.0, acc / tl.where(total == 0, 1.0, total))
                tl.store(out + t.to(tl.int64) * o_t + dv, acc.to(out.dtype.element_ty), mask=dv < DV)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, count: Tensor, block: int, scale: float) -> Tensor:
    return attend(q, k, v, indices, count, block, scale, None)


def attend(q, k, v, indices, count, block, scale, tail: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
    """Attention over the supports and, with `tail` = keys, values and numbers, over one more key for every block."""
    if hopper.serves(q, k, v, block, scale):
        out = hopper.attend(q, k, v, indices, count, block, scale, tail)
    else:
        out = _attend_tiles(q, k, v, indices, count, block, scale, tail)
    mend(q, k, v, indices, count, block, scale, tail, out)
    return out


def _attend_tiles(q, k, v, indices, count, block, scale, tail):
    B, Hq, Tq, _ = q.shape
    out = q.new_empty((B, Tq, Hq, v.shape[-1])).transpose(1, 2)
    if indices.shape[-1] == 0:
        return out.zero_()
    indices = indices.contiguous()
    TQ = _tile_tokens(Hq // k.shape[1])
    if block % 16 == 0:
        while block % TQ:
            TQ //= 2
        _launch(q, k, v, indices, count, None, tail, out, block, scale, TQ, 0, -(-Tq // TQ))
    else:
        _serve_unions(q, k, v, indices, count, tail, out, block, scale, min(TQ, UNION_BITS))
    return out


def _serve_unions(q, k, v, indices, count, tail, out, block, scale, TQ):
    B, Tq, Tk = q.shape[0], q.shape[2], k.shape[2]
    Hs, tiles = indices.shape[1], -(-Tq // TQ)
    step = max(1, workspace.elements() // (B * Hs * Tk))
    for first in range(0, tiles, step):
        n = min(step, tiles - first)
        end = min(Tk, Tk - Tq + (first + n) * TQ)  # no support of these tiles holds a key beyond
        width = min(end, ((TQ - 1) // block + 2) * indices.shape[-1])  # a tile touches at most so many supports
        words = torch.zeros((B, Hs, n, Tk), dtype=torch.int32, device=q.device)
        union, member = (torch.empty((B, Hs, n, width), dtype=torch.int32, device=q.device) for _ in range(2))
        held = torch.empty((B, Hs, n), dtype=torch.int32, device=q.device)
        grid = (n, B * Hs)
        _mark[grid](
            indices, count, words, first, block, Tq, Tk, *indices.stride()[:3], *count.stride(), Hs=Hs, TQ=TQ, BN=1024
        )
        _compact[grid](words, union, member, held, end, Tk, width, BN=1024)
        _launch(q, k, v, union, held, member, tail, out, block, scale, TQ, first, n)


def _launch(q, k, v, indices, count, member, tail, out, block, scale, TQ, first, tiles):
    B, Hq, Tq, D = q.shape
    Hkv, Tk, Dv = k.shape[1], k.shape[2], v.shape[-1]
    G = Hq // Hkv
    GP = max(power_of_two(G), 16 // TQ)
    DP, DVP = (max(16, power_of_two(size)) for size in (D, Dv))
    wide = max(DP, DVP) > 128
    _attend[(tiles, B * Hkv)](
        q, k, v, indices, count, count if member is None else member, *((k, v, count) if tail is None else tail), out,
        scale * 1.4426950408889634, first, Tq, Tk - Tq, block, *q.stride(), *k.stride(), *v.stride(),
        *indices.stride()[:3], *count.stride(), *out.stride()[:3],
        Hkv=Hkv, HEADS_PER_SUPPORT=Hkv // indices.shape[1], G=G, GP=GP, TQ=TQ, D=D, DP=DP, DV=Dv, DVP=DVP,
        BN=32 if q.dtype == torch.float32 else 64, UNION=member is not None, TAIL=tail is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=8 if wide else 4, num_stages=2 if wide else 3,
    )  # fmt: skip


def mend(q, k, v, indices, count, block, scale, tail, out) -> None:
    """Computes the rows of `out` that hold NaN again, one by one: a tile multiplies values that only some of its queries see by
    zero for the others, and zero times NaN is NaN. Without NaN this costs one pass over `out`."""
    B, Hq, Tq, D = q.shape
    Hkv, Dv = k.shape[1], v.shape[-1]
    if not out.numel() or indices.shape[-1] == 0:
        return
    _mend[(-(-Tq // MENDED_TOKENS), B * Hq)](
        q, k, v, indices, count, *((k, v, count) if tail is None else tail), out, scale * 1.4426950408889634, Tq,
        k.shape[2] - Tq, block, *q.stride(), *k.stride(), *v.stride(), *indices.stride()[:3], *count.stride(), *out.stride()[:3],
        Hq=Hq, Hkv=Hkv, HEADS_PER_SUPPORT=Hkv // indices.shape[1], TOKENS=MENDED_TOKENS, D=D,
        DP=max(16, power_of_two(D)), DV=Dv, DVP=max(16, power_of_two(Dv)), BN=32, TAIL=tail is not None,
        num_warps=4,
    )  # fmt: skip


def _tile_tokens(G: int) -> int:
    """Query tokens of a tile: a power of two, so that tokens x heads is near TILE_ROWS."""
    return max(1, TILE_ROWS // power_of_two(G))
