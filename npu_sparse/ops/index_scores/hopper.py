"""select_by_index on Hopper in CUDA C++ (hopper.cu, candidates.cu): scores that cannot be among a row's k best are never written.

A sixteenth of the keys is scored first (a 32nd where every query selects for itself). The score in a certain place among these is
a threshold that more than k keys reach, but not many more, with odds of about a million to one; the second pass scores all
keys and keeps those. The k best of the kept are the k best of all. Rows whose threshold was too high or too low are counted on
the device and selected by another kernel, so the result is exact and nothing waits for the host.
"""

import functools
import math

import torch
from torch import Tensor

from .. import nvrtc, workspace
from ..hopper import is_hopper, is_readable, processors

BLOCKS = (1, 16, 32, 64, 128)
SHARED_BYTES = 232448
KEYS = 128  # keys of one step
DEVIATIONS = 5.0
ANY = 0x007FFFFF << 32  # the threshold that every visible key reaches
THREADS = 256
RESCUERS = 32
STRIDES = ("q_b", "q_h", "q_t", "k_b", "k_t", "w_b", "w_t", "w_h", "shift_b")

Score = nvrtc.structure(
    "Score",
    **dict.fromkeys(("q", "k", "w", "shift", "threshold", "candidate", "held", "sample"), "p"),
    **dict.fromkeys(STRIDES, "q"),
    **dict.fromkeys(("queries", "offset", "rows", "first_query", "segment", "capacity", "samples", "sink", "recent"), "i"),
    shift_scale="f",
)
Row = nvrtc.structure("Row", **dict.fromkeys(("queries", "offset", "rows", "first_query", "block"), "i"))
Estimate = nvrtc.structure(
    "Estimate",
    **dict.fromkeys(("sample", "threshold", "held", "failed"), "p"),
    row=Row,
    **dict.fromkeys(("samples", "place", "capacity", "first_row", "all_rows"), "i"),
)
Select = nvrtc.structure(
    "Select",
    **dict.fromkeys(("candidate", "held", "indices", "count", "failed"), "p"),
    row=Row,
    **dict.fromkeys(("capacity", "k", "width", "first_row", "all_rows"), "i"),
)
Rescue = nvrtc.structure(
    "Rescue",
    **dict.fromkeys(("q", "k", "w", "shift", "scores", "indices", "count", "failed"), "p"),
    **dict.fromkeys(STRIDES, "q"),
    row=Row,
    **dict.fromkeys(("keys", "k_best", "width", "first_row", "all_rows", "heads", "dim", "sink", "recent"), "i"),
    shift_scale="f",
)


