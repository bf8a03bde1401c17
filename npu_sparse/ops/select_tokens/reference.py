"""select_tokens in eager PyTorch: a top-k whose ties are settled by position, not by chance."""

import torch
from torch import Tensor

from ...support import block_ends


def select_tokens(
    scores: Tensor, k: int, sink: int, recent: int, block: int, queries: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, Hs, Nq, Tk = scores.shape
    K = min(k, Tk)
    scores = _with_kept(scores, sink, recent, block, queries, valid)
    threshold = scores.topk(K, dim=-1, sorted=False).values.amin(-1, keepdim=True)  # [B, Hs, Nq, 1]
    above = scores > threshold
    tied = scores == threshold
    room = K - above.sum(-1, keepdim=True)
    member = above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))  # ties: the smaller position first
    member &= scores > float("-inf")
    count = member.sum(-1, dtype=torch.int32)
    indices = torch.full((B, Hs, Nq, K), -1, dtype=torch.int32, device=scores.device)
    rows = torch.arange(K, device=scores.device) < count[..., None]
    indices[rows] = member.nonzero()[:, -1].int()  # row-major, so positions ascend within a row
    return indices, count


def _with_kept(scores: Tensor, sink: int, recent: int, block: int, queries: int, valid: Tensor | None) -> Tensor:
    """Scores with +inf for the keys that are always kept."""
    if not sink and not recent:
        return scores
    Tk = scores.shape[-1]
    position = torch.arange(Tk, device=scores.device)
    last = block_ends(queries, Tk, block, scores.device)[:, None]  # [Nq, 1]
    first = Tk - queries + torch.arange(scores.shape[2], device=scores.device)[:, None] * block
    kept = (position > first - recent) & (position <= last) if recent else position < 0
    kept = kept[None, None]  # [1, 1, Nq, Tk]
    rank = position[None] if valid is None else valid.cumsum(-1) - 1  # sinks are the first *valid* keys
    kept = kept | (rank < sink)[:, None, None]
    return scores.masked_fill(kept & (scores > float("-inf")), float("inf"))
