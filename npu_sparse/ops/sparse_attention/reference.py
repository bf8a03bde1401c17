"""sparse_attention in eager PyTorch. Both functions compute the same thing: shared supports are gathered block by block;
per-query supports are served by the union of neighbouring queries' supports with a membership mask, which is exact."""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

SMALLEST_GATHERED_BLOCK = 16
TILE_ELEMENTS = 1 << 22  # gathered key elements alive at once
UNION_ROWS = 128


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, count: Tensor, block: int, scale: float) -> Tensor:
    if indices.shape[-1] == 0:
        return q.new_zeros((*q.shape[:3], v.shape[-1]))
    serve = _gather_blocks if block >= SMALLEST_GATHERED_BLOCK else _gather_unions
    return serve(q, k, v, indices, count, block, scale)


def _gather_blocks(q, k, v, indices, count, block, scale):
    B, Hq, Tq, D = q.shape
    Hkv, Tk, Dv = k.shape[1], k.shape[2], v.shape[-1]
    Hs, Nq, K = indices.shape[1:]
    used = torch.arange(K, device=q.device) < count[..., None]
    slots = torch.where(used, indices, indices[..., :1]).long()  # what an unused slot holds is never read
    slots = slots.masked_fill_((count == 0)[..., None], 0)
    queries = pad(q, (0, 0, 0, Nq * block - Tq)).view(B, Hq, Nq, block, D)
    position = torch.arange(Nq * block, device=q.device).view(Nq, block) + Tk - Tq
    out = torch.empty(B, Nq, Hq, block, Dv, dtype=q.dtype, device=q.device)
    step = max(1, TILE_ELEMENTS // (Hkv * K * D))
    for b in range(B):
        for start in range(0, Nq, step):
            n = slice(start, start + step)
            idx = slots[b, :, n]  # [Hs, n, K]
            allowed = used[b, :, n, None] & (idx[:, :, None] <= position[n, :, None])  # [Hs, n, block, K]
            mask = torch.zeros_like(allowed, dtype=q.dtype).masked_fill_(~allowed, float("-inf"))
            keys, values = _gather(k[b], idx), _gather(v[b], idx)  # [n * Hs, Hkv / Hs, K, D]
            rows = queries[b, :, n].transpose(0, 1).reshape(-1, Hq // Hs, block, D)  # [n * Hs, Hq / Hs, block, D]
            mask = mask.transpose(0, 1).flatten(0, 1)[:, None]  # [n * Hs, 1, block, K]
            tile = scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
            seen = allowed.any(-1).transpose(0, 1).reshape(-1, 1, block, 1)
            out[b, n] = torch.where(seen, tile, 0.0).view(-1, Hq, block, Dv)
    return out.transpose(1, 2).reshape(B, Hq, Nq * block, Dv)[:, :, :Tq].contiguous()


def _gather(x: Tensor, idx: Tensor) -> Tensor:
    """`[Hkv, Tk, D]` at `[Hs, n, K]` -> `[n * Hs, Hkv / Hs, K, D]`."""
    Hs, n, K = idx.shape
    if Hs == 1:
        return x.index_select(1, idx.flatten()).unflatten(1, (n, K)).transpose(0, 1).contiguous()
    heads = torch.arange(Hs, device=x.device)[:, None, None]
    return x[heads, idx].transpose(0, 1).reshape(n * Hs, 1, K, x.shape[-1])


def _gather_unions(q, k, v, indices, count, block, scale):
    B, Hq, Tq, D = q.shape
    Hkv, Tk, Dv = k.shape[1], k.shape[2], v.shape[-1]
    Hs, K = indices.shape[1], indices.shape[-1]
    used = torch.arange(K, device=q.device) < count[..., None]
    slots = torch.where(used, indices, Tk).long()  # unused slots land in a column that is cut off
    out = torch.zeros(B, Hq, Tq, Dv, dtype=q.dtype, device=q.device)
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
