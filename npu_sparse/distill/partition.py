"""Partition heads by least squares: the exact log-partition of a trained indexer's scores, from the hidden states it reads."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import ops
from ..indexer import Indexer, IndexHead
from ..ops import dispatch
from .config import DistillConfig
from .data import Contexts, row_segments
from .teacher import Tap, tap

RIDGE = 1e-3  # times the number of rows, for features of unit variance
BLOCK = 64  # neighbouring queries whose keys compete, so that an error can change their order


class LeastSquares:
    """The sums that fit one layer's head, over as many rows as come; features are hidden states and log n.

    Sums are kept in float64 about the mean of the first rows, so that features which hardly vary lose nothing.
    """

    def __init__(self):
        self.rows = 0
        self.origin = self.target_origin = None

    def add(self, hidden: Tensor, seen: Tensor, partition: Tensor) -> None:
        """hidden `[rows, H]`, seen `[rows]`: how many keys each row sees, partition `[rows]`: what to predict."""
        features = torch.cat([hidden.float(), seen.float().log()[:, None]], 1)
        if self.origin is None:
            self.origin, self.target_origin = features.mean(0), partition.mean()
            width = features.shape[1]
            self.products = torch.zeros(width, width, dtype=torch.float64)
            self.with_target, self.sums = torch.zeros(2, width, dtype=torch.float64)
            self.target_sum = 0.0
        features, partition = features - self.origin, partition - self.target_origin
        self.products += (features.T @ features).double().cpu()
        self.with_target += (features.T @ partition).double().cpu()
        self.sums += features.sum(0).double().cpu()
        self.target_sum += float(partition.sum())
        self.rows += len(partition)

    def solve(self) -> tuple[Tensor, float, float]:
        """`(a [H], b, g)` of the least squared error of `<a, x> + b + g log n`, with a small ridge on a, float64."""
        mean, target_mean = self.sums / self.rows, self.target_sum / self.rows
        covariance = self.products / self.rows - mean.outer(mean)
        slope = self.with_target / self.rows - mean * target_mean
        deviation = covariance.diagonal().clamp(min=0).sqrt()
        varies = deviation > 1e-6 * deviation.max()
        unit = torch.where(varies, 1 / deviation.where(varies, torch.ones_like(deviation)), 0.0)
        ridge = torch.full_like(unit, RIDGE)
        ridge[~varies] = 1.0  # a constant feature gets no coefficient
        solution = torch.linalg.solve(unit[:, None] * covariance * unit + ridge.diag(), unit * slope) * unit
        bias = target_mean + float(self.target_origin) - float(solution @ (mean + self.origin.double().cpu()))
        return solution[:-1], bias, float(solution[-1])


@torch.no_grad()
def fit_partition(model, indexer: Indexer, contexts: Contexts) -> None:
    """Fits every layer's PartitionHead on `partition_steps` batches that training has not seen, on as many rows of each."""
    config: DistillConfig = contexts.config
    served = indexer.copy_for(model)
    fits = {layer: LeastSquares() for layer in indexer.config.layers}
    for step in range(config.all_steps, config.all_steps + config.partition_steps):
        batch = contexts.batch(step)
        segments = row_segments(config, batch.shape[1], step)

        def receive(tapped: Tap, segments=segments):
            for hidden, seen, exact in exact_partitions(served.layers[str(tapped.layer)], tapped, segments):
                fits[tapped.layer].add(hidden.flatten(0, 1), seen.expand(exact.shape).flatten(), exact.flatten())

        for part in batch.split(config.micro_batch):
            tap(model, part.to(model.device), receive)
    for layer, fit in fits.items():
        direction, bias, growth = fit.solve()
        head = indexer.layers[str(layer)].partition
        head.direction.copy_(direction)
        head.line.copy_(torch.tensor([bias, growth]))


def exact_partitions(head: IndexHead, tapped: Tap, segments) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """`(hidden [B, rows, H], seen [1, rows], exact log-partition [B, rows])` of every segment of rows."""
    qi, ki, w = head(tapped.hidden, tapped.cos, tapped.sin)
    ki = ki.to(qi.dtype)
    # kernels where training has them; elsewhere a run that is nearly done should not need a build
    impl = "auto" if dispatch.has_kernels_for("index_kl", qi.device.type) else "reference"
    for start, stop in segments:
        exact = ops.index_partition(
            qi[:, :, start:stop], ki[:, :stop], None if w is None else w[:, start:stop], impl=impl
        )
        yield tapped.hidden[:, start:stop], torch.arange(start + 1, stop + 1, device=qi.device)[None], exact


@torch.no_grad()
def partition_residuals(model, indexer: Indexer, contexts) -> dict:
    """`{"residual": .., "residual_in_block": .., "spread": .., "by_layer": [..]}` on held-out `(kind, ids)` contexts, in nats.

    residual is the root mean square of what the served heads miss of the exact log-partition, residual_in_block of that less its
    mean over 64 neighbouring queries, which is all that can change the order of the keys that they share; spread is the standard
    deviation of the exact one about its mean over a context.
    """
    served = indexer.copy_for(model)
    records: list[dict] = []

    def receive(tapped: Tap):
        head, T = served.layers[str(tapped.layer)], tapped.q.shape[2]
        ((hidden, seen, exact),) = exact_partitions(head, tapped, [(0, T)])
        error = head.partition(hidden, seen) - exact  # [B, T]
        within = torch.cat([part - part.mean(-1, keepdim=True) for part in error.split(BLOCK, 1)], 1)
        squares = (error, within, exact - exact.mean(-1, keepdim=True))
        names = ("residual", "residual_in_block", "spread")
        records.append({"layer": tapped.layer} | {n: float(x.square().mean()) for n, x in zip(names, squares)})

    for _, ids in contexts:
        tap(model, ids.to(model.device), receive)

    def summary(rows: list[dict]) -> dict:
        return {n: (sum(r[n] for r in rows) / len(rows)) ** 0.5 for n in ("residual", "residual_in_block", "spread")}

    layers = sorted({record["layer"] for record in records})
    by_layer = [{"layer": n, **summary([r for r in records if r["layer"] == n])} for n in layers]
    return {**summary(records), "by_layer": by_layer}
