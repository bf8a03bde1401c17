"""Who sees whom: causality and padding for queries that are the last Tq of Tk keys."""

import torch
from torch import Tensor

from ..support import block_ends


def visible_to_block(queries: int, keys: int, block: int, valid: Tensor | None, device) -> Tensor:
    """Bool `[B or 1, Nq, Tk]`: True where at least one query of the block may see the key."""
    position = torch.arange(keys, device=device)
    visible = position <= block_ends(queries, keys, block, device)[:, None]  # [Nq, Tk]
    return visible[None] if valid is None else visible & valid[:, None]


def visible_to_query(start: int, stop: int, offset: int, keys: int, valid: Tensor | None, device) -> Tensor:
    """Bool `[B or 1, stop - start, keys]`: True where query `start + i` (at position `offset + start + i`) sees the key.

    A padding query sees nothing.
    """
    query = torch.arange(offset + start, offset + stop, device=device)
    visible = torch.arange(keys, device=device) <= query[:, None]  # [rows, keys]
    if valid is None:
        return visible[None]
    return visible & valid[:, None, :keys] & valid[:, offset + start : offset + stop, None]


def keys_seen(queries: int, keys: int, valid: Tensor | None, device) -> Tensor:
    """int64 `[B or 1, queries]`: how many valid keys lie up to each query, itself included."""
    if valid is None:
        return torch.arange(keys - queries + 1, keys + 1, device=device)[None]
    return valid.cumsum(-1)[:, keys - queries :]


def padded_to_blocks(rows: Tensor, block: int, fill: float) -> Tensor:
    """`[..., R, Tk]` -> `[..., ceil(R / block), block, Tk]`, a ragged last block filled up with `fill`."""
    R, Tk = rows.shape[-2:]
    missing = -R % block
    if missing:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing), value=fill)
    return rows.unflatten(-2, (-1, block))


def sink_ends(sink: int, B: int, keys: int, valid: Tensor | None, device) -> Tensor:
    """int32 `[B]`: the position after the `sink`-th valid key, so that the sinks are the valid keys before it."""
    if valid is None or not sink:
        return torch.full((B,), min(sink, keys), dtype=torch.int32, device=device)
    return ((valid.cumsum(-1) < sink).sum(-1) + 1).clamp(max=keys).int()
