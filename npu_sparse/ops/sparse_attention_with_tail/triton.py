"""sparse_attention_with_tail in Triton: the kernel of sparse_attention with the tail as its first key."""

from torch import Tensor

from ..sparse_attention.triton import attend
from .reference import tail_of


def sparse_attention_with_tail(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, count: Tensor, block: int, scale: float, valid: Tensor | None
) -> Tensor:
    tail = tail_of(k, v, indices, count, block, q.shape[2], valid)
    return attend(q, k, v, indices, count, block, scale, (tail.keys, tail.values, tail.number))
