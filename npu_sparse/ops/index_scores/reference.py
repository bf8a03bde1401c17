"""index_scores in eager PyTorch: ReLU scores by tiles of query rows, reduced over blocks of queries at once."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..masks import padded_to_blocks

TILE_ELEMENTS = 1 << 22  # index scores alive at once: a tile stays in the last-level cache


def index_scores(
    qi: Tensor, ki: Tensor, w: Tensor | None, block: int, reduce: str, valid: Tensor | None, partition: Tensor | None
) -> Tensor:
    B, Hi, Tq, _ = qi.shape
    Tk = ki.shape[1]
    scores = torch.full((B, -(-Tq // block), Tk), float("-inf"), dtype=torch.float32, device=qi.device)
    relu_last = Hi == 1 and w is None and reduce == "max"  # there it commutes with the maximum, over fewer elements
    for b, start, stop, z in _tiles(qi, ki, w, block, valid, partition, relu=not relu_last):
        if reduce == "mean":
            reduced = mean_of_weights(padded_to_blocks(z.float(), block, float("-inf")))
        else:
            reduced = _max_over_rows(padded_to_blocks(z, block, float("-inf")))
        if relu_last:
            reduced = torch.where(reduced == float("-inf"), reduced, reduced.relu())
        scores[b, start // block : -(-stop // block), : z.shape[-1]] = reduced
    return scores


def index_partition(qi: Tensor, ki: Tensor, w: Tensor | None, valid: Tensor | None) -> Tensor:
    B, _, Tq, _ = qi.shape
    partition = torch.empty((B, Tq), dtype=torch.float32, device=qi.device)
    for b, start, stop, z in _tiles(qi, ki, w, 1, valid, None, relu=True):
        partition[b, start:stop] = torch.logsumexp(z if z.dtype == torch.float64 else z.float(), -1)
    return partition.masked_fill_(partition == float("inf"), float("nan"))  # no normaliser, and no score less it is one


def _tiles(
    qi: Tensor, ki: Tensor, w: Tensor | None, block: int, valid: Tensor | None, partition: Tensor | None, relu: bool
) -> Iterator[tuple[int, int, int, Tensor]]:
    """`(b, start, stop, z)` of every tile of query rows, whole blocks of them: scores `[stop - start, keys]` up to the last key
    that the tile sees, less each query's own `partition`; -inf where a query does not see the key. The next tile overwrites z."""
    B, Hi, Tq, Di = qi.shape
    Tk = ki.shape[1]
    offset = Tk - Tq
    scaled = qi * Di**-0.5
    tile = max(block, TILE_ELEMENTS // (Hi * Tk) // block * block)
    workspace = qi.new_empty(Hi * min(tile, Tq) * Tk)  # one for all tiles: fresh pages cost more than the products
    ahead = torch.ones(min(tile, Tq), min(tile, Tq), dtype=torch.bool, device=qi.device).triu_(1)
    for b in range(B):
        for start in range(0, Tq, tile):
            stop = min(start + tile, Tq)
            first, end, R = offset + start, offset + stop, stop - start
            products = workspace[: Hi * R * end].view(Hi * R, end)
            z = torch.mm(scaled[b, :, start:stop].flatten(0, 1), ki[b, :end].T, out=products).unflatten(0, (Hi, R))
            if relu:
                z.relu_()
            if w is not None:
                z.mul_(w[b, start:stop].T[..., None])
            z = z.sum(0) if Hi > 1 else z[0]  # [R, end]
            if partition is not None:
                z = z - partition[b, start:stop, None]  # at least fp32
            # every query of the tile sees all keys before the tile's first query
            z[:, first:].masked_fill_(ahead[:R, :R], float("-inf"))
            if valid is not None:
                z.masked_fill_(~(valid[b, :end] & valid[b, first:end, None]), float("-inf"))
            yield b, start, stop, z


def _max_over_rows(z: Tensor) -> Tensor:
    """`[..., rows, keys]` -> `[..., keys]`, overwriting z: halves are compared in place, which vectorises and stays in the
    cache where `amax` over a strided axis does not."""
    while z.shape[-2] % 2 == 0:
        upper, lower = z.chunk(2, -2)
        z = torch.maximum(upper, lower, out=upper)
    return z.amax(-2)


def mean_of_weights(z: Tensor) -> Tensor:
    """The mean over a block's queries of softmax(z), -inf where no query of the block sees the key."""
    live = z.amax(-1, keepdim=True) != float("-inf")
    weights = torch.softmax(z, -1).masked_fill(z == float("-inf"), 0.0)
    mean = weights.sum(-2) / live.sum(-2).clamp(min=1)
    return mean.masked_fill(z.amax(-2) == float("-inf"), float("-inf"))
