"""Validation on held-out contexts: KL, and recall of the oracle's support as the operators really compute it."""

import torch

from .. import ops
from ..indexer import Indexer
from .loss import index_logits, kl, teacher_mass
from .teacher import Tap, tap

ROWS = 256


@torch.no_grad()
def validate(model, indexer: Indexer, contexts, budgets: tuple[int, ...]) -> dict:
    """`{"kl": nats, "mass_recall": {k: ..}, "support_recall": {k: ..}, "by_kind": {..}, "by_layer": [..]}`.

    Mass recall at k is the attention mass of the indexer's top k over that of the oracle's top k, support recall the
    share of the oracle's top k that the indexer finds; both as means over rows t >= k, per query (block 1), in the
    model's dtype. KL is the mean over all rows.
    """
    records: list[dict] = []
    served = indexer.copy_for(model)
    for kind, ids in contexts:
        def receive(tapped: Tap, kind=kind):
            records.append({"kind": kind, "layer": tapped.layer, **_layer_metrics(served, tapped, budgets)})

        tap(model, ids.to(model.device), receive)

    def mean(rows: list[dict]) -> dict:
        def average(name, k):
            return sum(row[name][k] for row in rows) / len(rows)

        return {
            "kl": sum(row["kl"] for row in rows) / len(rows),
            "mass_recall": {str(k): average("mass_recall", k) for k in budgets},
            "support_recall": {str(k): average("support_recall", k) for k in budgets},
        }

    layers, kinds = sorted({row["layer"] for row in records}), sorted({row["kind"] for row in records})
    return {
        **mean(records),
        "by_kind": {kind: mean([row for row in records if row["kind"] == kind]) for kind in kinds},
        "by_layer": [{"layer": n, **mean([row for row in records if row["layer"] == n])} for n in layers],
    }


def _layer_metrics(indexer: Indexer, tapped: Tap, budgets) -> dict:
    T = tapped.q.shape[2]
    head = indexer.layers[str(tapped.layer)]
    qi, ki, w = head(tapped.hidden, tapped.cos, tapped.sin)
    divergence, rows = 0.0, 0
    kept = {k: [0.0, 0.0, 0] for k in budgets}  # mass ratio, share found, rows
    for start in range(0, T, ROWS):
        segment = (start, min(start + ROWS, T))
        start, stop = segment
        mass = teacher_mass(tapped, segment)  # [B, rows, stop]
        divergence += float(kl(mass, index_logits(head, tapped, [segment])[0]).sum())
        rows += mass.shape[0] * mass.shape[1]
        scores = ops.index_scores(
            qi[:, :, start:stop], ki[:, :stop], None if w is None else w[:, start:stop], impl="reference"
        )
        for k, sums in kept.items():
            first = max(0, k - start)  # rows that see more than k keys
            if first >= stop - start:
                continue
            oracle = ops.select_tokens(mass.contiguous(), k=k, queries=stop - start, impl="reference").member_mask(stop)
            found_mask = ops.select_tokens(scores, k=k, queries=stop - start, impl="reference").member_mask(stop)
            oracle, found_mask = oracle[:, 0, first:], found_mask[:, 0, first:]
            inside = mass[:, first:]
            ratio = (inside * found_mask).sum(-1) / (inside * oracle).sum(-1)
            sums[0] += float(ratio.sum())
            sums[1] += float((oracle & found_mask).sum(-1).float().mul(1 / k).sum())
            sums[2] += ratio.numel()
    return {
        "kl": divergence / rows,
        "mass_recall": {k: sums[0] / sums[2] for k, sums in kept.items()},
        "support_recall": {k: sums[1] / sums[2] for k, sums in kept.items()},
    }
