"""dense_rows in eager PyTorch: PyTorch's own attention of a few rows at a time under their mask, `[rows, Tk]`."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .. import workspace


def dense_rows(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, valid: Tensor | None) -> Tensor:
    B, Hq, R, _ = q.shape
    Tk = k.shape[2]
    place = torch.arange(Tk, device=q.device)
    used = place <= positions.amax(1, keepdim=True)  # [B, Tk]
    if valid is not None:
        used = used & valid
    # what no row sees may hold anything: it must not reach one as 0 * NaN
    k, v = (x.masked_fill(~used[:, None, :, None], 0.0) for x in (k, v))
    out = q.new_zeros((B, R, Hq, v.shape[-1])).transpose(1, 2)
    step = max(1, workspace.elements() // (B * Hq * Tk))
    for start in range(0, R, step):
        rows = slice(start, start + step)
        sees = (place <= positions[:, rows, None]) & used[:, None]  # [B, rows, Tk]
        blind = ~sees.any(-1, keepdim=True)
        tile = scaled_dot_product_attention(
            q[:, :, rows], k, v, attn_mask=(sees | blind)[:, None], scale=scale, enable_gqa=True
        )  # [B, Hq, rows, Dv]
        out[:, :, rows] = tile.masked_fill(blind[:, None], 0.0)
    return out
