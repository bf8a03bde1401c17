"""select_by_index on Hopper in CUDA C++ (hopper.cu, candidates.cu): scores that cannot be among a row's k best are never written.

A sixteenth of the keys is scored first (a 32nd where every query selects for itself). The score in a certain place among these is
a threshold that more than k keys reach, but not many more, with odds of about a million to one; the second pass scores all
keys and keeps those. The k best of the kept are the k best of all. Rows whose threshold was too high or too low are counted on
the device and selected by another kernel, so the result is exact and nothing waits for the host.
"""

import math

import torch
from torch import Tensor

from .. import nvrtc
from ..hopper import is_hopper, is_readable, processors

BLOCKS = (1, 16, 32, 64, 128)
SHARED_BYTES = 232448
KEYS = 128  # of a step
DEVIATIONS = 5.0
ANY = 0x007FFFFF << 32  # the threshold that every visible key reaches
THREADS = 256
RESCUERS = 32
WORKSPACE_BYTES = 1 << 30  # samples and candidates alive at once

Score = nvrtc.structure(
    "Score",
    **dict.fromkeys(("q", "k", "w", "threshold", "candidate", "held", "sample"), "p"),
    **dict.fromkeys(("q_b", "q_h", "q_t", "k_b", "k_t", "w_b", "w_t", "w_h"), "q"),
    **dict.fromkeys(("queries", "offset", "rows", "first_query", "segment", "capacity", "samples", "sink", "recent"), "i"),
)
Row = nvrtc.structure("Row", **dict.fromkeys(("queries", "offset", "rows", "first_query", "block"), "i"))
Estimate = nvrtc.structure(
    "Estimate", sample="p", threshold="p", row=Row, **dict.fromkeys(("samples", "place", "capacity"), "i")
)
Finish = nvrtc.structure(
    "Finish",
    **dict.fromkeys(("candidate", "held", "indices", "count", "failed"), "p"),
    row=Row,
    **dict.fromkeys(("capacity", "k", "width", "first_row", "all_rows"), "i"),
)
Rescue = nvrtc.structure(
    "Rescue",
    **dict.fromkeys(("q", "k", "w", "scores", "indices", "count", "failed"), "p"),
    **dict.fromkeys(("q_b", "q_h", "q_t", "k_b", "k_t", "w_b", "w_t", "w_h"), "q"),
    row=Row,
    **dict.fromkeys(("keys", "k_best", "width", "first_row", "all_rows", "heads", "dim", "sink", "recent"), "i"),
)


