"""select_two_level in eager PyTorch: key blocks are ranked in fp32, the keys of the best are gathered group by group."""

from functools import partial

import torch
from torch import Tensor

from ..index_scores.reference import mean_of_weights
from .blocks import block_bounds
from .levels import two_levels

TILE_ELEMENTS = 1 << 22  # scores of single keys alive at once
MOST = 3e38  # the largest score; blocks and keys that always belong rank above it


def block_scores(
    qi: Tensor, bounds: Tensor, w: Tensor | None, sinks: Tensor, position: int, key_block: int, group: int, recent: int,
    valid: Tensor | None, partition: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The scores of key blocks for groups of queries, float32 `[B, Ng, Nc]`: -inf for blocks that are ahead or all padding, +inf
    for those of the group and its recent keys, the largest number for those of the first keys.

    `position`: of the first query; `group`: queries per group.
    """
    B, Hi, R, _ = qi.shape
    Nc, Ng = bounds.shape[1], -(-R // group)
    towards_high, towards_low = bounds.float().unbind(2)  # [B, Nc, Di]
    z = torch.zeros(B, R, Nc, device=qi.device)
    for h in range(Hi):
        q = qi[:, h].float()
        best = q.clamp(min=0) @ towards_high.mT + q.clamp(max=0) @ towards_low.mT  # [B, R, Nc]
        z += best.relu_() if w is None else best.relu_().mul_(w[:, :, h, None])
    if partition is not None:
        z -= partition[..., None]
    place = torch.arange(Nc, device=qi.device)
    first = position + torch.arange(Ng, device=qi.device)[:, None] * group  # [Ng, 1]
    last = (first + group - 1).clamp(max=position + R - 1)
    if valid is not None:
        z.masked_fill_(~valid[:, position : position + R, None], float("-inf"))  # a padding query speaks for nobody
    z = torch.nn.functional.pad(z, (0, 0, 0, Ng * group - R), value=float("-inf"))
    z = z.unflatten(1, (Ng, group)).amax(2)  # [B, Ng, Nc]
    z.nan_to_num_(nan=float("-inf"), posinf=MOST, neginf=float("-inf"))
    z.masked_fill_(sinks[:, None], torch.finfo(torch.float32).max)
    z.masked_fill_((place + 1) * key_block > first - max(recent, 1) + 1, float("inf"))
    if valid is not None:
        missing = Nc * key_block - valid.shape[1]
        real = torch.nn.functional.pad(valid, (0, missing)).unflatten(1, (Nc, key_block)).any(-1)
        z.masked_fill_(~real[:, None], float("-inf"))
    return z.masked_fill_(place * key_block > last, float("-inf"))


def candidate_scores(
    qi: Tensor, ki: Tensor, w: Tensor | None, chosen: Tensor, held: Tensor, position: int, key_block: int, block: int, group: int,
    reduce: str, sink: int, recent: int, valid: Tensor | None, partition: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The scores of the keys of every group's blocks, reduced over blocks of queries: float32 `[B, ceil(R / block), W *
    key_block]`, +inf for keys that are always kept, -inf where no query of the block sees the key.

    `chosen [B, Ng, W]`, `held [B, Ng]`: the key blocks of every group, and how many are meant.
    """
    B, Hi, R, Di = qi.shape
    Ng, W = chosen.shape[1:]
    Tk = ki.shape[1]
    scaled = torch.nn.functional.pad(qi * Di**-0.5, (0, 0, 0, Ng * group - R)).unflatten(2, (Ng, group))  # [B, Hi, Ng, group, Di]
    if w is not None:
        w = torch.nn.functional.pad(w, (0, 0, 0, Ng * group - R)).unflatten(1, (Ng, group))  # [B, Ng, group, Hi]
    if partition is not None:
        partition = torch.nn.functional.pad(partition, (0, Ng * group - R)).unflatten(1, (Ng, group))  # [B, Ng, group]
    used = torch.arange(W, device=qi.device) < held[..., None]  # [B, Ng, W]
    key = chosen.where(used, 0)[..., None] * key_block + torch.arange(key_block, device=qi.device)
    inside = (used[..., None] & (key < Tk)).flatten(2)  # [B, Ng, W * key_block]
    key = key.clamp(max=Tk - 1).flatten(2)
    query = torch.arange(Ng * group, device=qi.device).view(Ng, group)
    live = (query < R).expand(B, -1, -1)
    query = query + position
    if valid is not None:
        inside = inside & valid.gather(1, key.flatten(1)).view_as(key)
        live = live & valid[:, query.clamp(max=Tk - 1)]
        rank = valid.cumsum(-1) - 1
    scores = torch.empty(B, Ng, group // block, W * key_block, device=qi.device)
    step = max(1, TILE_ELEMENTS // (Hi * group * W * key_block))
    for b in range(B):
        for start in range(0, Ng, step):
            n = slice(start, start + step)
            keys = ki[b, key[b, n]]  # [n, W * key_block, Di]
            z = torch.bmm(scaled[b, :, n].transpose(0, 1).flatten(1, 2), keys.mT).relu_().unflatten(1, (Hi, group))
            if w is not None:
                z.mul_(w[b, n].mT[..., None])
            z = z.sum(1) if Hi > 1 else z[:, 0]  # [n, group, W * key_block]
            if partition is not None:
                z = z - partition[b, n, :, None]  # at least fp32
            sees = inside[b, n, None] & live[b, n, :, None] & (key[b, n, None] <= query[n, :, None])
            z = z.masked_fill(~sees, float("-inf"))
            if reduce == "mean":
                z = mean_of_weights(z.float().unflatten(1, (-1, block)))
            else:
                z = z.unflatten(1, (-1, block)).amax(2)
            kept = torch.zeros_like(z, dtype=torch.bool)  # [n, group / block, W * key_block]
            if recent:
                first = query[n, ::block, None]
                kept |= (key[b, n, None] > first - recent) & (key[b, n, None] < first + block)
            if sink:
                kept |= ((key[b, n] if valid is None else rank[b, key[b, n]]) < sink)[:, None]
            kept &= z != float("-inf")
            z = z.float().nan_to_num(nan=float("-inf"), posinf=MOST, neginf=float("-inf"))
            scores[b, n] = z.masked_fill_(kept, float("inf"))
    return scores.flatten(1, 2)[:, : -(-R // block)].contiguous()


def keys_of_slots(slots: Tensor, count: Tensor, chosen: Tensor, key_block: int, rows_per_group: int) -> Tensor:
    """The keys `[B, rows, K]` that slots of the candidates' scores stand for, -1 beyond a row's count."""
    B, rows, K = slots.shape
    used = torch.arange(K, device=slots.device) < count.view(B, rows, 1)
    slots = slots.where(used, 0)
    blocks = chosen.repeat_interleave(rows_per_group, 1)[:, :rows].gather(-1, (slots // key_block).long())
    return (blocks * key_block + slots % key_block).where(used, -1)


select_two_level = partial(
    two_levels, impl="reference", block_bounds=block_bounds, block_scores=block_scores, candidate_scores=candidate_scores,
    keys_of_slots=keys_of_slots,
)  # fmt: skip
