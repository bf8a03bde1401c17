"""select_by_index on Hopper in CUDA C++ (hopper.cu, candidates.cu): scores that cannot be among a row's k best are never written.

A sixteenth of the keys is scored first (a 32nd where every query selects for itself). The score in a certain place among these is
a threshold that more than k keys reach, but not many more, with odds of about a million to one; the second pass scores all
keys and keeps those. The k best of the kept are the k best of all. Rows whose threshold was too high or too low are counted on
the device and selected by another kernel, so the result is exact and nothing waits for the host.
"""

import ctypes
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import nvrtc, workspace
from ..hopper import is_hopper, is_readable, processors

BLOCKS = (1, 16, 32, 64, 128)
SHARED_BYTES = 232448
KEYS = 128  # of a step
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
)
Row = nvrtc.structure("Row", **dict.fromkeys(("queries", "offset", "rows", "first_query", "block"), "i"))
Estimate = nvrtc.structure(
    "Estimate", sample="p", threshold="p", row=Row, **dict.fromkeys(("samples", "place", "capacity"), "i")
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
)


def serves(qi: Tensor, ki: Tensor, w: Tensor | None, k: int, block: int, reduce: str, sink: int, recent: int, valid) -> bool:
    """Whether the kernels take these tensors; what they do not take is scored and selected by slices."""
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
    shift = None if partition is None else (partition * math.sqrt(Di)).contiguous()  # scores are not scaled
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


@dataclass(frozen=True)
class Queries:
    """Some of the queries, whole tiles of them, with all that their scores depend on."""

    qi: Tensor
    ki: Tensor
    w: Tensor | None
    shift: Tensor | None
    block: int
    sink: int
    recent: int
    first: int
    stop: int

    @property
    def offset(self) -> int:
        return self.ki.shape[1] - self.qi.shape[2]

    @property
    def end(self) -> int:
        """No query sees a key from here on."""
        return self.offset + self.stop

    @property
    def rows(self) -> int:
        return -(-(self.stop - self.first) // self.block)

    @property
    def samples(self) -> int:
        return -(-self.end // _stride(self.block))

    def row(self) -> ctypes.Structure:
        return Row(self.stop, self.offset, self.rows, self.first, self.block)

    def inputs(self) -> tuple[int, ...]:
        return tuple(0 if x is None else x.data_ptr() for x in (self.qi, self.ki, self.w, self.shift))

    def strides(self) -> tuple[int, ...]:
        of_weights = self.w.stride() if self.w is not None else (0, 0, 0)
        return *self.qi.stride()[:3], *self.ki.stride()[:2], *of_weights, self.shift.stride(0) if self.shift is not None else 0


def _select(queries: Queries, k: int, capacity: int, indices: Tensor, count: Tensor) -> None:
    """Writes the supports of these queries into `indices` and `count`, which are those of all."""
    B, Tk, device = queries.qi.shape[0], queries.ki.shape[1], queries.qi.device
    counters = torch.zeros(2 * B * queries.rows + 1, dtype=torch.int32, device=device)
    held, failed = counters[: B * queries.rows], counters[B * queries.rows :]
    sampled = queries.end > capacity
    threshold = _thresholds(queries, k, capacity) if sampled else _full(queries)
    candidate = torch.empty((B, queries.rows, capacity), dtype=torch.int64, device=device)
    _score(queries, threshold, candidate, held, None, capacity)
    here = (indices.shape[-1], queries.first // queries.block, indices.shape[2])
    results = (indices.data_ptr(), count.data_ptr(), failed.data_ptr())
    shared = 4 * (Tk // 32 + 1 + indices.shape[-1])
    _after(queries, "select_candidates", shared)((queries.rows, B), THREADS, Select(
        candidate.data_ptr(), held.data_ptr(), *results, queries.row(), capacity, k, *here
    ))  # fmt: skip
    if sampled:
        scores = torch.empty((RESCUERS, Tk), dtype=torch.float32, device=device)
        _after(queries, "rescue_rows")((RESCUERS,), THREADS, Rescue(
            *queries.inputs(), scores.data_ptr(), *results, *queries.strides(), queries.row(), Tk, k, *here,
            *queries.qi.shape[1::2], queries.sink, queries.recent,
        ))  # fmt: skip


def _full(queries: Queries) -> Tensor:
    return torch.full((queries.qi.shape[0], queries.rows), ANY, dtype=torch.int64, device=queries.qi.device)


def _thresholds(queries: Queries, k: int, capacity: int) -> Tensor:
    """int64 `[B, rows]`: the rank that each row's candidates reach, from samples that are made a piece at a time."""
    B, H, _, D = queries.qi.shape
    columns, parts = _columns(H, D, queries.w is not None, queries.block), []
    at_once = _pieces(workspace.size(), 4 * B * queries.samples, queries.block, columns)
    for first in range(queries.first, queries.stop, at_once):
        piece = replace(queries, first=first, stop=min(queries.stop, first + at_once))
        parts.append(threshold := _full(piece))
        sample = torch.empty((B, piece.rows, piece.samples), dtype=torch.float32, device=queries.qi.device)
        _score(piece, threshold, None, None, sample, capacity)
        place = _place(k, _stride(queries.block))
        _after(piece, "estimate_thresholds")((piece.rows, B), THREADS, Estimate(
            sample.data_ptr(), threshold.data_ptr(), piece.row(), piece.samples, place, capacity
        ))  # fmt: skip
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _score(queries: Queries, threshold: Tensor, candidate, held, sample, capacity: int) -> None:
    """Fills `sample`, or where that is None, candidates and their number."""
    B, H, _, D = queries.qi.shape
    sampling, weighted, block = sample is not None, queries.w is not None, queries.block
    columns, slots = (choose(H, D, weighted, block) for choose in (_columns, _slots))
    # of weights, or of floors where there is one head without them; of counts or of starts
    by_column = 4 * columns * ((H if weighted else int(queries.shift is not None and H == 1)) + 1)
    shared = (KEYS * slots + H * columns) * D * 2 + by_column + 8 * (2 * slots + 1)
    macros = dict(
        BF16=int(queries.qi.dtype == torch.bfloat16), STRIDE=_stride(block), DIM=D, HEADS=H, WEIGHTED=int(weighted),
        COLUMNS=columns, BSEL=block, SLOTS=slots, SAMPLE=int(sampling),
        NORMAL=int(queries.shift is not None),
    )  # fmt: skip
    name = "sample_scores" if sampling else "filter_scores"
    run = nvrtc.kernel("index_scores/hopper.cu", name, tuple(macros.items()), shared, queries.qi.device.index)
    tiles, total = -(-(queries.stop - queries.first) // columns), queries.samples if sampling else queries.end
    segment = total if block == 1 and not sampling else _segment(tiles * B, total, processors(queries.qi.device))
    pointers = (0 if tensor is None else tensor.data_ptr() for tensor in (candidate, held, sample))
    run((-(-total // segment), tiles, B), 384, Score(
        *queries.inputs(), threshold.data_ptr(), *pointers, *queries.strides(), queries.stop, queries.offset, queries.rows,
        queries.first, segment, capacity, queries.samples, queries.sink, queries.recent,
    ))  # fmt: skip


def _after(queries: Queries, name: str, shared_bytes: int = 0):
    macros = (("BF16", int(queries.qi.dtype == torch.bfloat16)), ("STRIDE", _stride(queries.block)), ("THREADS", THREADS))
    return nvrtc.kernel("index_scores/candidates.cu", name, macros, shared_bytes, queries.qi.device.index)


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
