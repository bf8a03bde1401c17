"""Layer by layer on the dense trajectory: every layer is measured on its inputs in the dense model, so errors do not add up."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import ops
from ..budget import Budget
from ..ops import workspace
from ..ops.masks import padded_to_blocks, visible_to_block
from ..prefill import SparsePrefill
from ..selectors import Dense, LayerInputs
from ..support import Support
from .quality import compare, hidden_states

SLICE_ELEMENTS = 1 << 22  # fp32 mass entries alive at once; sorting and gathering hold a few times as much
NEIGHBOURS = (8, 16, 64)
DENSE_BLOCK = 128
LOWEST = 0.05  # the quantile that is reported as the 5th percentile

Granularity = tuple[str, int, str | None]  # heads, block, reduce


def measure_layers(
    model, ids: Tensor, dense: Tensor, granularities: Sequence[Granularity], budgets: Sequence[int], *,
    impl: str = "reference", stride: int = 1, tail: bool = False, workspace_mib: int = workspace.DEFAULT_MIB,
) -> dict:  # fmt: skip
    """`{"layers": rows, "overlap": rows, "path": {...}}` of one prompt, int64 `[T]`, on the dense trajectory.

    Rows are those of `measure_layer`, each with its layer. "path" compares this forward, which reads every key through the sparse
    path, with the dense model: it shows the sparse path's own rounding.
    """
    rows, overlaps = [], []

    def observe(inputs: LayerInputs, support: Support, out: Tensor) -> None:
        measured, overlap = measure_layer(inputs, out, granularities, budgets, tail)
        rows.extend({"layer": inputs.layer, **row} for row in measured)
        overlaps.extend({"layer": inputs.layer, **row} for row in overlap)

    with SparsePrefill.attach(
        model, Dense(), Budget(block=DENSE_BLOCK), impl=impl, observe=observe, workspace_mib=workspace_mib
    ):
        hidden = hidden_states(model, ids, stride)
    return {"layers": rows, "overlap": overlaps, "path": compare(model, dense, model, hidden)}


@torch.no_grad()
def measure_layer(
    inputs: LayerInputs, out: Tensor, granularities: Sequence[Granularity], budgets: Sequence[int], tail: bool = False
) -> tuple[list[dict], list[dict]]:
    """Rows of one layer for one prompt, over its second half (from the last whole block before the middle on).

    `out` is the layer's dense attention output, `[1, Hq, T, Dv]`; `tail` is as in Budget. The first list has a row per
    granularity and budget:
        retained_mean, retained_p5     attention mass within the support: mean and 5th percentile over queries
        relative_mean, relative_p5     that mass over what each query's own top-k keeps at the same k
        doubled_mean, doubled_p5       the mass within a support of 2k keys, over what each query's own top-k keeps at k
        output_error                   RMS of (sparse - dense) attention output over the RMS of the dense one
    Masses are means over heads. The second list has a row per heads and budget, about queries' own supports:
        jaccard                        |A and B| / |A or B| of adjacent queries, mean
        union_8, union_16, union_64    keys in the union of that many neighbours' supports, mean
    """
    T = inputs.q.shape[2]
    granule = max(*NEIGHBOURS, *(block for _, block, _ in granularities))
    first = T // 2 // granule * granule
    rows = granule * max(1, SLICE_ELEMENTS // (T * inputs.k.shape[1] * granule))
    shared = {granularity: _Shared() for granularity in granularities}
    attend = ops.sparse_attention_with_tail if tail else ops.sparse_attention
    own = {heads: _Own() for heads in dict.fromkeys(heads for heads, _, _ in granularities)}
    for start in range(first, T, rows):
        stop = min(start + rows, T)
        queries, keys, values = inputs.q[:, :, start:stop], inputs.k[:, :, :stop], inputs.v[:, :, :stop]
        exact = out[:, :, start:stop].float()
        mass_by_group = ops.attention_mass(queries, keys, scale=inputs.scale, per_kv=True, impl=inputs.impl)[0]
        for heads, kept in own.items():
            mass = mass_by_group if heads == "kv" else mass_by_group.mean(0, keepdim=True)  # [Hs, R, stop]
            own_order = _order(mass, 1, None)
            own_mass = _cumulated(mass, own_order, 1, budgets)  # [R, budgets]
            kept.add(own_order, budgets, stop)
            for (of, block, reduce), measured in shared.items():
                if of != heads:
                    continue
                order = own_order if block == 1 else _order(mass, block, reduce)
                measured.kept.append(_cumulated(mass, order, block, budgets))
                measured.doubled.append(_cumulated(mass, order, block, [2 * k for k in budgets]) / own_mass)
                measured.relative.append(measured.kept[-1] / own_mass)
                for k in budgets:
                    support = _support(order, k, block, stop - start, stop)
                    sparse = attend(queries, keys, values, support, scale=inputs.scale, impl=inputs.impl)
                    measured.add_error(k, sparse.float(), exact)
    records = [
        {"heads": heads, "block": block, "reduce": reduce, "k": k, **measured.row(n, k)}
        for (heads, block, reduce), measured in shared.items() for n, k in enumerate(budgets)
    ]  # fmt: skip
    return records, [{"heads": heads, "k": k, **kept.row(k)} for heads, kept in own.items() for k in budgets]


@dataclass
class _Shared:
    """What one granularity keeps, over slices: `[R, budgets]` tensors, and sums of squares by budget."""

    kept: list[Tensor] = field(default_factory=list)
    relative: list[Tensor] = field(default_factory=list)
    doubled: list[Tensor] = field(default_factory=list)
    squares: dict[int, tuple[float, float]] = field(default_factory=dict)

    def add_error(self, k: int, sparse: Tensor, exact: Tensor) -> None:
        wrong, whole = self.squares.get(k, (0.0, 0.0))
        self.squares[k] = (wrong + float((sparse - exact).square().sum()), whole + float(exact.square().sum()))

    def row(self, n: int, k: int) -> dict[str, float]:
        row = {}
        for name, parts in (("retained", self.kept), ("relative", self.relative), ("doubled", self.doubled)):
            values = torch.cat(parts)[:, n]
            row[f"{name}_mean"] = float(values.mean())
            row[f"{name}_p5"] = _percentile(values)
        wrong, whole = self.squares[k]
        return {**row, "output_error": (wrong / whole) ** 0.5 if whole else 0.0}


@dataclass
class _Own:
    """How queries' own supports overlap, over slices: `{(statistic, k): [sum, count]}`."""

    sums: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def add(self, order: Tensor, budgets: Sequence[int], keys: int) -> None:
        R = order.shape[1]
        visible = visible_to_block(R, keys, 1, None, order.device)
        for k in budgets:
            member = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
            member = member.scatter_(-1, order[..., :k], True) & visible  # [Hs, R, keys]
            both = (member[:, 1:] & member[:, :-1]).sum(-1)
            either = (member[:, 1:] | member[:, :-1]).sum(-1)
            self._count("jaccard", k, both / either)
            for n in NEIGHBOURS:
                groups = member[:, : R // n * n].unflatten(1, (R // n, n)).any(2)  # [Hs, R / n, keys]
                self._count(f"union_{n}", k, groups.sum(-1))

    def _count(self, name: str, k: int, values: Tensor) -> None:
        entry = self.sums.setdefault((name, k), [0.0, 0])
        entry[0] += float(values.double().sum())
        entry[1] += values.numel()

    def row(self, k: int) -> dict[str, float]:
        return {name: total / count for (name, of), (total, count) in self.sums.items() if of == k and count}


def _order(mass: Tensor, block: int, reduce: str | None) -> Tensor:
    """Key positions from the most to the least mass, int64 `[Hs, ceil(R / block), Tk]`.

    Equal masses stay in order of position, as `select_tokens` settles ties; so keys that no query of the block sees,
    which have no mass and the last positions, come last.
    """
    rows = mass
    if block > 1:
        blocks = padded_to_blocks(mass, block, 0.0)
        rows = blocks.amax(-2) if reduce == "max" else blocks.sum(-2)  # a sum orders keys as the mean does
    return rows.sort(dim=-1, descending=True, stable=True).indices


def _cumulated(mass: Tensor, order: Tensor, block: int, budgets: Sequence[int]) -> Tensor:
    """The mass that each query finds among the first k keys of its block's order, mean over heads, `[R, budgets]`."""
    R, Tk = mass.shape[1:]
    widest = min(max(budgets), Tk)
    blocks = padded_to_blocks(mass, block, 0.0)  # [Hs, Nq, block, Tk]
    chosen = order[..., None, :widest].expand(-1, -1, block, -1)
    kept = blocks.gather(-1, chosen).cumsum(-1).mean(0).flatten(0, 1)[:R]  # [R, widest]
    return kept[:, [min(k, Tk) - 1 for k in budgets]]


def _support(order: Tensor, k: int, block: int, queries: int, keys: int) -> Support:
    """The Support of the first k keys of every order, `[1, Hs, Nq, k]`."""
    visible = visible_to_block(queries, keys, block, None, order.device)[0].sum(-1)  # [Nq]
    count = visible.clamp(max=k).expand(order.shape[:2])
    width = min(k, keys)
    used = torch.arange(width, device=order.device) < count[..., None]
    indices = order[..., :width].masked_fill(~used, torch.iinfo(torch.int32).max).sort(-1).values
    return Support(indices[None].int(), count[None].int(), block)


def _percentile(values: Tensor) -> float:
    """The 5th percentile, at a measured value: no interpolation."""
    return float(values.sort().values[int(LOWEST * (len(values) - 1))])
