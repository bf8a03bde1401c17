"""Selectors: they decide which keys a block of queries reads."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import ops
from .budget import Budget
from .indexer import AdapterError
from .indexer import Indexer as _Indexer
from .ops.masks import visible_to_block
from .ops.slices import slices
from .support import Support, concatenate


@dataclass(frozen=True)
class LayerInputs:
    """What one full-attention layer offers a selector.

    Attributes:
        layer: decoder layer index.
        q: `[B, Hq, Tq, D]`, k: `[B, Hkv, Tk, D]`, v: `[B, Hkv, Tk, Dv]`, rotated; queries are the last Tq of Tk positions.
        scale: score scale.
        valid: bool `[B, Tk]`, False for padding, or None.
        index: `(qi [B, Hi, Tq, Di], ki [B, Tk, Di], w [B, Tq, Hi] or None)` for selectors with an indexer, else None.
        partition: float32 `[B, Tq]` learned log-partitions of the index scores where `learns_partition` says so, else None.
        impl: which operators run: "auto", "reference" or "kernel".
        stage: `stage(name)` is a context manager around each stage, for timing.
        note: `note(what, finite)` is told, by a bool tensor, whether what a selection is made from is finite.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    valid: Tensor | None = None
    index: tuple[Tensor, Tensor, Tensor | None] | None = None
    impl: str = "auto"
    stage: Callable = lambda name: nullcontext()
    partition: Tensor | None = None
    note: Callable = lambda what, finite: None


class Selector(Protocol):
    """Chooses a Support for one layer."""

    name: str
    evidence: str  # "oracle", "distilled", "untrained", "training-free" or "control": never mixed in a table without saying which
    indexer: _Indexer | None  # hidden states are projected with it and handed over as LayerInputs.index

    def select(self, inputs: LayerInputs, budget: Budget) -> Support: ...


class Oracle:
    """Top-k of dense attention mass itself: what a budget and a granularity could achieve (evidence: oracle).

    Mass is each query's own softmax already, so that "softmax_max" is "max".

    `per_kv` selects for each KV group on its own and not for all heads together.
    """

    evidence, indexer = "oracle", None

    def __init__(self, per_kv: bool = False):
        self.per_kv = per_kv
        self.name = "oracle per KV group" if per_kv else "oracle"

    def select(self, inputs: LayerInputs, budget: Budget) -> Support:
        reduce = "max" if budget.reduce == "softmax_max" else budget.reduce

        def mass(start, stop, end, valid):
            return ops.attention_mass(
                inputs.q[:, :, start:stop], inputs.k[:, :, :end], scale=inputs.scale, reduce_block=budget.block,
                reduce=reduce, per_kv=self.per_kv, valid=valid, impl=inputs.impl,
            )  # fmt: skip

        return select_by_scores(inputs, budget, mass, heads=inputs.k.shape[1] if self.per_kv else 1)


class ByIndexer:
    """Top-k of an indexer's scores (evidence: distilled or untrained, as the adapter says), in one level or two."""

    def __init__(self, indexer: _Indexer):
        self.indexer = indexer
        self.evidence = indexer.evidence
        self.name = "indexer"

    def select(self, inputs: LayerInputs, budget: Budget) -> Support:
        qi, ki, w = inputs.index
        options = dict(
            k=budget.k_for(ki.shape[1], inputs.layer), block=budget.block, reduce=budget.reduce, sink=budget.sink,
            recent=budget.recent, valid=inputs.valid, partition=inputs.partition, impl=inputs.impl, stage=inputs.stage,
        )  # fmt: skip
        if budget.candidates:
            return ops.select_two_level(qi, ki, w, candidates=budget.candidates, key_block=budget.key_block, **options)
        return ops.select_by_index(qi, ki, w, **options)


Indexer = ByIndexer  # its first name, which is also that of what it selects by


