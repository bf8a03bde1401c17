"""Exact answers, by definition.

The `naive_*` functions follow arXiv 2606.07703 line by line over whole `[Tq, Tk]` matrices and share no code with the operators'
references. In float64 they are the exact answer; in another dtype they are a yardstick for rounding.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..support import Support


def naive_attention_mass(
    q: Tensor, k: Tensor, *, scale: float, reduce_block: int = 1, reduce: str = "max", per_kv: bool = False,
    valid: Tensor | None = None, dtype=torch.float64,
) -> Tensor:  # fmt: skip
    """Attention mass by definition, in `dtype`: `A = softmax(q k)`, `P = mean over heads`, then one row per block."""
    Hq, Hkv = q.shape[1], k.shape[1]
    sees = _sees(q.shape[0], q.shape[2], k.shape[2], valid, q.device)
    weights = _weights(q, k, scale, sees[:, None].expand(-1, Hq, -1, -1), dtype)  # [B, Hq, Tq, Tk]
    groups = [range(h * Hq // Hkv, (h + 1) * Hq // Hkv) for h in range(Hkv)] if per_kv else [range(Hq)]
    mass = torch.stack([sum(weights[:, h] for h in group) / len(group) for group in groups], 1)
    return _over_blocks(mass, sees[:, None], reduce_block, reduce, nothing=0.0)


def naive_index_scores(
    qi: Tensor, ki: Tensor, w: Tensor | None = None, *, block: int = 1, reduce: str = "max",
    valid: Tensor | None = None, partition: Tensor | None = None, dtype=torch.float64, products: Callable | None = None,
) -> Tensor:  # fmt: skip
    """Index scores by definition, in `dtype`: `z = sum_h w ReLU(q k / sqrt(Di))`, then one row per block.

    products: `products(a [B, M, D], b [B, N, D])` -> `a b^T` in place of torch's, such as `plain_products`.
    """
    z, sees = _index_scores_of_queries(qi, ki, w, valid, dtype, products)
    wide = z if dtype == torch.float64 else z.float()
    if reduce == "mean":
        z = _normalised(wide, sees)
    if reduce == "softmax_max":
        own = _log_sum_exp(wide, sees) if partition is None else partition.to(wide.dtype)
        z, reduce = wide - own[..., None], "max"
    return _over_blocks(z, sees, block, reduce, nothing=float("-inf"))


def naive_index_partition(
    qi: Tensor, ki: Tensor, w: Tensor | None = None, *, valid: Tensor | None = None, dtype=torch.float64,
    products: Callable | None = None,
) -> Tensor:  # fmt: skip
    """Every query's log-partition of its index scores by definition, in `dtype`."""
    z, sees = _index_scores_of_queries(qi, ki, w, valid, dtype, products)
    return _log_sum_exp(z if dtype == torch.float64 else z.float(), sees)


def _index_scores_of_queries(qi, ki, w, valid, dtype, products) -> tuple[Tensor, Tensor]:
    """`z [B, Tq, Tk]`, and who sees whom."""
    sees = _sees(qi.shape[0], qi.shape[2], ki.shape[1], valid, qi.device)
    z = torch.zeros(sees.shape, dtype=dtype, device=qi.device)  # [B, Tq, Tk]
    for h in range(qi.shape[1]):
        product = qi[:, h].to(dtype) @ ki.to(dtype).mT if products is None else products(qi[:, h], ki)
        product = product / qi.shape[-1] ** 0.5
        weight = 1.0 if w is None else w[:, :, h, None].to(dtype)
        z = z + weight * torch.where(product <= 0, 0.0, product)
    return z, sees


