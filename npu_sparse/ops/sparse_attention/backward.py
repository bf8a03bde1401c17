"""Gradients of sparse attention: those of dense attention through the selected keys. Nothing is kept from the forward; scores are
computed again for a tile of queries at a time, over the union of its supports.

With P the weights of a query and dP = dO v^T: dv = P^T dO, dS = P (dP - sum(P dP)), dq = dS k scale, dk = dS^T q scale. The
supports are constants: what is selected has no gradient."""

import torch
from torch import Tensor

from ..slices import slices
from .reference import Tail


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, count: Tensor, block: int, scale: float,
    tail: Tail | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of q, k and v, and with `tail` of its keys and values, in their shapes: fp32, or fp64 for fp64 inputs."""
    B, Hq, Tq, _ = q.shape
    Hkv, Tk = k.shape[1], k.shape[2]
    Hs, G = indices.shape[1], Hq // Hkv
    wide = torch.promote_types(q.dtype, torch.float32)
    inputs = (q, k, v) if tail is None else (q, k, v, tail.keys, tail.values)
    results = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in inputs]
    dq, dk, dv = results[:3]
    slots = torch.where(torch.arange(indices.shape[-1], device=q.device) < count[..., None], indices, Tk).long()
    for start, stop in slices(Tq, B * Hq * Tk * block, block):
        blocks = slots[:, :, start // block : -(-stop // block)]
        member = torch.zeros(*blocks.shape[:3], Tk + 1, dtype=torch.bool, device=q.device).scatter_(-1, blocks, True)
        union = member[..., :Tk].flatten(0, 2).any(0).nonzero()[:, 0]  # [U]
        member = member[..., union].repeat_interleave(block, 2)[:, :, : stop - start]  # [B, Hs, R, U]
        position = torch.arange(start, stop, device=q.device) + Tk - Tq
        sees = (member & (union <= position[:, None])).repeat_interleave(Hkv // Hs, 1)[:, :, None]  # [B, Hkv, 1, R, U]
        read = sees.any(3)[:, :, 0, :, None]  # [B, Hkv, U, 1]; what nobody reads may be NaN
        keys, values = (x[:, :, union].to(wide).masked_fill(~read, 0.0)[:, :, None] for x in (k, v))  # [B, Hkv, 1, U, D]
        queries, above = (x[:, :, start:stop].to(wide).unflatten(1, (Hkv, G)) for x in (q, grad))  # [B, Hkv, G, R, D]
        scores = (queries @ keys.mT * scale).masked_fill(~sees, float("-inf"))
        if tail is not None:
            n = torch.arange(start, stop, device=q.device) // block
            number = tail.number.to(wide).repeat_interleave(Hkv // Hs, 1)[:, :, n]  # [B, Hkv, R]
            tail_keys, tail_values = (x[:, :, n].to(wide)[:, :, None] for x in (tail.keys, tail.values))  # [B, Hkv, 1, R, D]
            score = (queries * tail_keys).sum(-1, keepdim=True) * scale + number.log()[:, :, None, :, None]
            scores = torch.cat([scores, score], -1)
        towards = above @ values.mT
        if tail is not None:
            towards = torch.cat([towards, (above * tail_values).sum(-1, keepdim=True)], -1)
        weights, flow = through_softmax(scores, towards, scale)  # [B, Hkv, G, R, U (+ 1)]
        if tail is not None:
            weights, rest = weights[..., :-1], weights[..., -1:]
            flow, drift = flow[..., :-1], flow[..., -1:]
            here = slice(start // block, start // block + blocks.shape[2])
            results[3][:, :, here] += block_sums((drift * queries).sum(2), block)
            results[4][:, :, here] += block_sums((rest * above).sum(2), block)
        dq[:, :, start:stop] = (flow @ keys + (drift * tail_keys if tail is not None else 0.0)).flatten(1, 2)
        dk.index_add_(2, union, (flow.mT @ queries).sum(2))
        dv.index_add_(2, union, (weights.mT @ above).sum(2))
    return tuple(results)


def block_sums(rows: Tensor, block: int) -> Tensor:
    """[B, H, R, D] -> [B, H, ceil(R / block), D], always in one order: `index_add_` would add in any on CUDA."""
    rows = torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[2] % block))
    return rows.unflatten(2, (-1, block)).sum(3)


def through_softmax(scores: Tensor, towards: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The softmax weights of scores, zero where those are -inf, and the gradient of the products before `scale`.

    towards: the gradient of the weights.
    """
    weights = torch.softmax(scores, -1).masked_fill(scores == float("-inf"), 0.0)
    return weights, weights * (towards - (weights * towards).sum(-1, keepdim=True)) * scale


def sparse_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, count: Tensor, block: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = gradients(grad, q, k, v, indices, count, block, scale)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
