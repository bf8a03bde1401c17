"""select_two_level: the top-k of index scores where only the best blocks of keys are scored key by key."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from ...budget import BLOCKS, KEY_BLOCKS
from ...support import Support
from .. import dispatch
from ..checks import check_counts, check_scoring
from ..index_scores.op import select_by_index
from .blocks import blocks_scored
from .reference import select_two_level as reference


def _fake(qi, ki, w, k, candidates, key_block, block, reduce, sink, recent, valid, partition):
    rows = (qi.shape[0], 1, (qi.shape[2] + block - 1) // block)
    return qi.new_empty((*rows, min(k, ki.shape[1])), dtype=torch.int32), qi.new_empty(rows, dtype=torch.int32)


dispatch.define(
    "select_two_level",
    "(Tensor qi, Tensor ki, Tensor? w, int k, int candidates, int key_block, int block, str reduce, int sink, int recent, "
    "Tensor? valid, Tensor? partition) -> (Tensor, Tensor)",
    reference,
    _fake,
    devices=("cuda",),
)


def select_two_level(
    qi: Tensor,
    ki: Tensor,
    w: Tensor | None = None,
    *,
    k: int,
    candidates: int,
    key_block: int = 64,
    block: int = 1,
    reduce: str = "max",
    sink: int = 0,
    recent: int = 0,
    valid: Tensor | None = None,
    partition: Tensor | None = None,
    impl: str = "auto",
    stage: Callable = lambda name: nullcontext(),
) -> Support:
    """The Support of the k best keys of every row among those in the best key blocks: `select_by_index` for
    O(Tq Tk / key_block + Tq candidates) products.

    First level: `max(block, 64)` queries in a row, a group, rank the key blocks before them. A block scores the largest over
    the group's queries t of `sum_h w[t, h] ReLU(<q+, a> + <q-, b>)`, where q+ and q- are the positive and negative parts of
    `qi[t, h]`, and a and b lie per channel half way from the mean of the block's keys to their maximum and minimum. Second
    level: the keys of the best blocks are scored as `index_scores` does and the k best chosen as `select_tokens` does; "mean"
    normalises over the keys that are scored. "softmax_max" subtracts each query's `partition` in both levels, even with `block`
    1, because a group shares its candidates in any case. `partition` must be given: the exact one would need all scores, which
    two levels avoid.

    The best blocks hold at least `candidates` keys (or all there are) that compete by score. The blocks of the first valid
    keys, of the group itself and of its recent keys always belong; where padding lies among the sinks, those beyond
    `(sink + key_block - 2) // key_block + 1` blocks may not. Where every block would belong, this is `select_by_index`.

    Args:
        candidates: at least k.
        key_block: 16, 32, 64 or 128 keys, counted from key 0, padding included.
        block: queries per row, a power of two up to 128.
        partition: float32 `[B, Tq]`, of "softmax_max" and no other.
        Others as in `select_by_index`; the operator is the stage "scoring" as a whole.
    """
    check_scoring(qi, ki, w, block, reduce, valid, partition)
    if reduce == "softmax_max" and partition is None:
        raise ValueError("partition must be given for softmax_max in two levels, got None")
    Tk = ki.shape[1]
    check_counts(k, sink, recent, block, Tk)
    for name, value, allowed in (("block", block, BLOCKS), ("key_block", key_block, KEY_BLOCKS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value}")
    if candidates < k:
        raise ValueError(f"candidates must hold the k keys chosen of them ({k}), got {candidates}")
    if blocks_scored(Tk, candidates, key_block, block, sink, recent) * key_block >= Tk:
        return select_by_index(
            qi, ki, w, k=k, block=block, reduce=reduce, sink=sink, recent=recent, valid=valid, partition=partition,
            impl=impl, stage=stage,
        )  # fmt: skip
    with stage("scoring"):
        indices, count = dispatch.call(
            "select_two_level", impl, qi.device.type, qi, ki, w, k, candidates, key_block, block, reduce, sink, recent, valid,
            partition,
        )  # fmt: skip
    return Support(indices, count, block)
