"""index_scores in eager PyTorch: ReLU scores by tiles of query rows, reduced over blocks of queries at once."""

import torch
from torch import Tensor

from ..masks import padded_to_blocks

TILE_ELEMENTS = 1 << 22  # index scores alive at once: a tile stays in the last-level cache


def index_scores(qi: Tensor, ki: Tensor, w: Tensor | None, block: int, reduce: str, valid: Tensor | None) -> Tensor:
    B, Hi, Tq, Di = qi.shape
    Tk = ki.shape[1]
    offset = Tk - Tq
    scores = torch.full((B, -(-Tq // block), Tk), float("-inf"), dtype=torch.float32, device=qi.device)
    scaled, keys = qi * Di**-0.5, ki.transpose(-1, -2)
    tile = max(block, TILE_ELEMENTS // (B * Hi * Tk) // block * block)
    for start in range(0, Tq, tile):
        stop = min(start + tile, Tq)
        first, end = offset + start, offset + stop
        z = torch.bmm(scaled[:, :, start:stop].flatten(1, 2), keys[..., :end]).unflatten(1, (Hi, -1))  # [B, Hi, R, end]
        z = z.relu_()
        if w is not None:
            z = z.mul_(w[:, start:stop].transpose(1, 2)[..., None])
        z = z.sum(1) if Hi > 1 else z[:, 0]  # [B, R, end]
        # every query of the tile sees all keys before the tile's first query
        hidden = torch.ones(stop - start, stop - start, dtype=torch.bool, device=z.device).triu_(1)
        z[..., first:].masked_fill_(hidden, float("-inf"))
        if valid is not None:
            z.masked_fill_(~(valid[:, None, :end] & valid[:, first:end, None]), float("-inf"))
        if reduce == "max":
            reduced = _max_over_rows(padded_to_blocks(z, block, float("-inf")))
        else:
            reduced = _mean_of_weights(padded_to_blocks(z.float(), block, float("-inf")))
        scores[:, start // block : -(-stop // block), :end] = reduced
    return scores


def _max_over_rows(z: Tensor) -> Tensor:
    """`[..., rows, keys]` -> `[..., keys]`, by halves: elementwise maxima vectorise where `amax` over a strided axis does not."""
    while z.shape[-2] % 2 == 0:
        half = z.shape[-2] // 2
        z = torch.maximum(z[..., :half, :], z[..., half:, :])
    return z.amax(-2)


def _mean_of_weights(z: Tensor) -> Tensor:
    """The mean over a block's queries of softmax(z), -inf where no query of the block sees the key."""
    live = z.amax(-1, keepdim=True) > float("-inf")
    weights = torch.softmax(z, -1).masked_fill(~live, 0.0)
    mean = weights.sum(-2) / live.sum(-2).clamp(min=1)
    return mean.masked_fill(z.amax(-2) == float("-inf"), float("-inf"))
