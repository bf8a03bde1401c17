"""index_scores: the indexer's score of every key, and its fusion with select_tokens in bounded memory."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from ...support import Support, concatenate
from .. import dispatch
from ..checks import check_counts, check_scoring
from ..select_tokens.op import select_tokens
from ..slices import slices
from . import reference


def _fake(qi, ki, w, block, reduce, valid, partition):
    return qi.new_empty((qi.shape[0], (qi.shape[2] + block - 1) // block, ki.shape[1]), dtype=torch.float32)


dispatch.define(
    "index_scores",
    "(Tensor qi, Tensor ki, Tensor? w, int block, str reduce, Tensor? valid, Tensor? partition) -> Tensor",
    reference.index_scores,
    _fake,
)
dispatch.define(
    "index_partition",
    "(Tensor qi, Tensor ki, Tensor? w, Tensor? valid) -> Tensor",
    reference.index_partition,
    lambda qi, ki, w, valid: qi.new_empty((qi.shape[0], qi.shape[2]), dtype=torch.float32),
    folder="index_scores",
)


def index_scores(
    qi: Tensor,
    ki: Tensor,
    w: Tensor | None = None,
    *,
    block: int = 1,
    reduce: str = "max",
    valid: Tensor | None = None,
    partition: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The indexer's score of every key for every block of queries, float32 `[B, ceil(Tq / block), Tk]`.

    `z[t, s] = sum_h w[t, h] ReLU(<qi[t, h], ki[s]> / sqrt(Di))` (one head without weights: arXiv 2606.07703, "Indexer";
    several with weights: arXiv 2606.22874), reduced over the block's queries t >= s: "max" takes the largest z, "mean" the
    mean of softmax_{s <= t}(z[t]), "softmax_max" the largest `z[t, s] - c[t]` with each query's own log-partition c, which is
    the logarithm of its largest softmax weight where c is exact. Keys that no query of the block sees score -inf; a padding query
    sees nothing. A score computed from NaN is NaN; where scores are normalised, so are all scores of that query.

    Args:
        qi: `[B, Hi, Tq, Di]` index queries after rotary embedding, the last Tq of Tk positions; fp16, bf16 or fp32.
        ki: `[B, Tk, Di]` index keys, one head.
        w: `[B, Tq, Hi]` head weights, or None for ones.
        valid: bool `[B, Tk]`, False for padding.
        partition: float32 `[B, Tq]`, the c of "softmax_max"; None = the exact one, by `index_partition`. Subtracted in fp32.
        impl: "auto", "reference" or "kernel". Products accumulate in fp32; the reference then rounds each z to the input
            dtype, as `torch.matmul` does.
    """
    check_scoring(qi, ki, w, block, reduce, valid, partition)
    if reduce == "softmax_max" and partition is None:
        partition = index_partition(qi, ki, w, valid=valid, impl=impl)
    return dispatch.call("index_scores", impl, qi.device.type, qi, ki, w, block, reduce, valid, partition)


def index_partition(
    qi: Tensor, ki: Tensor, w: Tensor | None = None, *, valid: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Every query's log-partition `log sum_{s <= t} exp(z[t, s])` of its index scores, float32 `[B, Tq]`; -inf where it sees
    nothing. Scores are streamed and never kept. Arguments as in `index_scores`."""
    check_scoring(qi, ki, w, 1, "max", valid, None)
    return dispatch.call("index_partition", impl, qi.device.type, qi, ki, w, valid)


def _fake_selection(qi, ki, w, k, block, reduce, sink, recent, valid, partition):
    rows = (qi.shape[0], 1, (qi.shape[2] + block - 1) // block)
    return qi.new_empty((*rows, min(k, ki.shape[1])), dtype=torch.int32), qi.new_empty(rows, dtype=torch.int32)


def _selection_reference(qi, ki, w, k, block, reduce, sink, recent, valid, partition):
    support = select_by_slices(qi, ki, w, k, block, reduce, sink, recent, valid, partition, "reference")
    return support.indices, support.count


dispatch.define(
    "select_by_index",
    "(Tensor qi, Tensor ki, Tensor? w, int k, int block, str reduce, int sink, int recent, Tensor? valid, Tensor? partition)"
    " -> (Tensor, Tensor)",
    _selection_reference,
    _fake_selection,
    folder="index_scores",
)


def select_by_index(
    qi: Tensor,
    ki: Tensor,
    w: Tensor | None = None,
    *,
    k: int,
    block: int = 1,
    reduce: str = "max",
    sink: int = 0,
    recent: int = 0,
    valid: Tensor | None = None,
    partition: Tensor | None = None,
    impl: str = "auto",
    stage: Callable = lambda name: nullcontext(),
) -> Support:
    """The Support of `select_tokens(index_scores(...))` in bounded memory: O(Tq k) and one workspace.

    The kernels for Ascend and Hopper never write all scores out: one keeps a running top-k, the other writes only scores above a
    threshold. Elsewhere the two operators run by slices of queries.

    Subtracting one number from a whole row changes no order. With `block` 1, "softmax_max" is therefore "max", and no
    log-partition is read.

    Arguments are as in `index_scores` and `select_tokens`; `stage(name)` is a context manager around "scoring" and "top-k". A
    fused kernel counts as "scoring" as a whole.
    """
    check_scoring(qi, ki, w, block, reduce, valid, partition)
    check_counts(k, sink, recent, block, ki.shape[1])
    device_type = qi.device.type
    if reduce == "softmax_max" and block == 1:
        reduce, partition = "max", None
    if reduce == "softmax_max" and partition is None:
        with stage("scoring"):
            partition = index_partition(qi, ki, w, valid=valid, impl=impl)
    if not dispatch.uses_kernel(impl, device_type):
        return select_by_slices(qi, ki, w, k, block, reduce, sink, recent, valid, partition, impl, stage)
    with stage("scoring"):
        indices, count = dispatch.call(
            "select_by_index", impl, device_type, qi, ki, w, k, block, reduce, sink, recent, valid, partition
        )
    return Support(indices, count, block)


def select_by_slices(
    qi, ki, w, k, block, reduce, sink, recent, valid, partition, impl, stage=lambda name: nullcontext()
) -> Support:
    B, _, Tq, _ = qi.shape
    Tk = ki.shape[1]
    parts = []
    for start, stop in slices(Tq, B * Tk, block):
        end = Tk - Tq + stop
        seen = None if valid is None else valid[:, :end]
        weights, own = (None if x is None else x[:, start:stop] for x in (w, partition))
        with stage("scoring"):
            scores = index_scores(
                qi[:, :, start:stop], ki[:, :end], weights, block=block, reduce=reduce, valid=seen, partition=own, impl=impl
            )
        with stage("top-k"):
            parts.append(select_tokens(
                scores, k=k, sink=sink, recent=recent, block=block, queries=stop - start, valid=seen, impl=impl
            ))  # fmt: skip
    return concatenate(parts)
