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
    rows = scores.flatten(0, 2)  # [B * Hs * Nq, Tk]
    least = rows.topk(K, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    least = least.clamp(min=torch.finfo(rows.dtype).min)  # -inf is never selected
    row, position = (rows >= least).nonzero().unbind(1)  # row-major, so positions ascend within a row
    row, position, count = _without_surplus_ties(row, position, rows[row, position] == least[row, 0], K, len(rows))
    slot = torch.arange(len(row), device=rows.device) - (count.cumsum(0) - count)[row]
    indices = torch.full((len(rows), K), -1, dtype=torch.int32, device=rows.device)
    indices[row, slot] = position.int()
    return indices.view(B, Hs, Nq, K), count.int().view(B, Hs, Nq)


def _without_surplus_ties(row: Tensor, position: Tensor, tied: Tensor, K: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of at most K per row, and their count: of those tied at the threshold, the smaller positions stay."""
    count = torch.bincount(row, minlength=rows)
    ties = torch.bincount(row[tied], minlength=rows)
    rank = tied.cumsum(0) - (ties.cumsum(0) - ties)[row]  # 1-based, among the row's ties
    keep = ~tied | (rank <= (K - (count - ties))[row])
    return row[keep], position[keep], count.clamp(max=K)


def _with_kept(scores: Tensor, sink: int, recent: int, block: int, queries: int, valid: Tensor | None) -> Tensor:
    """Scores with +inf for the keys that are always kept, below that for all others, and -inf for those that are NaN."""
    if not sink and not recent:
        return scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    Tk = scores.shape[-1]
    position = torch.arange(Tk, device=scores.device)
    last = block_ends(queries, Tk, block, scores.device)[:, None]  # [Nq, 1]
    first = Tk - queries + torch.arange(scores.shape[2], device=scores.device)[:, None] * block
    kept = (position > first - recent) & (position <= last) if recent else position < 0
    kept = kept[None, None]  # [1, 1, Nq, Tk]
    rank = position[None] if valid is None else valid.cumsum(-1) - 1  # sinks are the first *valid* keys
    kept = kept | (rank < sink)[:, None, None]
    kept = kept & (scores != float("-inf"))
    return scores.nan_to_num(nan=float("-inf"), neginf=float("-inf")).masked_fill_(kept, float("inf"))
