"""dense_rows in eager PyTorch: PyTorch's own attention of a few rows at a time under their mask, `[rows, Tk]`."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..slices import slices
from ..sparse_attention.backward import through_softmax


def dense_rows(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, valid: Tensor | None) -> Tensor:
    B, Hq, R, _ = q.shape
    Tk = k.shape[2]
    place = torch.arange(Tk, device=q.device)
    used = place <= positions.amax(1, keepdim=True)  # [B, Tk]
    if valid is not None:
        used = used & valid
    # keys that no row sees may be NaN, which a weight of zero would not hide
    k, v = (x.masked_fill(~used[:, None, :, None], 0.0) for x in (k, v))
    out = q.new_zeros((B, R, Hq, v.shape[-1])).transpose(1, 2)
    for rows in (slice(*ends) for ends in slices(R, B * Hq * Tk)):
        sees = (place <= positions[:, rows, None]) & used[:, None]  # [B, rows, Tk]
        blind = ~sees.any(-1, keepdim=True)
        tile = scaled_dot_product_attention(
            q[:, :, rows], k, v, attn_mask=(sees | blind)[:, None], scale=scale, enable_gqa=True
        )  # [B, Hq, rows, Dv]
        out[:, :, rows] = tile.masked_fill(blind[:, None], 0.0)
    return out


def dense_rows_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v by the formulas of sparse attention; scores are computed again."""
    B, Hq, R, _ = q.shape
    Hkv, Tk = k.shape[1], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    place = torch.arange(Tk, device=q.device)
    used = place <= positions.amax(1, keepdim=True)  # [B, Tk]
    if valid is not None:
        used = used & valid
    keys, values = (x.to(wide).masked_fill(~used[:, None, :, None], 0.0)[:, :, None] for x in (k, v))  # [B, Hkv, 1, Tk, D]
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    for rows in (slice(*ends) for ends in slices(R, B * Hq * Tk)):
        sees = ((place <= positions[:, rows, None]) & used[:, None])[:, None, None]  # [B, 1, 1, rows, Tk]
        queries, above = (x[:, :, rows].to(wide).unflatten(1, (Hkv, -1)) for x in (q, grad))  # [B, Hkv, G, rows, D]
        scores = (queries @ keys.mT * scale).masked_fill(~sees, float("-inf"))
        weights, flow = through_softmax(scores, above @ values.mT, scale)
        dq[:, :, rows] = (flow @ keys).flatten(1, 2)
        dk += (flow.mT @ queries).sum(2)
        dv += (weights.mT @ above).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
