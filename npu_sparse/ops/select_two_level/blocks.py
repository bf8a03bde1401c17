"""Blocks of keys: their representatives for ranking, how many of them are scored, and which always are."""

import torch
from torch import Tensor

CANDIDATE_QUERIES = 64  # queries that share their candidates, where no larger block of them shares a support


def group_size(block: int) -> int:
    """Queries that share their candidates: a group."""
    return max(block, CANDIDATE_QUERIES)


def blocks_scored(Tk: int, candidates: int, key_block: int, block: int, sink: int, recent: int) -> int:
    """How many key blocks a group's keys are scored of: those that hold `candidates` keys, and room for the blocks that
    always belong - of the first keys (`sink`, at least one), of the group itself and of the `recent` keys before it."""
    spanned = max(recent, 1) - 1 + group_size(block)
    always = _most_blocks(max(sink, 1), key_block) + _most_blocks(spanned, key_block)
    return min(-(-candidates // key_block) + always, -(-Tk // key_block))


def _most_blocks(keys: int, key_block: int) -> int:
    """The most blocks that a run of keys may touch."""
    return (keys + key_block - 2) // key_block + 1


def block_bounds(ki: Tensor, key_block: int, valid: Tensor | None) -> Tensor:
    """The two representatives of every key block, `[B, Nc, 2, Di]` in ki's dtype: per channel half way from the mean of its valid
    keys to their maximum, and half way to their minimum; zero where no key is valid.

    The maxima and minima alone bound every score of the block from above (Quest, arXiv 2406.10774) and rank a block by its
    most extreme channels; the mean alone misses blocks with one good key. Half way finds nearly as many of the best keys as the
    mean and keeps nearly as much attention mass as the bound, or more (scripts/study_key_blocks.py).
    """
    if missing := -ki.shape[1] % key_block:
        ki = torch.nn.functional.pad(ki, (0, 0, 0, missing))
        inside = torch.arange(ki.shape[1], device=ki.device) < ki.shape[1] - missing
        valid = inside.expand(ki.shape[0], -1) if valid is None else torch.nn.functional.pad(valid, (0, missing))
    keys = ki.unflatten(1, (-1, key_block))  # [B, Nc, key_block, Di]
    if valid is None:
        mean, high, low = keys.mean(2, dtype=torch.float32), keys.amax(2), keys.amin(2)
    else:
        real = valid.unflatten(1, (-1, key_block))[..., None]
        held = real.sum(2)  # [B, Nc, 1]
        mean = keys.where(real, 0.0).sum(2, dtype=torch.float32) / held.clamp(min=1)
        high = keys.where(real, float("-inf")).amax(2).where(held > 0, 0.0)
        low = keys.where(real, float("inf")).amin(2).where(held > 0, 0.0)
    return torch.stack([(mean + high) / 2, (mean + low) / 2], 2).to(ki.dtype)


def sink_blocks(B: int, Tk: int, key_block: int, sink: int, valid: Tensor | None, device) -> Tensor:
    """Bool `[B, Nc]`: True for the blocks that hold one of the first `sink` valid keys, or the very first."""
    Nc = -(-Tk // key_block)
    if valid is None:
        first = torch.arange(Nc, device=device) * key_block < max(sink, 1)
        return first.expand(B, -1)
    is_sink = valid & (valid.cumsum(-1) <= max(sink, 1))
    return torch.nn.functional.pad(is_sink, (0, Nc * key_block - Tk)).unflatten(1, (Nc, key_block)).any(-1)
