"""The two levels, one after the other, by slices of queries; each back-end brings its own scoring functions."""

from collections.abc import Callable

from torch import Tensor

from ...support import Support, concatenate
from ..select_tokens.op import select_tokens
from ..slices import slices
from .blocks import blocks_scored, group_size, sink_blocks


def two_levels(
    qi: Tensor, ki: Tensor, w: Tensor | None, k: int, candidates: int, key_block: int, block: int, reduce: str, sink: int,
    recent: int, valid: Tensor | None, partition: Tensor | None, *, impl: str, block_bounds: Callable, block_scores: Callable,
    candidate_scores: Callable, keys_of_slots: Callable,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`(indices [B, 1, Nq, K], count [B, 1, Nq])` of the operator, its scores by these functions and its choices by `impl`."""
    B, _, Tq, _ = qi.shape
    Tk = ki.shape[1]
    group = group_size(block)
    Nc, W = -(-Tk // key_block), blocks_scored(Tk, candidates, key_block, block, sink, recent)
    bounds, sinks = block_bounds(ki, key_block, valid), sink_blocks(B, Tk, key_block, sink, valid, ki.device)
    parts = []
    for start, stop in slices(Tq, B * max(Nc, group // block * W * key_block), group):
        position = Tk - Tq + start
        queries, (weights, own) = qi[:, :, start:stop], (None if x is None else x[:, start:stop] for x in (w, partition))
        scores = block_scores(queries, bounds, weights, sinks, position, key_block, group, recent, valid, own)  # [B, Ng, Nc]
        best = select_tokens(scores.view(-1, 1, 1, Nc), k=W, queries=1, impl=impl)
        chosen, held = best.indices.view(B, -1, W), best.count.view(B, -1)
        scores = candidate_scores(
            queries, ki, weights, chosen, held, position, key_block, block, group, reduce, sink, recent, valid, own
        )  # [B, rows, W * key_block]
        best = select_tokens(scores.view(-1, 1, 1, W * key_block), k=min(k, Tk), queries=1, impl=impl)
        slots, count = best.indices.view(B, scores.shape[1], -1), best.count.view(B, 1, -1)
        parts.append(Support(keys_of_slots(slots, count, chosen, key_block, group // block)[:, None], count, block))
    whole = concatenate(parts)
    return whole.indices, whole.count
