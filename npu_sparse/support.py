"""Support: which keys each query may attend to. The value that crosses every boundary of this package."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Support:
    """Key positions selected for blocks of queries.

    Attributes:
        indices: int32 `[B, Hs, Nq, K]` key positions. The first `count` entries of a row ascend strictly and lie in
            `[0, last query of the block]`; the rest are unspecified and must be read by nobody.
        count: int32 `[B, Hs, Nq]`, how many entries of each row are meant.
        block: queries that share one row (`b_sel`; 1 = every query has its own).

    `Hs` is 1 (one support for all heads) or `Hkv` (one per KV group); `Nq = ceil(Tq / block)`. Every query still applies
    its own causal mask to the support of its block.
    """

    indices: Tensor
    count: Tensor
    block: int = 1

    def __post_init__(self):
        if not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"block must be a positive integer, got {self.block!r}")
        for name, tensor, ndim in (("indices", self.indices, 4), ("count", self.count, 3)):
            if tensor.dtype != torch.int32:
                raise TypeError(f"{name} must be int32, got {tensor.dtype}")
            if tensor.ndim != ndim:
                raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(tensor.shape)}")
        if self.count.shape != self.indices.shape[:3]:
            raise ValueError(f"count must have shape {tuple(self.indices.shape[:3])}, got {tuple(self.count.shape)}")

    @property
    def width(self) -> int:
        """K: slots per row."""
        return self.indices.shape[-1]

    def used(self) -> Tensor:
        """Bool `[B, Hs, Nq, K]`: True for the slots that are meant."""
        return torch.arange(self.width, device=self.indices.device) < self.count[..., None]

    def check(self, queries: int, keys: int) -> "Support":
        """Returns self after reading every entry; raises ValueError naming the first broken rule.

        Args:
            queries: Tq, the queries this support serves; they are the last `queries` of `keys` positions.
            keys: Tk.
        """
        B, Hs, Nq, K = self.indices.shape
        if Nq != -(-queries // self.block):
            raise ValueError(f"indices must have Nq = {-(-queries // self.block)} rows for {queries} queries, got {Nq}")
        if bool(((self.count < 0) | (self.count > K)).any()):
            raise ValueError(f"count must lie in [0, {K}], got {int(self.count.min())}..{int(self.count.max())}")
        used = self.used()
        if bool((used & (self.indices < 0)).any()):
            raise ValueError(f"indices must be >= 0, got {int(self.indices[used].min())}")
        last = block_ends(queries, keys, self.block, self.indices.device)  # [Nq]
        if bool((used & (self.indices > last[:, None])).any()):
            raise ValueError("indices must not lie beyond the last query of their block")
        if K > 1:
            ascending = self.indices[..., 1:] > self.indices[..., :-1]
            if bool((used[..., 1:] & ~ascending).any()):
                raise ValueError("indices must ascend strictly (no duplicates) within each row's first count entries")
        return self

    def member_mask(self, keys: int) -> Tensor:
        """Bool `[B, Hs, Nq, keys]`: True where a key belongs to the row's support. For studies on short contexts."""
        used = self.used()
        slots = torch.where(used, self.indices, keys).long()  # unused slots land in a column that is cut off
        mask = torch.zeros(*self.indices.shape[:3], keys + 1, dtype=torch.bool, device=self.indices.device)
        return mask.scatter_(-1, slots, True)[..., :keys]


def concatenate(parts: list[Support]) -> Support:
    """One Support whose rows are those of `parts`, in order; narrower rows get unused slots."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.width for part in parts)
    indices = [torch.nn.functional.pad(part.indices, (0, width - part.width), value=-1) for part in parts]
    return Support(torch.cat(indices, 2), torch.cat([part.count for part in parts], 2), parts[0].block)


def block_ends(queries: int, keys: int, block: int, device=None) -> Tensor:
    """Int64 `[Nq]`: the key position of the last query of every block, queries being the last of the keys."""
    rows = -(-queries // block)
    ends = torch.arange(1, rows + 1, device=device) * block
    return ends.clamp(max=queries) - 1 + (keys - queries)