def serves(qi: Tensor, ki: Tensor, w: Tensor | None, k: int, block: int, reduce: str, sink: int, recent: int, valid) -> bool:
    """Whether the kernels take these tensors; what they do not take is scored and selected by slices."""
    if not (is_hopper(qi.device) and block in BLOCKS and reduce == "max" and valid is None):
        return False
    if qi.shape[-1] not in (64, 128, 256) or not is_readable(qi) or not is_readable(ki):
        return False
    room = 4 * (ki.shape[1] // 32 + 1 + k) + 8400  # of one row's selection: a bit for every key, k keys, and a histogram
    return _slots(qi.shape[1], qi.shape[-1], w is not None, block) >= 2 and room <= SHARED_BYTES


def select_by_index(qi, ki, w, k: int, block: int, reduce: str, sink: int, recent: int, valid) -> tuple[Tensor, Tensor]:
    B, _, Tq, _ = qi.shape
    Tk, rows = ki.shape[1], -(-Tq // block)
    indices = torch.empty((B, 1, rows, min(k, Tk)), dtype=torch.int32, device=qi.device)
    count = torch.empty((B, 1, rows), dtype=torch.int32, device=qi.device)
    capacity = _capacity(k, sink, recent, block)
    samples = -(-Tk // _stride(block)) if Tk > capacity else 0
    columns = _columns(qi.shape[1], qi.shape[-1], w is not None, block)
    at_once = WORKSPACE_BYTES // (B * (8 * capacity + 4 * samples)) * block // columns * columns  # queries, whole tiles
    if block == 1:  # every tile of queries is one block of threads: all of them at once, or as many as there are processors
        at_once = min(at_once, processors(qi.device) * columns)
    at_once = max(columns, at_once)
    for first in range(0, Tq, at_once):
        stop = min(Tq, first + at_once)
        _select(qi, ki, w, indices, count, k, block, sink, recent, capacity, columns, first, stop)
    return indices, count


def _select(qi, ki, w, indices, count, k, block, sink, recent, capacity, columns, first, stop):
    B, H, Tq, D = qi.shape
    offset, device, index = ki.shape[1] - Tq, qi.device, qi.device.index
    end, rows, width = offset + stop, -(-(stop - first) // block), indices.shape[-1]  # no query sees a key from `end` on
    stride = _stride(block)
    samples = -(-end // stride) if end > capacity else 0
    tiles = -(-(stop - first) // columns)
    bf16 = ("BF16", int(qi.dtype == torch.bfloat16))
    weighted = w is not None
    counters = torch.zeros(B * rows * 2 + 1, dtype=torch.int32, device=device)
    held, failed = counters[: B * rows], counters[B * rows :]
    candidate = torch.empty((B, rows, capacity), dtype=torch.int64, device=device)
    threshold = torch.full((B, rows), ANY, dtype=torch.int64, device=device)
    strides = (*qi.stride()[:3], *ki.stride()[:2], *(w.stride() if weighted else (0, 0, 0)))
    inputs = (qi.data_ptr(), ki.data_ptr(), w.data_ptr() if weighted else 0)
    row = Row(stop, offset, rows, first, block)

    def score(sampling: bool, sample):
        slots = _slots(H, D, weighted, block)
        shared = (KEYS * slots + H * columns) * D * 2 + (4 * H * columns if weighted else 0) + 4 * columns + 8 * (2 * slots + 1)
        macros = dict(
            STRIDE=stride, DIM=D, HEADS=H, WEIGHTED=int(weighted), COLUMNS=columns, BSEL=block, SLOTS=slots,
            SAMPLE=int(sampling),
        )  # fmt: skip
        name = "sample_scores" if sampling else "filter_scores"
        run = nvrtc.kernel("index_scores/hopper.cu", name, (bf16, *macros.items()), shared, index)
        total = samples if sampling else end
        segment = total if block == 1 and not sampling else _segment(tiles * B, total, processors(device))
        run((-(-total // segment), tiles, B), 384, Score(
            *inputs, threshold.data_ptr(), candidate.data_ptr(), held.data_ptr(), 0 if sample is None else sample.data_ptr(),
            *strides, stop, offset, rows, first, segment, capacity, samples, sink, recent,
        ))  # fmt: skip

    def after(name: str, shared_bytes: int = 0):
        macros = (bf16, ("STRIDE", stride), ("THREADS", THREADS))
        return nvrtc.kernel("index_scores/candidates.cu", name, macros, shared_bytes, index)

    if samples:
        sample = torch.empty((B, rows, samples), dtype=torch.float32, device=device)
        score(True, sample)
        after("estimate_thresholds")((rows, B), THREADS, Estimate(
            sample.data_ptr(), threshold.data_ptr(), row, samples, _place(k, stride), capacity
        ))  # fmt: skip
    score(False, None)
    here = (width, first // block, indices.shape[2])
    results = (indices.data_ptr(), count.data_ptr(), failed.data_ptr())
    after("select_candidates", 4 * (ki.shape[1] // 32 + 1 + width))((rows, B), THREADS, Finish(
        candidate.data_ptr(), held.data_ptr(), *results, row, capacity, k, *here
    ))  # fmt: skip
    if samples:
        scores = torch.empty((RESCUERS, ki.shape[1]), dtype=torch.float32, device=device)
        after("rescue_rows")((RESCUERS,), THREADS, Rescue(
            *inputs, scores.data_ptr(), *results, *strides, row, ki.shape[1], k, *here, H, D, sink, recent
        ))  # fmt: skip


def _stride(block: int) -> int:
    """Keys that one sampled key stands for."""
    return 32 if block == 1 else 16


def _place(k: int, stride: int) -> int:
    """The place among the sample, from the largest, whose score more than k keys reach."""
    expected = k / stride
    return math.ceil(expected + DEVIATIONS * math.sqrt(expected) + 2)


def _capacity(k: int, sink: int, recent: int, block: int) -> int:
    """Candidates that a row can hold: more than reach a threshold at `_place`, and the keys that are always kept."""
    place, stride = _place(k, _stride(block)), _stride(block)
    kept = sink + (recent + block if recent else 0)
    return -(-(math.ceil((place + DEVIATIONS * math.sqrt(place) + 2) * stride) + kept) // 64) * 64


def _columns(heads: int, dim: int, weighted: bool, block: int) -> int:
    """Queries of a tile."""
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
