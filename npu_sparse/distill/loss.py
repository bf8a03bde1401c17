"""KL divergences between the teacher's attention mass and the indexer's softmax, by segments of query rows."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..indexer import Indexer, IndexHead
from .config import SHARED_BLOCK, DistillConfig
from .teacher import Tap


def teacher_mass(tap: Tap, segment: tuple[int, int]) -> Tensor:
    """P: head-averaged attention mass of one segment's rows, fp32 `[B, rows, stop]` (arXiv 2606.07703, "Oracle")."""
    start, stop = segment
    mass = ops.attention_mass(tap.q[:, :, start:stop], tap.k[:, :, :stop], scale=tap.scale, impl="reference")
    return mass[:, 0]


def index_logits(head: IndexHead, tap: Tap, segments: list[tuple[int, int]]) -> list[Tensor]:
    """z of every segment's rows, fp32 `[B, rows, stop]`, -inf where a key lies ahead; differentiable in the head."""
    qi, ki, w = head(tap.hidden.to(head.q_proj.weight.dtype), tap.cos, tap.sin)
    logits = []
    for start, stop in segments:
        products = torch.matmul(qi[:, :, start:stop], ki[:, None, :stop].transpose(-1, -2))  # [B, Hi, rows, stop]
        z = torch.relu(products.float()) * head.dim**-0.5
        z = z.sum(1) if w is None else (z * w[:, start:stop].transpose(1, 2)[..., None].float()).sum(1)
        ahead = torch.ones(stop - start, stop, dtype=torch.bool, device=z.device).triu_(start + 1)
        logits.append(z.masked_fill(ahead, float("-inf")))
    return logits


def kl(mass: Tensor, logits: Tensor) -> Tensor:
    """KL(P || softmax(z)) of every row, in nats: `[..., keys]`, `[..., keys]` -> `[...]`."""
    log_q = torch.log_softmax(logits, -1)
    return (torch.xlogy(mass, mass) - mass * log_q.masked_fill(mass == 0, 0.0)).sum(-1)


def sparse_kl(mass: Tensor, logits: Tensor, k: int) -> Tensor:
    """KL restricted to the keys that matter: the union of the teacher's and the indexer's own top k, both renormalised.

    The idea is arXiv 2606.22874's; the indexer's own choices belong to the union so that a key it wrongly prefers
    costs.
    """
    k = min(k, mass.shape[-1])
    chosen = torch.zeros_like(mass, dtype=torch.bool)
    chosen.scatter_(-1, mass.topk(k, -1).indices, True)
    chosen.scatter_(-1, logits.detach().topk(k, -1).indices, True)
    inside = mass * chosen
    inside = inside / inside.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    return kl(inside, logits.masked_fill(~chosen, float("-inf")))


def shared_kl(mass: Tensor, logits: Tensor, block: int) -> Tensor:
    """KL of what a block of queries shares: `[B, rows, keys]` twice -> `[B, blocks]`, blocks counted from the first row.

    The target is the largest mass that a query of the block gives a key, renormalised, and the guess is the softmax of the
    largest score less its own query's log-partition: what the runtime ranks keys by with Budget(reduce="softmax_max").
    """
    log_q = torch.log_softmax(logits, -1)
    targets = [part.amax(-2) for part in mass.split(block, -2)]
    guesses = [part.amax(-2) for part in log_q.split(block, -2)]
    target = torch.stack(targets, -2)
    return kl(target / target.sum(-1, keepdim=True), torch.stack(guesses, -2))


class DistillLoss(nn.Module):
    """The training loss of one batch of taps, as one module so that DistributedDataParallel can wrap it."""

    def __init__(self, indexer: Indexer, config: DistillConfig):
        super().__init__()
        self.indexer, self.config = indexer, config

    def forward(self, taps: list[Tap], segments: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """`(mean loss over layers and rows, detached loss of each layer [layers])`."""
        layer = self._streamed if self.config.loss == "kl" else self._restricted
        per_layer = torch.stack([layer(self.indexer.layers[str(tap.layer)], tap, segments) for tap in taps])
        return per_layer.mean(), per_layer.detach()

    def _streamed(self, head, tap, segments) -> Tensor:
        qi, ki, w = head(tap.hidden.to(head.q_proj.weight.dtype), tap.cos, tap.sin)
        ki = ki.to(qi.dtype)  # under autocast a LayerNorm's output is fp32
        return ops.index_kl(
            tap.q, tap.k, qi, ki, w, segments=segments, scale=tap.scale, impl=self.config.impl
        ).mean()  # fmt: skip

    def _restricted(self, head, tap, segments) -> Tensor:
        masses = [teacher_mass(tap, segment) for segment in segments]
        return checkpoint(self._over_top_keys, head, tap, masses, segments, use_reentrant=False)

    def _over_top_keys(self, head, tap, masses, segments) -> Tensor:
        rows = []
        for mass, logits in zip(masses, index_logits(head, tap, segments)):
            if self.config.loss == "shared":
                rows.append(shared_kl(mass, logits, SHARED_BLOCK).flatten())
                continue
            if self.config.loss == "both":
                rows.append(kl(mass, logits).flatten())
            rows.append(sparse_kl(mass, logits, self.config.sparse_k).flatten())
        return torch.cat(rows).mean() * (2 if self.config.loss == "both" else 1)
