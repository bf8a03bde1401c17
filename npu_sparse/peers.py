"""Published training-free rules as Selectors, so that they can be compared at the same budgets.

Each rule ranks keys or blocks of keys; the best are kept until the budget's k keys of a row are used, so that peers, oracle and
indexer are compared at equal retained pairs. `top_p` is the published way to stop earlier: the fewest best blocks whose share of
the estimated attention reaches it (1.0 = the budget decides alone). Supports are one per KV group, the finest that the runtime
serves, where the published rules have one per query head; estimates are averaged over a group's heads. `Budget.sink` and
`recent` are kept as for any selector; of blocks, that of the last query always. `Budget.reduce` changes nothing.

The code is our own, after the papers' formulas. It measures their choice of keys, not their kernels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from . import ops
from .budget import Budget
from .selectors import LayerInputs, select_by_scores
from .support import Support, block_ends

EVIDENCE = "training-free"


class PooledBlocks:
    """Blocks of keys by pooled queries and keys (FlexPrefill's query-aware index: Lai et al., 2025, arXiv 2502.20766).

    `softmax over blocks of (<mean query of the block, mean key of a block> * scale)`, the mean over a KV group's heads; the best
    blocks until their sum reaches top_p or k keys are used. (FlexPrefill chooses by head between this and a vertical-slash
    pattern; here it is this one for all heads.)
    """

    evidence, indexer = EVIDENCE, None

    def __init__(self, top_p: float = 1.0, key_block: int = 64):
        self.top_p, self.key_block = _check_top_p(top_p), _check_key_block(key_block)
        self.name = f"pooled blocks, top-p {top_p:g}"

    def select(self, inputs: LayerInputs, budget: Budget) -> Support:
        return _select_blocks(self, inputs, budget, self._probabilities)

    def _probabilities(self, inputs: LayerInputs, block: int, start: int, stop: int, end: int, valid: Tensor | None) -> Tensor:
        Hkv = inputs.k.shape[1]
        offset = end - (stop - start)
        theirs = None if valid is None else valid[:, offset:end]
        queries = _means(inputs.q[:, :, start:stop].float(), block, theirs)  # [B, Hq, Nq, D]
        keys = _means(inputs.k[:, :, :end].float(), self.key_block, valid)  # [B, Hkv, Nk, D]
        scores = queries.unflatten(1, (Hkv, -1)) @ keys.mT[:, :, None] * inputs.scale  # [B, Hkv, G, Nq, Nk]
        sees = _blocks_seen(stop - start, end, block, self.key_block, valid, scores.device)
        return _softmax(scores, sees[:, None, None]).mean(2)


class Antidiagonal:
    """Blocks of keys by the antidiagonals of attention within a block (XAttention: Xu et al., 2025, arXiv 2503.16428).

    Queries and keys are taken in groups of `stride`; the sum over s of `<q[stride - 1 - s], k[s]>` of two groups is that of an
    antidiagonal of their scores, which crosses every vertical and every slash of the group. A softmax over the groups of keys,
    summed over the groups of a block, ranks the blocks; the best until top_p or k keys.
    """

    evidence, indexer = EVIDENCE, None

    def __init__(self, top_p: float = 1.0, key_block: int = 64, stride: int = 8):
        self.top_p, self.key_block = _check_top_p(top_p), _check_key_block(key_block)
        if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1 or key_block % stride:
            raise ValueError(f"stride must divide the key block of {key_block}, got {stride!r}")
        self.stride = stride
        self.name = f"antidiagonal blocks, top-p {top_p:g}"

    def select(self, inputs: LayerInputs, budget: Budget) -> Support:
        if budget.block % self.stride:
            raise ValueError(f"block must be a multiple of the stride of {self.stride} for {self.name}, got {budget.block}")
        return _select_blocks(self, inputs, budget, self._probabilities)

    def _probabilities(self, inputs: LayerInputs, block: int, start: int, stop: int, end: int, valid: Tensor | None) -> Tensor:
        Hkv, S = inputs.k.shape[1], self.stride
        queries, keys = inputs.q[:, :, start:stop].float(), inputs.k[:, :, :end].float()
        if valid is not None:
            theirs = valid[:, end - (stop - start) :]
            queries = queries.masked_fill(~theirs[:, None, :, None], 0.0)
            keys = keys.masked_fill(~valid[:, None, :, None], 0.0)
        queries = _grouped(queries, S).flip(-2).flatten(-2)  # [B, Hq, Tq / S, S * D]
        keys = _grouped(keys, S).flatten(-2)  # [B, Hkv, Tk / S, S * D]
        scores = queries.unflatten(1, (Hkv, -1)) @ keys.mT[:, :, None] * (inputs.scale / S)  # [B, Hkv, G, Tq / S, Tk / S]
        sees = _blocks_seen(stop - start, end, S, S, valid, scores.device)
        rows = _softmax(scores, sees[:, None, None]).mean(2)  # [B, Hkv, Tq / S, Tk / S]
        if valid is not None:  # a group of padding has no part in its block
            rows = rows * (_grouped(theirs[..., None].to(rows.dtype), S).amax(-2) > 0)[:, None]
        by_keys = _grouped(rows.mT, self.key_block // S).sum(-2)  # [B, Hkv, Nk, Tq / S]
        by_both = _grouped(by_keys.mT, block // S).sum(-2)  # [B, Hkv, Nq, Nk]
        return by_both / by_both.sum(-1, keepdim=True).clamp(min=1e-30)


class VerticalSlash:
    """Columns and diagonals of attention that the last queries look at (MInference: Jiang et al., 2024, arXiv 2407.02490).

    The attention of the last `last` queries of the forward is summed by key (verticals) and by distance (slashes). Published is a
    number of each, found offline for every head; here a key is as good as the better of its vertical and its slash, and the best
    are kept until k keys of a row are used.
    """

    evidence, indexer = EVIDENCE, None

    def __init__(self, last: int = 64):
        if isinstance(last, bool) or not isinstance(last, int) or last < 1:
            raise ValueError(f"last must be a positive number of queries, got {last!r}")
        self.last, self.name = last, f"vertical-slash of the last {last} queries"

    def select(self, inputs: LayerInputs, budget: Budget) -> Support:
        Tq, Tk = inputs.q.shape[2], inputs.k.shape[2]
        with inputs.stage("scoring"):
            n = min(self.last, Tq)
            mass = ops.attention_mass(
                inputs.q[:, :, Tq - n :], inputs.k, scale=inputs.scale, per_kv=True, valid=inputs.valid, impl=inputs.impl
            )  # [B, Hkv, n, Tk]
            vertical = mass.sum(2)  # [B, Hkv, Tk]
            distance = torch.arange(Tk - n, Tk, device=mass.device)[:, None] - torch.arange(Tk, device=mass.device)  # [n, Tk]
            place = distance.clamp(min=0).expand_as(mass).flatten(2)
            slash = torch.zeros_like(vertical).scatter_add_(2, place, mass.masked_fill(distance < 0, 0.0).flatten(2))
            # a block holds the slash of a distance for its first query up to its last: the best over so many distances
            best = max_pool1d(pad(slash, (budget.block - 1, 0)), budget.block, 1)  # [B, Hkv, Tk], by distance from the last query

        def score(start, stop, end, valid):
            ends = block_ends(stop - start, end, budget.block, mass.device)  # [Nq]
            away = ends[:, None] - torch.arange(end, device=mass.device)  # [Nq, end]
            near = best[:, :, away.clamp(min=0)].masked_fill(away < 0, 0.0)  # [B, Hkv, Nq, end]
            return torch.maximum(near, vertical[:, :, None, :end])

        return select_by_scores(inputs, budget, score, heads=inputs.k.shape[1])


def choose_anchors(similarity: Tensor, count: int) -> tuple[int, ...]:
    """The `count` layers that serve all best, by place among the full-attention layers (Kascade, 2025: anchors and reuse).

    Every layer reads the support of the last anchor up to it, the first layer is one, and the sum of `similarity[anchor, layer]`
    is the largest; by dynamic programming over the layers. `Budget(anchors=...)` takes the layers themselves.

    Args:
        similarity: `[L, L]`, what layer j keeps with the support of layer i, see `anchor_similarity`; j < i is not read.
    """
    L = similarity.shape[0]
    if similarity.shape != (L, L):
        raise ValueError(f"similarity must be square, got shape {tuple(similarity.shape)}")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= L:
        raise ValueError(f"count must lie in [1, {L}], the number of layers, got {count!r}")
    served = similarity.double().triu().cumsum(1)  # [i, j]: layers i to j read i
    best = {(L, 0): (0.0, ())}  # (first layer that is left, anchors that are left): value and anchors
    for left in range(1, count + 1):
        for start in range(L - left, -1, -1):
            options = [
                (float(served[start, stop - 1]) + best[stop, left - 1][0], (start, *best[stop, left - 1][1]))
                for stop in range(start + 1, L + 1) if (stop, left - 1) in best
            ]  # fmt: skip
            best[start, left] = max(options, key=lambda option: option[0])
    return best[0, count][1]


@torch.no_grad()
def anchor_similarity(model, prompts: Sequence[Tensor], budget: Budget, impl: str = "auto") -> Tensor:
    """Float64 `[L, L]`: the attention mass that layer j keeps with the oracle's support of layer i, over that with its own.

    Means over prompts (int64 `[T]` each) of a sample of queries of the second half, on dense hidden states. All layers' queries
    and keys of one prompt are held at a time.
    """
    from .oracle.quality import sampled_retained_mass
    from .prefill import SparsePrefill
    from .selectors import Dense, Oracle

    total = None
    for ids in prompts:
        seen: list[LayerInputs] = []
        every = Budget(k=len(ids), block=budget.block)
        with SparsePrefill.attach(model, Dense(), every, impl=impl, observe=lambda given, *_, seen=seen: seen.append(given)):
            model(input_ids=ids[None].to(model.device), use_cache=False, logits_to_keep=1)
        supports = [Oracle().select(given, budget) for given in seen]
        kept = torch.tensor([[sampled_retained_mass(given, support) for given in seen] for support in supports])
        kept = kept.double() / kept.double().diagonal()
        total = kept if total is None else total + kept
    return total / len(prompts)


def _select_blocks(peer, inputs: LayerInputs, budget: Budget, probabilities) -> Support:
    """The Support of the keys of the best blocks, of those that `peer.top_p` leaves."""

    def score(start, stop, end, valid):
        shares = probabilities(inputs, budget.block, start, stop, end, valid)  # [B, Hkv, Nq, Nk]
        own = block_ends(stop - start, end, budget.block, shares.device) // peer.key_block  # [Nq]
        if peer.top_p < 1:
            ranked, order = shares.sort(dim=-1, descending=True, stable=True)
            enough = ranked.cumsum(-1) - ranked >= peer.top_p
            shares = shares.scatter(-1, order, ranked.masked_fill(enough, float("-inf")))
        shares = shares.scatter(-1, own[:, None].expand(*shares.shape[:3], 1), 2.0)  # more than any share
        return shares.repeat_interleave(peer.key_block, -1)[..., :end].clone()

    return select_by_scores(inputs, budget, score, heads=inputs.k.shape[1])


def _grouped(x: Tensor, size: int) -> Tensor:
    """`[..., T, D]` -> `[..., ceil(T / size), size, D]`, the last group filled up with zeros."""
    return pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))


def _means(x: Tensor, size: int, valid: Tensor | None) -> Tensor:
    """`[B, H, ceil(T / size), D]`: the mean of every group of x `[B, H, T, D]` over its valid rows."""
    real = x.new_ones(1, 1, x.shape[2], 1) if valid is None else valid[:, None, :, None].to(x.dtype)
    x = x if valid is None else x.masked_fill(~valid[:, None, :, None], 0.0)  # padding may hold anything
    return _grouped(x, size).sum(-2) / _grouped(real, size).sum(-2).clamp(min=1)


def _blocks_seen(queries: int, keys: int, block: int, key_block: int, valid: Tensor | None, device) -> Tensor:
    """Bool `[B or 1, Nq, Nk]`: a key of the block is valid, and the last query of the block does not stand before the first."""
    first = torch.arange(0, keys, key_block, device=device)
    sees = (first <= block_ends(queries, keys, block, device)[:, None])[None]
    if valid is None:
        return sees
    return sees & (_grouped(valid[..., None].to(torch.uint8), key_block).amax(-2)[..., 0] > 0)[:, None]


def _softmax(scores: Tensor, sees: Tensor) -> Tensor:
    """Softmax over what is seen; a row that sees nothing is zero."""
    return scores.masked_fill(~sees, float("-inf")).softmax(-1).nan_to_num_(0.0)


def _check_top_p(top_p: float) -> float:
    if isinstance(top_p, bool) or not isinstance(top_p, (int, float)) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p!r}")
    return float(top_p)


def _check_key_block(key_block: int) -> int:
    if isinstance(key_block, bool) or not isinstance(key_block, int) or key_block < 1:
        raise ValueError(f"key_block must be a positive number of keys, got {key_block!r}")
    return key_block
