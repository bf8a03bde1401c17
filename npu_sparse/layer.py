"""One sparse layer of one forward, from queries, keys and values to its output; transformers and vLLM share it."""

from collections.abc import Callable

from torch import Tensor

from . import ops
from .budget import Budget
from .exact_end import exact_end
from .models.forward import ForwardContext
from .selectors import LayerInputs
from .support import Support


def attend_sparsely(
    inputs: LayerInputs,
    forward: ForwardContext,
    budget: Budget,
    support_of: Callable[[LayerInputs], Support],
    observe: Callable[[LayerInputs, Support, Tensor], None] | None = None,
) -> Tensor:
    """`[B, Hq, Tq, Dv]`: sparse attention of the queries by the support that `support_of` gives, dense in the exact rows.

    `support_of` and `observe` are called with the queries that are not exact. Where all are exact, they are not called.
    """
    end = exact_end(inputs, forward, budget)
    chosen = inputs if end is None else end.left(inputs, budget)
    out = None
    if chosen is not None:
        support = support_of(chosen)
        out = _attend(chosen, support, budget)
        if observe is not None:
            observe(chosen, support, out)
    if end is not None:
        with inputs.stage("exact"):
            out = end.over(out, inputs)
    return out


def _attend(inputs: LayerInputs, support: Support, budget: Budget) -> Tensor:
    options = dict(scale=inputs.scale, impl=inputs.impl)
    with inputs.stage("attention"):
        if budget.tail:
            return ops.sparse_attention_with_tail(inputs.q, inputs.k, inputs.v, support, valid=inputs.valid, **options)
        return ops.sparse_attention(inputs.q, inputs.k, inputs.v, support, **options)
