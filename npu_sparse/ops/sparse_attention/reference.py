"""sparse_attention in eager PyTorch. Both functions compute the same thing: shared supports are gathered block by block;
per-query supports are served by the union of neighbouring queries' supports with a membership mask, which is exact."""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

SMALLEST_GATHERED_BLOCK = 16
TILE_ELEMENTS = 1 << 21  # gathered key elements alive at once
UNION_ROWS = 128


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, count: Tensor, block: int, scale: float) -> Tensor:
    B, Hq, Tq, _ = q.shape
    if indices.shape[-1] == 0:
        return q.new_zeros((B, Tq, Hq, v.shape[-1])).transpose(1, 2)
    serve = _gather_blocks if block >= SMALLEST_GATHERED_BLOCK else _gather_unions
    return serve(q, k, v, indices, count, block, scale)


def _gather_blocks(q, k, v, indices, count, block, scale):
    B, Hq, Tq, _ = q.shape
    Hkv, Tk, D = k.shape[1:]
    Hs, Nq, K = indices.shape[1:]
    used = torch.arange(K, device=q.device) < count[..., None]
    ends = torch.where(used, indices, Tk).transpose(1, 2)  # [B, Nq, Hs, K]; no query sees an unused slot
    slots = torch.where(used, indices, indices[..., :1].clamp(0, Tk - 1)).transpose(1, 2)  # unused: any key that is used
    slots = slots.masked_fill((count == 0).transpose(1, 2)[..., None], 0)
    heads = torch.arange(Hkv, device=q.device).view(Hs, -1, 1) * Tk  # [Hs, Hkv / Hs, 1]
    rows = q.transpose(1, 2)  # [B, Tq, Hq, D]
    if Tq % block:
        rows = pad(rows, (0, 0, 0, 0, 0, -Tq % block))
    rows = rows.unflatten(1, (Nq, block)).unflatten(3, (Hs, -1))  # [B, Nq, block, Hs, Hq / Hs, D]
    position = torch.arange(Nq * block, device=q.device).view(Nq, 1, block, 1) + Tk - Tq
    out = q.new_empty((B, Nq, block, Hs, Hq // Hs, v.shape[-1]))
    step = min(Nq, max(1, TILE_ELEMENTS // (Hkv * K * D)))
    key_space, value_space = k.new_empty(step * Hkv * K, D), v.new_empty(step * Hkv * K, v.shape[-1])
    for b in range(B):
        keys, values = k[b].reshape(Hkv * Tk, D), v[b].reshape(Hkv * Tk, -1)
        for start in range(0, Nq, step):
            n = slice(start, start + step)
            chosen = (slots[b, n, :, None] + heads).flatten()  # [n * Hs * (Hkv / Hs) * K]
            hidden = (ends[b, n, :, None] > position[n]).flatten(0, 1)[:, None]  # [n * Hs, 1, block, K]
            tile = scaled_dot_product_attention(
                rows[b, n].permute(0, 2, 3, 1, 4).flatten(0, 1),  # [n * Hs, Hq / Hs, block, D]
                torch.index_select(keys, 0, chosen, out=key_space[: len(chosen)]).view(-1, Hkv // Hs, K, D),
                torch.index_select(values, 0, chosen, out=value_space[: len(chosen)]).view(-1, Hkv // Hs, K, v.shape[-1]),
                attn_mask=torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, float("-inf")),
                scale=scale,
                enable_gqa=True,
            )
            blind = (ends[b, n, :, :1] > position[n, 0, :, 0][:, None]).flatten(0, 1)[:, None, :, None]
            if bool(blind.any()):  # rows ascend: a query that does not see the first entry sees none
                tile = tile.masked_fill(blind, 0.0)
            out[b, n] = tile.unflatten(0, (-1, Hs)).permute(0, 3, 1, 2, 4)
    return out.view(B, Nq * block, Hq, -1)[:, :Tq].contiguous().transpose(1, 2)


def _gather_unions(q, k, v, indices, count, block, scale):
    B, Hq, Tq, D = q.shape
    Hkv, Tk, Dv = k.shape[1], k.shape[2], v.shape[-1]
    Hs, K = indices.shape[1], indices.shape[-1]
    used = torch.arange(K, device=q.device) < count[..., None]
    slots = torch.where(used, indices, Tk).long()  # unused slots land in a column that is cut off
    out = q.new_zeros((B, Tq, Hq, Dv)).transpose(1, 2)
    rows_at_once = max(1, UNION_ROWS // block) * block  # whole blocks
    for start in range(0, Tq, rows_at_once):
        stop = min(start + rows_at_once, Tq)
        blocks = slots[:, :, start // block : -(-stop // block)]
        member = torch.zeros(*blocks.shape[:3], Tk + 1, dtype=torch.bool, device=q.device).scatter_(-1, blocks, True)
        union = member[..., :Tk].flatten(0, 2).any(0).nonzero()[:, 0]  # [U]
        if not union.numel():
            continue
        member = member[..., union].repeat_interleave(block, 2)[:, :, : stop - start]  # [B, Hs, R, U]
        position = torch.arange(start, stop, device=q.device) + Tk - Tq
        allowed = member & (union <= position[:, None])
        mask = torch.zeros_like(allowed, dtype=q.dtype).masked_fill_(~allowed, float("-inf"))
        # a key that only another sequence or KV group selects may hold anything: it must not reach this one as 0 * NaN
        unused = ~member.any(2)[..., None]  # [B, Hs, U, 1]
        keys, values = k[:, :, union].masked_fill_(unused, 0.0), v[:, :, union].masked_fill_(unused, 0.0)
        rows = q[:, :, start:stop].reshape(B * Hs, Hq // Hs, stop - start, D)
        tile = scaled_dot_product_attention(
            rows, keys.reshape(B * Hs, Hkv // Hs, -1, D), values.reshape(B * Hs, Hkv // Hs, -1, Dv),
            attn_mask=mask.flatten(0, 1)[:, None], scale=scale, enable_gqa=True,
        )  # fmt: skip
        seen = allowed.any(-1)[..., None]  # [B, Hs, R, 1]
        out[:, :, start:stop] = torch.where(seen[:, :, None], tile.view(B, Hs, -1, stop - start, Dv), 0.0).flatten(1, 2)
    return out