def naive_select_tokens(
    scores: Tensor, *, k: int, sink: int = 0, recent: int = 0, block: int = 1, queries: int | None = None,
    valid: Tensor | None = None,
) -> Support:  # fmt: skip
    """The top-k by sorting each row in Python, `(score, then smaller position)`, kept keys first."""
    scores = scores[:, None] if scores.ndim == 3 else scores
    B, Hs, Nq, Tk = scores.shape
    Tq = min(Nq * block, Tk) if queries is None else queries
    indices = torch.full((B, Hs, Nq, min(k, Tk)), -1, dtype=torch.int32)
    count = torch.zeros(B, Hs, Nq, dtype=torch.int32)
    for b in range(B):
        real = [s for s in range(Tk) if valid is None or bool(valid[b, s])]
        for h in range(Hs):
            for n in range(Nq):
                row = scores[b, h, n].tolist()
                positions = [Tk - Tq + t for t in range(n * block, min((n + 1) * block, Tq))]
                kept = {s for t in positions for s in range(t - recent + 1, t + 1)} | set(real[:sink])
                visible = [s for s in range(Tk) if row[s] > float("-inf") or (math.isnan(row[s]) and s in kept)]
                order = sorted(visible, key=lambda s: (s not in kept, -row[s] if s not in kept else 0.0, s))
                chosen = sorted(order[: min(k, Tk)])
                indices[b, h, n, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
                count[b, h, n] = len(chosen)
    return Support(indices.to(scores.device), count.to(scores.device), block)


def naive_select_two_level(
    qi: Tensor, ki: Tensor, w: Tensor | None = None, *, k: int, candidates: int, key_block: int = 64, block: int = 1,
    reduce: str = "max", sink: int = 0, recent: int = 0, valid: Tensor | None = None, partition: Tensor | None = None,
    dtype=torch.float64,
) -> Support:  # fmt: skip
    """Two-level selection by definition, group by group and block by block: exact in float64 but for the rounding of the blocks'
    bounds to the input dtype. `valid` has its padding on one side."""
    B, Hi, Tq, Di = qi.shape
    Tk, group = ki.shape[1], max(block, 64)
    starts = range(0, Tk, key_block)
    touched = [(n + key_block - 2) // key_block + 1 for n in (max(sink, 1), group + max(recent, 1) - 1)]
    most = -(-candidates // key_block) + sum(touched)
    real = torch.ones(B, Tk, dtype=torch.bool) if valid is None else valid.cpu()
    scored = torch.full((B, -(-Tq // block), Tk), float("-inf"), dtype=torch.float64)
    for b in range(B):
        for first in range(0, Tq, group):
            queries = [t for t in range(first, min(first + group, Tq)) if real[b, Tk - Tq + t]]
            ahead = Tk - Tq + min(first + group, Tq)
            begins = Tk - Tq + first
            sinks = real[b].nonzero()[: max(sink, 1), 0].tolist()
            ranked = {}
            for s in starts:
                keys = [i for i in range(s, min(s + key_block, Tk)) if real[b, i]]
                if s >= ahead or not keys:
                    continue
                if s + key_block > begins - max(recent, 1) + 1:
                    ranked[s] = (2, 0.0)
                elif set(keys) & set(sinks):
                    ranked[s] = (1, 0.0)
                elif queries:
                    rows = ki[b, keys].cpu()
                    mean = rows.double().mean(0)
                    high, low = (((mean + rows.double().amax(0)) / 2), ((mean + rows.double().amin(0)) / 2))
                    high, low = high.to(ki.dtype).to(dtype), low.to(ki.dtype).to(dtype)
                    score = torch.zeros(len(queries), dtype=dtype)
                    for h in range(Hi):
                        q = qi[b, h, queries].cpu().to(dtype)
                        z = (torch.where(q > 0, high, low) * q).sum(-1).clamp(min=0)
                        score += z if w is None else z * w[b, queries, h].cpu().to(dtype)
                    if partition is not None:
                        score -= partition[b, queries].cpu().to(dtype)
                    ranked[s] = (0, float(score.max()))
            best = sorted(ranked, key=lambda s: (-ranked[s][0], -ranked[s][1], s))[:most]
            keys = torch.tensor([i for s in sorted(best) for i in range(s, min(s + key_block, ahead))])
            seen = real.clone()
            seen[b, [i for i in range(Tk) if i not in set(keys.tolist())]] = False
            seen[b, begins:ahead] = real[b, begins:ahead]
            part = naive_index_scores(
                qi[b : b + 1, :, first : first + group], ki[b : b + 1, :ahead],
                None if w is None else w[b : b + 1, first : first + group], block=block, reduce=reduce,
                partition=None if partition is None else partition[b : b + 1, first : first + group],
                valid=seen[b : b + 1, :ahead].to(qi.device), dtype=dtype,
            )  # fmt: skip
            scored[b, first // block : first // block + part.shape[1], :ahead] = part[0].double().cpu()
    return naive_select_tokens(
        scored.to(qi.device), k=k, sink=sink, recent=recent, block=block, queries=Tq, valid=valid
    )


def naive_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, support: Support, *, scale: float, dtype=torch.float64
) -> Tensor:
    """Dense attention in `dtype` under the mask that support and causality leave; zeros where they leave nothing."""
    Hq, Hkv = q.shape[1], k.shape[1]
    allowed = _allowed(q, k, support)
    selected = allowed.any(2).unflatten(1, (Hkv, -1)).any(2)[..., None]  # what nobody selects may hold anything
    k, v = k.where(selected, 0.0), v.where(selected, 0.0)
    weights = _weights(q, k, scale, allowed, dtype)
    return (weights.to(dtype) @ v.to(dtype).repeat_interleave(Hq // Hkv, 1)).to(dtype)


def naive_sparse_attention_with_tail(
    q: Tensor, k: Tensor, v: Tensor, support: Support, *, scale: float, valid: Tensor | None = None, dtype=torch.float64
) -> Tensor:
    """Sparse attention and its tail by definition, in `dtype`, block by block and query by query."""
    B, Hq, Tq, _ = q.shape
    group, Tk = Hq // k.shape[1], k.shape[2]
    allowed, count = _allowed(q, k, support), support.count.tolist()
    q, k, v = q.to(dtype), k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
    out = torch.zeros(B, Hq, Tq, v.shape[-1], dtype=dtype, device=q.device)
    for b in range(B):
        real = [s for s in range(Tk) if valid is None or bool(valid[b, s])]
        for n in range(len(count[b][0])):
            first = Tk - Tq + n * support.block
            before = [s for s in real if s <= first]
            mean_k, mean_v = k[b, :, before].mean(1), v[b, :, before].mean(1)  # [Hq, D]
            for h in range(Hq):
                row = h * support.indices.shape[1] // Hq
                held = count[b][row][n]
                left = len(before) - int((support.indices[b, row, n, :held] <= first).sum())
                for t in range(n * support.block, min((n + 1) * support.block, Tq)):
                    read = allowed[b, h, t].nonzero()[:, 0]
                    scores, values = (q[b, h, t] * k[b, h][read]).sum(-1) * scale, v[b, h][read]
                    if held and left > 0:
                        scores = torch.cat([scores, (q[b, h, t] * mean_k[h, None]).sum(-1) * scale + math.log(left)])
                        values = torch.cat([values, mean_v[h, None]])
                    out[b, h, t] = torch.softmax(scores, 0) @ values
    return out


def _allowed(q: Tensor, k: Tensor, support: Support) -> Tensor:
    """Bool `[B, Hq, Tq, Tk]`: the query's support holds the key, and the query sees it."""
    B, Hq, Tq, _ = q.shape
    Tk, Hs = k.shape[2], support.indices.shape[1]
    indices, count = support.indices.tolist(), support.count.tolist()
    allowed = torch.zeros(B, Hs, Tq, Tk, dtype=torch.bool)
    for b in range(B):
        for row in range(Hs):
            for t in range(Tq):
                n = t // support.block
                chosen = [s for s in indices[b][row][n][: count[b][row][n]] if s <= Tk - Tq + t]
                allowed[b, row, t, chosen] = True
    return allowed.repeat_interleave(Hq // Hs, 1).to(q.device)


def _sees(B: int, Tq: int, Tk: int, valid: Tensor | None, device) -> Tensor:
    """Bool `[B, Tq, Tk]`: query t, at position Tk - Tq + t, sees key s; padding sees nothing and is not seen."""
    sees = torch.ones(Tq, Tk, dtype=torch.bool, device=device).tril(Tk - Tq).expand(B, -1, -1)
    return sees if valid is None else sees & valid[:, None] & valid[:, Tk - Tq :, None]


def _weights(q: Tensor, k: Tensor, scale: float, sees: Tensor, dtype) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.to(dtype) @ k.to(dtype).mT * scale  # [B, Hq, Tq, Tk]
    return _normalised(scores if dtype == torch.float64 else scores.float(), sees)


def _normalised(scores: Tensor, sees: Tensor) -> Tensor:
    """Softmax over the keys that are seen; a row that sees nothing is zero."""
    highest = scores.masked_fill(~sees, -1e30).amax(-1, keepdim=True)
    shares = torch.where(sees, (scores - highest).exp(), 0.0)
    return shares / shares.sum(-1, keepdim=True).clamp(min=1e-30)


def _log_sum_exp(scores: Tensor, sees: Tensor) -> Tensor:
    """The logarithm of the sum of exponentials over the keys that are seen; -inf where none is."""
    highest = scores.masked_fill(~sees, -1e30).amax(-1, keepdim=True)
    return torch.where(sees, (scores - highest).exp(), 0.0).sum(-1).log() + highest[..., 0]


def _over_blocks(rows: Tensor, sees: Tensor, block: int, reduce: str, nothing: float) -> Tensor:
    """One row per block of queries (dimension -2); `nothing` where no query of the block sees the key."""
    out = []
    for first in range(0, rows.shape[-2], block):
        part, seen = rows[..., first : first + block, :], sees[..., first : first + block, :]
        if reduce == "max":
            row = part.masked_fill(~seen, float("-inf")).amax(-2)
        else:
            live = seen.any(-1, keepdim=True).sum(-2).clamp(min=1)  # queries that see anything at all
            row = part.masked_fill(~seen, 0.0).sum(-2) / live
        out.append(row.masked_fill(~seen.any(-2), nothing))
    return torch.stack(out, -2)
