"""sparse_attention in eager PyTorch. Both functions compute the same thing: shared supports are gathered block by block;
per-query supports are served by the union of neighbouring queries' supports with a membership mask, which is exact.

PyTorch's attention multiplies values that a query does not see by zero, and zero times NaN is NaN. A tile with NaN in its result
is therefore computed again with the non-finite values kept apart."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

SMALLEST_GATHERED_BLOCK = 16
TILE_ELEMENTS = 1 << 21  # gathered key elements alive at once
UNION_ROWS = 128


@dataclass(frozen=True)
class Tail:
    """One more key for every block of queries: keys `[B, Hkv, Nq, D]`, values `[B, Hkv, Nq, Dv]`, and the number of keys that
    each stands for, fp32 `[B, Hs, Nq]`."""

    keys: Tensor
    values: Tensor
    number: Tensor

    def biases(self, dtype: torch.dtype) -> Tensor:
        """What two copies of the key add to their scores, `[B, Hs, Nq, 2]`: exp of both sums up to `number`.

        A mask has the queries' dtype, and bfloat16 rounds the logarithm of some thousands by up to 0.031: the second copy
        stands for what the first, made a little smaller than that, leaves.
        """
        first = (self.number.log() - 0.04).to(dtype)
        second = (self.number - first.float().exp()).log().to(dtype)
        return torch.stack([first, second], -1)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, count: Tensor, block: int, scale: float) -> Tensor:
    B, Hq, Tq, _ = q.shape
    if indices.shape[-1] == 0:
        return q.new_zeros((B, Tq, Hq, v.shape[-1])).transpose(1, 2)
    serve = gather_blocks if block >= SMALLEST_GATHERED_BLOCK else gather_unions
    return serve(q, k, v, indices, count, block, scale)


def gather_blocks(q, k, v, indices, count, block, scale, tail: Tail | None = None):
    """Attention of blocks of queries, each over the keys of its own row, gathered; with `tail`, also over its tail."""
    B, Hq, Tq, _ = q.shape
    Hkv, Tk, D = k.shape[1:]
    Hs, Nq, K = indices.shape[1:]
    used = torch.arange(K, device=q.device) < count[..., None]
    ends = torch.where(used, indices, Tk).transpose(1, 2)  # [B, Nq, Hs, K]; no query sees an unused slot
    slots = torch.where(used, indices, indices[..., :1].clamp(0, Tk - 1)).transpose(1, 2)  # unused: any key that is used
    slots = slots.masked_fill((count == 0).transpose(1, 2)[..., None], 0)
    if tail is not None:  # two more slots, whose keys lie behind the others
        k, v = torch.cat([k, tail.keys], 2), torch.cat([v, tail.values], 2)
        behind = torch.arange(Tk, Tk + Nq, device=q.device, dtype=slots.dtype)
        slots = torch.cat([slots, behind.view(1, -1, 1, 1).expand(B, -1, Hs, 2)], -1)
        biases, K = tail.biases(q.dtype).transpose(1, 2), K + 2  # [B, Nq, Hs, 2]
    rows_of_keys = k.shape[2]
    heads = torch.arange(Hkv, device=q.device).view(Hs, -1, 1) * rows_of_keys  # [Hs, Hkv / Hs, 1]
    rows = q.transpose(1, 2)  # [B, Tq, Hq, D]
    if Tq % block:
        rows = pad(rows, (0, 0, 0, 0, 0, -Tq % block))
    rows = rows.unflatten(1, (Nq, block)).unflatten(3, (Hs, -1))  # [B, Nq, block, Hs, Hq / Hs, D]
    position = torch.arange(Nq * block, device=q.device).view(Nq, 1, block, 1) + Tk - Tq
    out = q.new_empty((B, Nq, block, Hs, Hq // Hs, v.shape[-1]))
    step = min(Nq, max(1, TILE_ELEMENTS // (Hkv * K * D)))
    key_space, value_space = k.new_empty(step * Hkv * K, D), v.new_empty(step * Hkv * K, v.shape[-1])
    for b in range(B):
        keys, values = k[b].reshape(Hkv * rows_of_keys, D), v[b].reshape(Hkv * rows_of_keys, -1)
        for start in range(0, Nq, step):
            n = slice(start, start + step)
            chosen = (slots[b, n, :, None] + heads).flatten()  # [n * Hs * (Hkv / Hs) * K]
            hidden = (ends[b, n, :, None] > position[n]).flatten(0, 1)[:, None]  # [n * Hs, 1, block, K]
            mask = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
            if tail is not None:
                mask = torch.cat([mask, biases[b, n, :, None].flatten(0, 1)[:, None].expand(-1, -1, block, -1)], -1)
            queries = rows[b, n].permute(0, 2, 3, 1, 4).flatten(0, 1)  # [n * Hs, Hq / Hs, block, D]
            chosen_keys = torch.index_select(keys, 0, chosen, out=key_space[: len(chosen)]).view(-1, Hkv // Hs, K, D)
            chosen_values = torch.index_select(values, 0, chosen, out=value_space[: len(chosen)])
            chosen_values = chosen_values.view(-1, Hkv // Hs, K, v.shape[-1])
            tile = scaled_dot_product_attention(
                queries, chosen_keys, chosen_values, attn_mask=mask, scale=scale, enable_gqa=True
            )
            blind = (ends[b, n, :, :1] > position[n, 0, :, 0][:, None]).flatten(0, 1)[:, None, :, None]
            if tail is not None:
                blind = blind & (tail.number[b, :, n].T == 0).flatten()[:, None, None, None]
            if bool(blind.any()):  # rows ascend: a query that does not see the first entry sees none
                tile = tile.masked_fill(blind, 0.0)
            if bool(tile.isnan().any()):
                tile = _attend_apart(queries, chosen_keys, chosen_values, mask, scale).masked_fill(blind, 0.0)
            out[b, n] = tile.unflatten(0, (-1, Hs)).permute(0, 3, 1, 2, 4)
    return out.view(B, Nq * block, Hq, -1)[:, :Tq].contiguous().transpose(1, 2)


def gather_unions(q, k, v, indices, count, block, scale, tail: Tail | None = None):
    """Attention of tiles of queries over the union of their rows, masked by membership; with `tail`, also over their tails."""
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
        if not union.numel():  # nor has a block without keys a tail
            continue
        member = member[..., union].repeat_interleave(block, 2)[:, :, : stop - start]  # [B, Hs, R, U]
        position = torch.arange(start, stop, device=q.device) + Tk - Tq
        allowed = member & (union <= position[:, None])
        mask = torch.zeros_like(allowed, dtype=q.dtype).masked_fill_(~allowed, float("-inf"))
        # a key that only another sequence or KV group selects may hold anything: it must not reach this one as 0 * NaN
        unused = ~member.any(2)[..., None]  # [B, Hs, U, 1]
        keys, values = k[:, :, union].masked_fill_(unused, 0.0), v[:, :, union].masked_fill_(unused, 0.0)
        seen = allowed.any(-1)[..., None]  # [B, Hs, R, 1]
        if tail is not None:
            n = slice(start // block, -(-stop // block))
            mine = torch.arange(start, stop, device=q.device)[:, None] // block - n.start  # [R, 1]
            other = (mine != torch.arange(n.stop - n.start, device=q.device))[..., None]  # [R, n, 1]
            biases = tail.biases(q.dtype)[:, :, None, n].masked_fill(other, float("-inf")).flatten(-2)  # [B, Hs, R, 2 n]
            mask = torch.cat([mask, biases], -1)
            keys = torch.cat([keys, tail.keys[:, :, n].repeat_interleave(2, 2)], 2)
            values = torch.cat([values, tail.values[:, :, n].repeat_interleave(2, 2)], 2)
            seen = seen | (tail.number[:, :, n][:, :, mine] > 0)  # [B, Hs, R, 1]
        rows, mask = q[:, :, start:stop].reshape(B * Hs, Hq // Hs, stop - start, D), mask.flatten(0, 1)[:, None]
        keys, values = keys.reshape(B * Hs, Hkv // Hs, -1, D), values.reshape(B * Hs, Hkv // Hs, -1, Dv)
        seen = seen.flatten(0, 1)[:, None]
        tile = scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
        tile = torch.where(seen, tile, 0.0)
        if bool(tile.isnan().any()):
            tile = torch.where(seen, _attend_apart(rows, keys, values, mask, scale), 0.0)
        out[:, :, start:stop] = tile.reshape(B, Hq, stop - start, Dv)
    return out


def _attend_apart(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """scaled_dot_product_attention in which NaN and Inf reach only the queries that see them.

    q: `[N, H, R, D]`, k, v: `[N, H / G, K, D or Dv]`, mask: `[N, 1, R, K]`, added to the scores, -inf where a query does not see.
    """
    G, seen = q.shape[1] // k.shape[1], mask > float("-inf")
    k, v = (x.float().repeat_interleave(G, 1) for x in (k, v))
    scores = torch.where(seen, q.float() @ k.mT * scale + mask, float("-inf"))
    out = torch.softmax(scores, -1) @ v.nan_to_num(0.0, 0.0, 0.0)

    def reached(where: Tensor) -> Tensor:  # [N, H, R, Dv]
        return (seen.float() @ where.float()) > 0

    high, low = reached(v == float("inf")), reached(v == float("-inf"))
    out = out.masked_fill(high, float("inf")).masked_fill(low, float("-inf"))
    return out.masked_fill(reached(v.isnan()) | (high & low), float("nan")).to(q.dtype)
