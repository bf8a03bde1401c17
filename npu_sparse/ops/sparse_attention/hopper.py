"""sparse_attention on Hopper in CUDA C++ (hopper.cu, union.cu): what Triton's version computes, with copies, products and softmax
overlapped."""

import torch
from torch import Tensor

from .. import nvrtc, workspace
from ..hopper import is_hopper, is_readable, processors

ROWS = 128  # query tokens x query heads of a tile; two tiles of half as many where supports are finer
UNION_BITS = 32  # supports that one membership word can hold
CHUNK, UNITERS = 16384, 512  # keys and threads of one step of building a union
ARRIVING, PLANTED = 1, 0  # what scripts/racecheck.py changes; see hopper.cu
SHAPES = {64: (128, 10), 128: (128, 5), 256: (64, 5)}  # dimension -> keys of a step, steps in flight

STRIDES = [f"{tensor}_{axis}" for tensor in "qkvo" for axis in "bht"] + [f"{tensor}_{axis}" for tensor in "ic" for axis in "bhn"]
Attend = nvrtc.structure(
    "Attend",
    **dict.fromkeys(("q", "k", "v", "out", "indices", "count", "member", "tail_k", "tail_v", "tail_number"), "p"),
    **dict.fromkeys(STRIDES, "q"),
    **dict.fromkeys(
        ("items", "tiles", "first_tile", "queries", "offset", "block", "kv_heads", "heads_per_support", "G", "TQ", "blocks"), "i"
    ),
    scale_log2="f",
)
Unite = nvrtc.structure(
    "Unite",
    **dict.fromkeys(("indices", "count", "united", "member", "held"), "p"),
    **dict.fromkeys(("i_b", "i_h", "i_n", "c_b", "c_h", "c_n", "width"), "q"),
    **dict.fromkeys(("heads", "first_tile", "TQ", "block", "queries", "offset"), "i"),
)


def serves(q: Tensor, k: Tensor, v: Tensor, block: int, scale: float) -> bool:
    """Whether the kernel takes these tensors; Triton's kernel serves the others."""
    G, D = q.shape[1] // k.shape[1], q.shape[-1]
    return (
        is_hopper(q.device)
        and D in SHAPES
        and v.shape[-1] == D
        and G <= ROWS
        and scale > 0
        and all(map(is_readable, (q, k, v)))
    )


def _shared_by(block: int, G: int) -> int:
    """Query tokens of a tile that lies in one block of queries and fills at least a quarter of ROWS; 0 where none does."""
    tokens = _tokens(ROWS, G)
    while tokens > 1 and block % tokens:
        tokens //= 2
    return tokens if block % tokens == 0 and 4 * tokens * G >= ROWS else 0


def _tokens(rows: int, G: int) -> int:
    return 1 << (max(1, rows // G).bit_length() - 1)


def attend(q, k, v, indices, count, block: int, scale: float, tail: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
    """Attention over the supports and, with `tail` = keys, values and numbers, over one more key for every block."""
    B, Hq, Tq, D = q.shape
    out = q.new_empty((B, Tq, Hq, D)).transpose(1, 2)
    if indices.shape[-1] == 0 or not out.numel():
        return out.zero_()
    indices, count = indices.contiguous(), count.contiguous()
    G = Hq // k.shape[1]
    if tokens := _shared_by(block, G):
        _attend(q, k, v, indices, count, None, tail, out, block, scale, tokens, 0, -(-Tq // tokens))
    else:
        _attend_unions(q, k, v, indices, count, tail, out, block, scale, min(_tokens(ROWS, G), UNION_BITS * block))
    return out


def _attend_unions(q, k, v, indices, count, tail, out, block, scale, TQ):
    B, Tq, Tk = q.shape[0], q.shape[2], k.shape[2]
    Hs, K = indices.shape[1], indices.shape[-1]
    tiles = -(-Tq // TQ)
    most = ((TQ - 1) // block + 2) * K  # keys of a tile, if none of its supports share any
    step = max(1, workspace.elements() // (B * Hs * min(most, Tk)))
    for first in range(0, tiles, step):
        n = min(step, tiles - first)
        width = min(most, Tk - Tq + min(Tq, (first + n) * TQ))
        united, member = (torch.empty((B, Hs, n, width), dtype=torch.int32, device=q.device) for _ in range(2))
        held = torch.empty((B, Hs, n), dtype=torch.int32, device=q.device)
        unite(indices, count, united, member, held, first, TQ, block, Tq, Tk)
        _attend(q, k, v, united, held, member, tail, out, block, scale, TQ, first, n)


def unite(indices, count, united, member, held, first, TQ, block, Tq, Tk) -> None:
    """Writes the unions of tiles `first`, `first + 1`, ...: keys, words and their number."""
    B, Hs, n, width = united.shape
    macros = (("BF16", 1), ("STRIDE", 1), ("THREADS", UNITERS), ("CHUNK", CHUNK))
    run = nvrtc.kernel("sparse_attention/union.cu", "unite_supports", macros, 4 * (CHUNK + UNITERS), indices.device.index)
    run((n, B * Hs), UNITERS, Unite(
        indices.data_ptr(), count.data_ptr(), united.data_ptr(), member.data_ptr(), held.data_ptr(), *indices.stride()[:3],
        *count.stride(), width, Hs, first, TQ, block, Tq, Tk - Tq,
    ))  # fmt: skip


def _attend(q, k, v, indices, count, member, tail, out, block, scale, TQ, first, tiles):
    B, Hq, Tq, D = q.shape
    Hkv, Tk = k.shape[1], k.shape[2]
    BN, slots = SHAPES[D]
    G = Hq // Hkv
    streams, union = 1 if TQ * G > ROWS // 2 or member is not None else 2, member is not None
    shared = (ROWS + slots * BN) * D * 2 + slots * BN * 4 * (2 if union else 1) + 8 * (2 * slots + 2)
    macros = dict(BF16=int(q.dtype == torch.bfloat16), DIM=D, BN=BN, SLOTS=slots, STREAMS=streams, UNION=int(union))
    macros |= dict(TAIL=int(tail is not None), ARRIVING=ARRIVING, PLANTED=PLANTED)
    run = nvrtc.kernel("sparse_attention/hopper.cu", "attend_supports", tuple(macros.items()), shared, q.device.index)
    items, tails = -(-tiles // streams) * B * Hkv, [0, 0, 0] if tail is None else [part.data_ptr() for part in tail]
    run((min(items, processors(q.device)),), 384, Attend(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), indices.data_ptr(), count.data_ptr(),
        member.data_ptr() if union else 0, *tails, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        *indices.stride()[:3], *count.stride(), items, tiles, first, Tq, Tk - Tq, block, Hkv, Hkv // indices.shape[1], G, TQ,
        -(-Tq // block), scale * 1.4426950408889634,
    ))  # fmt: skip

