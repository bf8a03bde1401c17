"""index_heads in eager PyTorch, and the rotation that an IndexHead is trained with."""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm


def rotary_for(table: Tensor, dim: int) -> Tensor:
    """The model's cos or sin table `[..., R]` cut to at most `dim` dimensions, keeping the whole range of frequencies."""
    R = table.shape[-1]
    if R <= dim:
        return table
    half = table[..., [i * (R // 2) // (dim // 2) for i in range(dim // 2)]]
    return torch.cat([half, half], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (half-split) of the first `cos.shape[-1]` dimensions of x; the rest pass through."""
    R = cos.shape[-1]
    turned, rest = x[..., :R], x[..., R:]
    half = torch.cat([-turned[..., R // 2 :], turned[..., : R // 2]], -1)
    turned = turned * cos.to(x.dtype) + half * sin.to(x.dtype)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def index_heads(
    queries: Tensor, keys: Tensor, weights: Tensor | None, dots: Tensor | None, hidden: Tensor, cos: Tensor, sin: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, line: Tensor | None, eps: float, start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, D = keys.shape
    cos, sin = rotary_for(cos, D), rotary_for(sin, D)
    qi = rotate(queries.unflatten(-1, (-1, D)).transpose(1, 2), cos[:, None], sin[:, None]).contiguous()  # [B, Hi, T, Di]
    normed = layer_norm(keys, (D,), norm_weight.to(keys.dtype), norm_bias.to(keys.dtype), eps)
    ki = rotate(normed, cos, sin).contiguous()
    w = queries.new_empty(0) if weights is None else (weights * weights.shape[-1] ** -0.5).contiguous()
    c = torch.empty(0, device=keys.device)
    if dots is not None:
        seen = torch.arange(start + 1, start + T + 1, device=keys.device)
        bias, growth = line.float()
        c = (dots + torch.addcmul(bias, growth, seen.log())).contiguous()
    made = qi.isfinite().all(-1).all(1) & ki.isfinite().all(-1)
    made = made if weights is None else made & w.isfinite().all(-1)
    return qi, ki, w, c, torch.stack([hidden.isfinite().all(-1), made])
