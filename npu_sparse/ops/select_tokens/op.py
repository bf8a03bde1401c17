"""select_tokens: the top-k keys of every row of scores, as a Support."""

import torch
from torch import Tensor

from ...support import Support
from .. import dispatch
from ..checks import check_counts, check_tensor
from .reference import select_tokens as reference


def _fake(scores, k, sink, recent, block, queries, valid):
    B, Hs, Nq, Tk = scores.shape
    indices = scores.new_empty((B, Hs, Nq, min(k, Tk)), dtype=torch.int32)
    return indices, scores.new_empty((B, Hs, Nq), dtype=torch.int32)


dispatch.define(
    "select_tokens",
    "(Tensor scores, int k, int sink, int recent, int block, int queries, Tensor? valid) -> (Tensor, Tensor)",
    reference,
    _fake,
)


def select_tokens(
    scores: Tensor,
    *,
    k: int,
    sink: int = 0,
    recent: int = 0,
    block: int = 1,
    queries: int | None = None,
    valid: Tensor | None = None,
    impl: str = "auto",
) -> Support:
    """The Support of the k best keys of every row; ties go to the smaller position, so the result is deterministic.

    A score of +inf comes after the keys that are always kept, where `sink` or `recent` asks for some. A key whose score is NaN is
    not chosen, unless it is always kept.

    Args:
        scores: float32 `[B, Nq, Tk]` or `[B, Hs, Nq, Tk]`, -inf where no query of the block sees the key.
        k: keys per row, sinks and recent keys included; a row with fewer visible keys gets all of them.
        sink: the first `sink` valid keys always belong.
        recent: the last `recent` keys of every query of the block always belong.
        block: queries per row.
        queries: Tq, where the last block is ragged; None = `Nq * block` (or Tk, if that is fewer).
        valid: bool `[B, Tk]`, False for padding (scores there must be -inf); it says which keys are the first ones.
    """
    if not isinstance(scores, Tensor) or scores.ndim not in (3, 4):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"scores must have shape (B, Nq, Tk) or (B, Hs, Nq, Tk), got {shape}")
    if scores.ndim == 3:
        scores = scores[:, None]
    check_tensor("scores", scores, (None, None, None, None), (torch.float32,))
    B, _, Nq, Tk = scores.shape
    check_counts(k, sink, recent, block, Tk)
    if queries is None:
        queries = min(Nq * block, Tk)
    if Nq != -(-queries // block) or queries > Tk:
        raise ValueError(f"queries must fill {Nq} blocks of {block} and not exceed Tk = {Tk}, got {queries}")
    if valid is not None:
        check_tensor("valid", valid, (B, Tk), (torch.bool,), scores.device)
    indices, count = dispatch.call(
        "select_tokens", impl, scores.device.type, scores, k, sink, recent, block, queries, valid
    )
    return Support(indices, count, block)