def learns_partition(budget: Budget, indexer: _Indexer | None) -> bool:
    """Whether this budget reads log-partitions that this indexer's partition heads predict.

    It does not where every query selects for itself, as a log-partition then changes no order, unless a group shares candidates.
    Raises AdapterError where the budget asks for what the indexer does not have, ValueError for exact ones with candidates.
    """
    if indexer is None or budget.reduce != "softmax_max" or (budget.block == 1 and not budget.candidates):
        return False
    head = indexer.config.partition
    if budget.partition == "learned" and not head:
        raise AdapterError(
            "partition must be auto or exact for an adapter without a partition head, got learned: distil it again to get one"
        )
    learned = budget.partition == "learned" or (budget.partition == "auto" and head)
    if budget.candidates and not learned:
        raise ValueError(
            "partition must be learned by the adapter for softmax_max with candidates, where the exact one would take the scores "
            f"of all keys, got {budget.partition} for an adapter {'with' if head else 'without'} a partition head"
        )
    return learned


class Local:
    """The control at equal budget: sinks, and the most recent keys with all the rest of k (evidence: control).

    It has no scores to reduce: Budget.reduce changes nothing.
    """

    evidence, indexer = "control", None

    def __init__(self, sink: int = 4):
        self.sink = sink
        self.name = f"sink {sink} + recent"

    def select(self, inputs: LayerInputs, budget: Budget) -> Support:
        def recency(start, stop, end, valid):
            position = torch.arange(end, dtype=torch.float32, device=inputs.q.device)
            return position.expand(inputs.q.shape[0], 1, _blocks(stop - start, budget), end).clone()

        return select_by_scores(inputs, budget.replace(sink=self.sink, recent=0), recency)


class Random:
    """The weakest control: uniformly random visible keys, the same for the same seed (evidence: control).

    A block draws one row, so that Budget.reduce changes nothing.
    """

    name, evidence, indexer = "random", "control", None

    def __init__(self, seed: int = 0):
        self.seed = seed

    def select(self, inputs: LayerInputs, budget: Budget) -> Support:
        def noise(start, stop, end, valid):
            generator = torch.Generator().manual_seed((self.seed * 1009 + inputs.layer) * 1_000_003 + start)
            shape = (inputs.q.shape[0], 1, _blocks(stop - start, budget), end)
            return torch.rand(shape, generator=generator).to(inputs.q.device)

        return select_by_scores(inputs, budget, noise)


class Dense:
    """Every visible key through the sparse path: for tests, and for the path's own rounding noise."""

    name, evidence, indexer = "dense", "dense", None

    def select(self, inputs: LayerInputs, budget: Budget) -> Support:
        def nothing(start, stop, end, valid):
            return torch.zeros(inputs.q.shape[0], 1, _blocks(stop - start, budget), end, device=inputs.q.device)

        return select_by_scores(inputs, budget.replace(k=inputs.k.shape[2], per_layer={}, sink=0, recent=0), nothing)


def _blocks(queries: int, budget: Budget) -> int:
    return -(-queries // budget.block)


def select_by_scores(inputs: LayerInputs, budget: Budget, score, heads: int = 1) -> Support:
    """The Support of `score(start, stop, end, valid)` -> `[B, heads, Nq, end]`, by slices of queries."""
    B, Tq, Tk = inputs.q.shape[0], inputs.q.shape[2], inputs.k.shape[2]
    parts = []
    for start, stop in slices(Tq, B * heads * Tk, budget.block):
        end = Tk - Tq + stop
        valid = None if inputs.valid is None else inputs.valid[:, :end]
        with inputs.stage("scoring"):
            scores = score(start, stop, end, valid)
            visible = visible_to_block(stop - start, end, budget.block, valid, scores.device)
            scores.masked_fill_(~visible[:, None], float("-inf"))
            inputs.note("scores", scores.amax() < float("inf"))  # NaN is not
        with inputs.stage("top-k"):
            parts.append(ops.select_tokens(
                scores, k=budget.k_for(Tk, inputs.layer), sink=budget.sink, recent=budget.recent, block=budget.block,
                queries=stop - start, valid=valid, impl=inputs.impl,
            ))  # fmt: skip
    return concatenate(parts)
