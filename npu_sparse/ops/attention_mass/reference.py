"""attention_mass in eager PyTorch: softmax over tiles of query rows, averaged over heads."""

import torch
from torch import Tensor

from .. import workspace
from ..masks import padded_to_blocks, visible_to_query


def attention_mass(q: Tensor, k: Tensor, scale: float, block: int, reduce: str, per_kv: bool, valid: Tensor | None) -> Tensor:
    B, Hq, Tq, D = q.shape
    Hkv, Tk = k.shape[1], k.shape[2]
    Hs, offset = (Hkv if per_kv else 1), Tk - Tq
    mass = torch.zeros(B, Hs, -(-Tq // block), Tk, dtype=torch.float32, device=q.device)
    keys = k.float().transpose(-1, -2)[:, :, None]  # [B, Hkv, 1, D, Tk]
    tile = max(block, workspace.elements() // (B * Hq * Tk) // block * block)
    for start in range(0, Tq, tile):
        stop = min(start + tile, Tq)
        end = offset + stop  # no query of the tile sees further
        visible = visible_to_query(start, stop, offset, end, valid, q.device)[:, None, None]
        rows = q[:, :, start:stop].float().unflatten(1, (Hkv, -1))  # [B, Hkv, G, R, D]
        scores = torch.matmul(rows, keys[..., :end]).mul_(scale).masked_fill_(~visible, float("-inf"))
        weights = torch.softmax(scores, -1).masked_fill_(~visible, 0.0)  # a row that sees nothing has no mass
        weights = weights.mean(2) if per_kv else weights.flatten(1, 2).mean(1, keepdim=True)  # [B, Hs, R, end]
        blocks = padded_to_blocks(weights, block, 0.0)
        if reduce == "max":
            reduced = blocks.amax(-2)
        else:
            live = padded_to_blocks(visible.any(-1, keepdim=True)[:, :, 0].float(), block, 0.0).sum(-2).clamp(min=1)
            reduced = blocks.sum(-2) / live
        mass[:, :, start // block : -(-stop // block), :end] = reduced
    return mass
