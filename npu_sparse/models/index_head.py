"""An index head prepared for prefill: one product computes its projections, and one operator everything that a layer needs."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..indexer import IndexHead

ALIGNED = 8  # 16-bit rows then begin at multiples of 16 bytes, which fast matrix products need


@dataclass(frozen=True, eq=False)
class Index:
    """What an index head makes of the hidden states `[B, T, hidden_size]` of a layer.

    Attributes:
        queries: `[B, Hi, T, Di]`, keys: `[B, T, Di]`, weights: `[B, T, Hi]` or None.
        partition: float32 `[B, T]`, the log-partitions that its partition head predicts where nothing is padding, or None.
        finite: what of the layer, and whether each token's is finite, bool `[B, T]`.
    """

    queries: Tensor
    keys: Tensor
    weights: Tensor | None
    partition: Tensor | None
    finite: tuple[tuple[str, Tensor], ...]


class FusedIndexHead:
    """An IndexHead for devices where `index_heads` has a kernel. The head's own weights become parts of one matrix."""

    def __init__(self, head: IndexHead, impl: str):
        self.head, self.impl = head, impl
        rows = [head.q_proj.weight, head.k_proj.weight]
        rows += [] if head.w_proj is None else [head.w_proj.weight]
        rows += [] if head.partition is None else [head.partition.direction[None]]
        self.sizes = [len(part) for part in rows]
        unused = -sum(self.sizes) % ALIGNED
        self.weight = torch.cat([*rows, rows[0].new_zeros(unused, rows[0].shape[1])]).detach()
        parts = self.weight.split([*self.sizes, unused])
        for layer, part in zip(filter(None, (head.q_proj, head.k_proj, head.w_proj)), parts):
            layer.weight = nn.Parameter(part, requires_grad=False)
        if head.partition is not None:
            head.partition.direction = nn.Parameter(parts[len(self.sizes) - 1][0], requires_grad=False)
        self.sizes.append(unused)

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, start: int) -> Index:
        """start: position of the first token."""
        head, norm = self.head, self.head.k_norm
        parts = list(nn.functional.linear(hidden, self.weight).split_with_sizes(self.sizes, -1)[:-1])
        line, dots = None, None
        if head.partition is not None:
            line, dots = head.partition.line, parts.pop()[..., 0]
        weights = parts.pop() if head.w_proj is not None else None
        qi, ki, w, partition, (sound, made) = ops.index_heads(
            *parts, weights, dots, hidden, cos, sin, norm_weight=norm.weight, norm_bias=norm.bias, line=line, eps=norm.eps,
            start=start, impl=self.impl,
        )  # fmt: skip
        return Index(qi, ki, w, partition, (("hidden states", sound), ("index queries and keys", made)))
