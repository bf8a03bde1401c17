"""dense_rows where the only attention kernel is the sparse one: each row's support is every key that it sees.

Exact, and for few rows: each gathers its own keys, in runs as long as the context. The keys get rows of zeros behind them, as
many as there are queries, so that the sparse kernel, for which queries are the last of the keys, hides none of what a support
holds.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..slices import slices


def through(sparse_attention: Callable) -> Callable:
    """The kernel `dense_rows` on top of a kernel `sparse_attention`."""

    def dense_rows(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, valid: Tensor | None) -> Tensor:
        B, Hq, R, _ = q.shape
        Tk = k.shape[2]
        keys, count = _seen(positions, valid, Tk)
        k, v = (pad(x, (0, 0, 0, R)) for x in (k, v))  # [B, Hkv, Tk + R, D]
        out = q.new_empty((B, R, Hq, v.shape[-1])).transpose(1, 2)
        for start, stop in slices(R, B * Tk):
            indices = keys[:, None, None].expand(B, 1, stop - start, Tk)
            out[:, :, start:stop] = sparse_attention(q[:, :, start:stop], k, v, indices, count[:, None, start:stop], 1, scale)
        return out

    return dense_rows


def _seen(positions: Tensor, valid: Tensor | None, Tk: int) -> tuple[Tensor, Tensor]:
    """Valid keys in ascending order, int32 [B, Tk], and how many of them each row sees, int32 [B, R]."""
    B = positions.shape[0]
    place = torch.arange(Tk, dtype=torch.int32, device=positions.device).expand(B, Tk)
    if valid is None:
        return place, positions + 1
    ordered = torch.where(valid, place, Tk).sort(-1).values  # those that are not valid end up behind what is counted
    upto = pad(valid.cumsum(-1, dtype=torch.int32), (1, 0))  # [B, Tk + 1]: valid keys before each place
    return ordered.to(torch.int32), upto.gather(1, (positions + 1).long())
