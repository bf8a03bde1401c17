"""The exact end of a prompt: its last queries attend densely, whichever chunk holds them (`Budget.exact_last`).

The next token is read from the prompt's last positions. A few dense rows there cost `exact_last` / S of dense attention.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import ops
from .budget import Budget
from .models.forward import ForwardContext
from .ops.select_two_level.blocks import group_size
from .ops.slices import upto
from .selectors import LayerInputs


@dataclass(frozen=True, eq=False)
class ExactEnd:
    """The exact rows of one layer in one forward.

    Attributes:
        positions: int32 `[B, R]`: where they stand among the keys, -1 for a row that is none (a shorter sequence has fewer).
        first: the first of this forward's queries that is exact in every sequence, and with it all after it; None where
            sequences end at different places.
    """

    positions: Tensor
    first: int | None

    def left(self, inputs: LayerInputs, budget: Budget) -> LayerInputs | None:
        """The queries that selection and sparse attention still serve: those up to the end of the last block with a query that is
        not exact; None where there is none.

        Exact rows that share a block with others take part in its selection, as they would without an exact end.
        """
        if self.first is None:
            return inputs
        together = group_size(budget.block) if budget.candidates else budget.block  # queries that select together
        queries = inputs.q.shape[2]
        kept = min(queries, -(-self.first // together) * together)
        if kept in (0, queries):
            return inputs if kept else None
        keys = inputs.k.shape[2] - queries + kept
        index = inputs.index
        if index is not None:
            qi, ki, w = index
            index = (upto(qi, kept, 2), upto(ki, keys, 1), None if w is None else upto(w, kept, 1))
        return replace(
            inputs, q=upto(inputs.q, kept, 2), k=upto(inputs.k, keys, 2), v=upto(inputs.v, keys, 2), index=index,
            valid=None if inputs.valid is None else upto(inputs.valid, keys, 1),
            partition=None if inputs.partition is None else upto(inputs.partition, kept, 1),
        )  # fmt: skip

    def over(self, out: Tensor | None, inputs: LayerInputs) -> Tensor:
        """`[B, Hq, Tq, Dv]`: dense attention in the exact rows, and `out`, that of the queries `left`, in all others."""
        q, k, v = inputs.q, inputs.k, inputs.v
        options = dict(scale=inputs.scale, valid=inputs.valid, impl=inputs.impl)
        if self.first is not None:
            dense = ops.dense_rows(q.narrow(2, self.first, q.shape[2] - self.first), k, v, self.positions, **options)
            if out is None:
                return dense
            return torch.cat([upto(out.transpose(1, 2), self.first, 1), dense.transpose(1, 2)], 1).transpose(1, 2)
        rows = (self.positions - (k.shape[2] - q.shape[2])).clamp(min=0).long()[:, None, :, None]  # [B, 1, R, 1]
        chosen = q.gather(2, rows.expand(-1, q.shape[1], -1, q.shape[3]))
        dense = ops.dense_rows(chosen, k, v, self.positions, **options)  # [B, Hq, R, Dv]
        place = torch.where(self.positions[:, None, :, None] >= 0, rows, q.shape[2])  # unused rows go to a place that is cut off
        wide = torch.cat([out, out[:, :, :1]], 2)
        return wide.scatter(2, place.expand(-1, out.shape[1], -1, out.shape[3]), dense)[:, :, :-1]


def exact_end(inputs: LayerInputs, forward: ForwardContext, budget: Budget) -> ExactEnd | None:
    """The exact rows among the queries of this forward that run sparse; None where it has none.

    A sequence ends with its last valid token, or at the prompt's length that the caller gave where that lies in a later chunk.
    """
    if not budget.exact_last:
        return None
    queries, end = inputs.q.shape[2], inputs.k.shape[2]
    whole = forward.length if forward.prompt_length is None else forward.prompt_length
    device, B = inputs.q.device, inputs.q.shape[0]
    if inputs.valid is None:
        first = max(0, whole - budget.exact_last - (end - queries))
        if first >= queries:
            return None
        rows = end - queries + first, end, B
        if rows not in forward.positions:  # the same for all layers
            positions = torch.arange(*rows[:2], dtype=torch.int32, device=device)
            forward.positions[rows] = positions.expand(B, -1)
        return ExactEnd(forward.positions[rows], first)
    place = torch.arange(end, device=device)
    last = torch.where(inputs.valid, place + 1, 0).amax(1, keepdim=True)  # [B, 1]: where each sequence ends, so far
    length = torch.where(inputs.valid[:, -1:], whole, last)
    rows = min(budget.exact_last, queries)
    positions = length.clamp(max=end) - rows + torch.arange(rows, device=device)  # [B, R]
    held = (positions >= (length - budget.exact_last).clamp(min=end - queries)) & (positions < end)
    return ExactEnd(torch.where(held, positions, -1).int(), None)