def serves(qi: Tensor, ki: Tensor, w: Tensor | None, k: int, block: int, reduce: str, sink: int, recent: int, valid) -> bool:
    """Whether the kernels take these tensors; others are scored and selected by slices."""
    if not (is_hopper(qi.device) and block in BLOCKS and valid is None):
        return False
    if reduce != "max" and not (reduce == "softmax_max" and block > 1):
        return False
    if qi.shape[-1] not in (64, 128, 256) or not is_readable(qi) or not is_readable(ki):
        return False
    room = 4 * (ki.shape[1] // 32 + 1 + k) + 8400  # of one row's selection: a bit for every key, k keys, and a histogram
    return _slots(qi.shape[1], qi.shape[-1], w is not None, block) >= 2 and room <= SHARED_BYTES


def select_by_index(
    qi, ki, w, k: int, block: int, reduce: str, sink: int, recent: int, valid, partition: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, Hi, Tq, Di = qi.shape
    shift = None if partition is None else partition.contiguous()
    Tk, rows, capacity = ki.shape[1], -(-Tq // block), _capacity(k, sink, recent, block)
    indices = torch.empty((B, 1, rows, min(k, Tk)), dtype=torch.int32, device=qi.device)
    count = torch.empty((B, 1, rows), dtype=torch.int32, device=qi.device)
    columns = _columns(Hi, Di, w is not None, block)
    at_once = _pieces(4 * workspace.size(), 8 * B * capacity, block, columns)
    if block == 1:  # every tile of queries is one block of threads: as many as there are processors, all of one length
        at_once = min(at_once, processors(qi.device) * columns)
    for first in range(0, Tq, at_once):
        queries = Queries(qi, ki, w, shift, block, sink, recent, first, min(Tq, first + at_once))
        _select(queries, k, capacity, indices, count)
    return indices, count


class Queries:
    """Whole tiles of queries, with everything that their scores depend on."""

    def __init__(self, qi, ki, w, shift, block: int, sink: int, recent: int, first: int, stop: int):
        self.qi, self.ki, self.w, self.shift = qi, ki, w, shift
        self.block, self.sink, self.recent, self.first, self.stop = block, sink, recent, first, stop
        self.B, self.heads, Tq, self.dim = qi.shape
        self.keys, self.device = ki.shape[1], qi.device
        self.offset = self.keys - Tq
        self.end = self.offset + stop  # no query sees a key from here on
        self.rows = -(-(stop - first) // block)
        self.samples = -(-self.end // _stride(block))
        self.row = Row(stop, self.offset, self.rows, first, block)
        self.inputs = tuple(0 if x is None else x.data_ptr() for x in (qi, ki, w, shift))
        self.strides = (
            *qi.stride()[:3], *ki.stride()[:2], *((0, 0, 0) if w is None else w.stride()), 0 if shift is None else shift.stride(0)
        )  # fmt: skip
        self.kind = qi.dtype == torch.bfloat16, self.heads, self.dim, w is not None, block, shift is not None, qi.device.index

    def piece(self, first: int, stop: int) -> "Queries":
        if (first, stop) == (self.first, self.stop):
            return self
        return Queries(self.qi, self.ki, self.w, self.shift, self.block, self.sink, self.recent, first, stop)


def _select(queries: Queries, k: int, capacity: int, indices: Tensor, count: Tensor) -> None:
    """Writes the supports of these queries into `indices` and `count`, which are those of all."""
    lines, width = queries.B * queries.rows, indices.shape[-1]
    room = torch.empty(lines * (capacity + 2) + 1, dtype=torch.int64, device=queries.device)
    candidate = room.data_ptr()
    threshold = candidate + 8 * lines * capacity
    held = threshold + 8 * lines
    failed = held + 4 * lines  # how many rows, then which
    sampled = queries.end > capacity
    if sampled:
        _estimate(queries, k, capacity, threshold, held, failed)
    else:
        room[lines * capacity : lines * (capacity + 1)].fill_(ANY)
        room[lines * (capacity + 1) :].zero_()
    _score(queries, threshold, candidate, held, 0, capacity)
    here = (width, queries.first // queries.block, indices.shape[2])
    results = (indices.data_ptr(), count.data_ptr(), failed)
    shared = 4 * (queries.keys // 32 + 1 + width)
    _after("select_candidates", queries.kind, shared)((queries.rows, queries.B), THREADS, Select(
        candidate, held, *results, queries.row, capacity, k, *here
    ))  # fmt: skip
    if sampled:
        scores = torch.empty((RESCUERS, queries.keys), dtype=torch.float32, device=queries.device)
        _after("rescue_rows", queries.kind)((RESCUERS,), THREADS, Rescue(
            *queries.inputs, scores.data_ptr(), *results, *queries.strides, queries.row, queries.keys, k, *here,
            queries.heads, queries.dim, queries.sink, queries.recent, math.sqrt(queries.dim),
        ))  # fmt: skip


def _estimate(queries: Queries, k: int, capacity: int, threshold: int, held: int, failed: int) -> None:
    """Writes the rank that each row's candidates reach, from samples made a piece at a time, and zeros into the counts."""
    columns = _columns(*queries.kind[1:5])
    at_once = _pieces(workspace.size(), 4 * queries.B * queries.samples, queries.block, columns)
    place = _place(k, _stride(queries.block))
    for first in range(queries.first, queries.stop, at_once):
        piece = queries.piece(first, min(queries.stop, first + at_once))
        sample = torch.empty((queries.B, piece.rows, piece.samples), dtype=torch.float32, device=queries.device)
        _score(piece, threshold, 0, 0, sample.data_ptr(), capacity)
        _after("estimate_thresholds", piece.kind)((piece.rows, queries.B), THREADS, Estimate(
            sample.data_ptr(), threshold, held, failed, piece.row, piece.samples, place, capacity,
            (first - queries.first) // queries.block, queries.rows,
        ))  # fmt: skip


def _score(queries: Queries, threshold: int, candidate: int, held: int, sample: int, capacity: int) -> None:
    """Fills `sample`; where that is 0, the candidates and their number."""
    run, columns = _scorer(bool(sample), *queries.kind)
    tiles, total = -(-(queries.stop - queries.first) // columns), queries.samples if sample else queries.end
    segment = total
    if sample or queries.block > 1:
        segment = _segment(tiles * queries.B, total, processors(queries.device))
    run((-(-total // segment), tiles, queries.B), 384, Score(
        *queries.inputs, threshold, candidate, held, sample, *queries.strides, queries.stop, queries.offset, queries.rows,
        queries.first, segment, capacity, queries.samples, queries.sink, queries.recent, math.sqrt(queries.dim),
    ))  # fmt: skip


@functools.cache
def _scorer(sampling: bool, bf16: bool, heads: int, dim: int, weighted: bool, block: int, normal: bool, device: int):
    """`(launch, queries of a tile)` of the scoring kernel for such queries."""
    columns, slots = (choose(heads, dim, weighted, block) for choose in (_columns, _slots))
    # of weights, or of floors where there is one head without them; of counts or of starts
    by_column = 4 * columns * ((heads if weighted else int(normal and heads == 1)) + 1)
    shared = (KEYS * slots + heads * columns) * dim * 2 + by_column + 8 * (2 * slots + 1)
    macros = dict(
        BF16=int(bf16), STRIDE=_stride(block), DIM=dim, HEADS=heads, WEIGHTED=int(weighted), COLUMNS=columns, BSEL=block,
        SLOTS=slots, SAMPLE=int(sampling), NORMAL=int(normal),
    )  # fmt: skip
    name = "sample_scores" if sampling else "filter_scores"
    return nvrtc.kernel("index_scores/hopper.cu", name, tuple(macros.items()), shared, device), columns


@functools.cache
def _after(name: str, kind: tuple, shared_bytes: int = 0):
    bf16, _, _, _, block, _, device = kind
    macros = (("BF16", int(bf16)), ("STRIDE", _stride(block)), ("THREADS", THREADS))
    return nvrtc.kernel("index_scores/candidates.cu", name, macros, shared_bytes, device)


def _pieces(most_bytes: int, bytes_a_row: int, block: int, columns: int) -> int:
    """Queries whose rows fit in `most_bytes`: whole tiles, and at least one."""
    return max(1, most_bytes // bytes_a_row * block // columns) * columns


def _stride(block: int) -> int:
    """Keys that one sampled key stands for."""
    return 32 if block == 1 else 16


def _place(k: int, stride: int) -> int:
    """The place among the sample, from the largest, whose score more than k keys reach."""
    expected = k / stride
    return math.ceil(expected + DEVIATIONS * math.sqrt(expected) + 2)


def _capacity(k: int, sink: int, recent: int, block: int) -> int:
    """Candidates that a row can hold: more than reach a threshold at `_place`, and the keys that are always kept."""
    stride = _stride(block)
    place = _place(k, stride)
    kept = sink + (recent + block if recent else 0)
    return -(-(math.ceil((place + DEVIATIONS * math.sqrt(place) + 2) * stride) + kept) // 64) * 64


def _columns(heads: int, dim: int, weighted: bool, block: int) -> int:
    """Queries of a tile: columns of the products, or with a block of one their rows."""
    return 256 if heads == 1 and not weighted and dim < 256 and block > 1 else 128


def _slots(heads: int, dim: int, weighted: bool, block: int) -> int:
    """Steps of keys that fit shared memory beside a tile of queries."""
    columns = _columns(heads, dim, weighted, block)
    room = SHARED_BYTES - heads * columns * (2 * dim + 4) - 4 * columns - 128
    return min(6, room // (KEYS * dim * 2 + 16))


def _segment(tiles: int, keys: int, processors: int) -> int:
    """Keys of one block of threads, so that there are several blocks for each processor."""
    steps = -(-keys // KEYS)
    return KEYS * max(8, tiles * steps // (16 * processors))
