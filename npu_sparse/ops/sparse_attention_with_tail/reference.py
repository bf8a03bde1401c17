"""sparse_attention_with_tail in eager PyTorch: running means of keys and values, then sparse attention over one key more."""

import torch
from torch import Tensor

from .. import workspace
from ..sparse_attention.backward import gradients
from ..sparse_attention.reference import SMALLEST_GATHERED_BLOCK, Tail, gather_blocks, gather_unions


def sparse_attention_with_tail(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, count: Tensor, block: int, scale: float, valid: Tensor | None
) -> Tensor:
    B, Hq, Tq, _ = q.shape
    if indices.shape[-1] == 0:
        return q.new_zeros((B, Tq, Hq, v.shape[-1])).transpose(1, 2)
    serve = gather_blocks if block >= SMALLEST_GATHERED_BLOCK else gather_unions
    return serve(q, k, v, indices, count, block, scale, tail_of(k, v, indices, count, block, Tq, valid))


def tail_of(
    k: Tensor, v: Tensor, indices: Tensor, count: Tensor, block: int, queries: int, valid: Tensor | None
) -> Tail:
    """For every block: the mean key and value up to its first query, and how many of those keys are outside its row."""
    B, _, Tk, _ = k.shape
    first = torch.arange(0, queries, block, device=k.device) + Tk - queries  # [Nq]
    seen = (first + 1).expand(B, -1) if valid is None else valid.cumsum(-1)[:, first]  # [B, Nq]
    outside = torch.zeros(count.shape, dtype=torch.float32, device=k.device)
    step = max(1, workspace.elements() // (B * indices.shape[1] * indices.shape[3]))
    slots = torch.arange(indices.shape[3], device=k.device)
    for start in range(0, len(first), step):
        n = slice(start, start + step)
        inside = (slots < count[:, :, n, None]) & (indices[:, :, n] <= first[n, None])
        outside[:, :, n] = (seen[:, None, n] - inside.sum(-1)).float()
    # a support that holds padding may hold more than was seen; a query without a support, such as padding, reads nothing
    outside = outside.clamp(min=0).masked_fill(count == 0, 0.0)
    means = (_running_mean(x, int(first[0]), block, len(first), seen, valid) for x in (k, v))
    return Tail(*means, outside)


def _running_mean(x: Tensor, first: int, block: int, rows: int, seen: Tensor, valid: Tensor | None) -> Tensor:
    """The mean of x `[B, Hkv, Tk, D]` over the valid tokens up to `first + n * block`, for n < rows: `[B, Hkv, rows, D]`."""
    last = first + (rows - 1) * block
    x = x[:, :, : last + 1]
    if valid is not None:
        x = x.masked_fill(~valid[:, None, : last + 1, None], 0.0)
    head = x[:, :, : first + 1].sum(2, keepdim=True, dtype=torch.float32)  # [B, Hkv, 1, D]
    steps = x[:, :, first + 1 :].unflatten(2, (rows - 1, block)).sum(3, dtype=torch.float32) if rows > 1 else head[:, :, :0]
    sums = torch.cat([head, steps], 2).cumsum(2)
    return (sums / seen.clamp(min=1)[:, None, :, None]).to(x.dtype)


def sparse_attention_with_tail_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, count: Tensor, block: int, scale: float, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    tail = tail_of(k, v, indices, count, block, q.shape[2], valid)
    dq, dk, dv, *of_means = gradients(grad, q, k, v, indices, count, block, scale, tail)
    first, rows = k.shape[2] - q.shape[2], indices.shape[2]
    for d, of_mean in zip((dk, dv), of_means):
        d += _through_running_mean(of_mean, first, block, rows, k.shape[2], valid)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _through_running_mean(grad: Tensor, first: int, block: int, rows: int, keys: int, valid: Tensor | None) -> Tensor:
    """The gradient of x in `_running_mean`: every token gets that of the means it is part of, over their numbers of tokens."""
    ends = torch.arange(rows, device=grad.device) * block + first
    seen = (ends + 1).expand(len(grad), -1) if valid is None else valid.cumsum(-1)[:, ends]
    shares = (grad / seen.clamp(min=1)[:, None, :, None]).flip(2).cumsum(2).flip(2)  # of the means from this one on
    shares = torch.cat([shares, torch.zeros_like(shares[:, :, :1])], 2)  # tokens behind the last mean
    position = torch.arange(keys, device=grad.device)
    shares = shares[:, :, -((first - position) // block).clamp(max=0)]  # the first mean that holds the token
    return shares if valid is None else shares.masked_fill(~valid[:, None, :, None], 0.0)
