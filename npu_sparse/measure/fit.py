"""Budgets fitted, not guessed: `npu-sparse fit`. In which layers are keys worth most?

Every full-attention layer is measured on the dense trajectory: the *lost mass* of a query at k is the attention mass outside
the keys that the adapter selects for its block at that k, as deployed (sharing, reduction, partition), mean over heads. Fitting
spends the keys of `budget.k` in every layer where they are worth most: it minimises the sum over layers of lost mass, or of its
square (queries that lose much weigh more: hard retrieval fails there first), at the same total cost, by dynamic programming.
With several lengths the fit is over lengths instead: the smallest k that loses no more than `budget.k` loses at the first one.

A run directory holds config.json, records/<length>-<prompt>.json, report.json, report.md and adapter/, the adapter that
recommends the fitted budget. Running again resumes. The fit is by attention mass, not answers: judge it with `npu-sparse eval`.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from statistics import fmean, median

import torch
from torch import Tensor

from .. import ops
from ..budget import Budget
from ..ops import workspace
from ..ops.dispatch import synchronize
from ..prefill import SparsePrefill
from ..runs.machine import machine, machine_line
from ..runs.page import markdown_table, say
from ..runs.store import Cells, open_stage, write_json, write_text
from ..selectors import ByIndexer, LayerInputs
from ..support import Support
from ..tasks import documents, encode, generate
from ..tasks.catalogue import task_named
from .variants import adapter_fingerprint, check_context, load_subject, settle, with_tokenizer

OBJECTIVES = ("square", "mean")
COSTS = ("keys", "time")
UNITS = 2000  # of cost that the dynamic programme tells apart
TIMINGS = 5


@dataclass(frozen=True)
class FitConfig:
    """What is fitted, and on which prompts.

    Attributes:
        model: what `checkpoints.load` takes: a demo name, a directory, a GGUF file or a hub id.
        adapter: directory or name of the indexer whose selections are measured.
        budget: what the fit may spend, its k in every layer, and how queries share, as `Budget.parse` spells it; empty = what the
            adapter recommends.
        ladder: the k that a layer may get, `budget.k` among them; empty = a quarter, half, one, two and four times that.
        lengths: tokens of a prompt; one = k is fitted by layer (`per_layer`), several, ascending = by length (tiers of k).
        tasks: prompts are theirs, as many of each.
        count: prompts of a task.
        texts: sources of the haystacks, see `tasks.texts.documents`; take others than quality is judged on.
        seed: of the prompts; take another than quality is judged with.
        blocks: blocks of queries that are measured, spread evenly over a prompt.
        objective: what is added up over queries and layers: "square" of the lost mass or its "mean".
        cost: of a layer's k: "keys", or "time" of its attention, measured here.
        dtype: of weights and activations; "auto" = bfloat16, or float32 on a processor that is not faster in bfloat16.
        device: "cpu", "cuda", "cuda:1", "npu", ...
        impl: which operators run: "reference", "kernel" or "auto".
        workspace_mib: MiB of a slice of scores, as in `SparsePrefill.attach`: smaller where memory is short.
    """

    model: str
    adapter: str | None = None
    budget: str = ""
    ladder: tuple[int, ...] = ()
    lengths: tuple[int, ...] = (4096,)
    tasks: tuple[str, ...] = ("niah_multikey_2", "vt")
    count: int = 2
    texts: tuple[str, ...] = ("builtin",)
    seed: int = 1
    blocks: int = 48
    objective: str = "square"
    cost: str = "keys"
    dtype: str = "auto"
    device: str = "cpu"
    impl: str = "auto"
    workspace_mib: int = workspace.DEFAULT_MIB

    def __post_init__(self):
        settle(self, "tasks", "texts")
        settle(self, "ladder", "lengths", kind=int)
        for name, known in (("objective", OBJECTIVES), ("cost", COSTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, got {getattr(self, name)!r}")
        for name in ("ladder", "lengths"):
            value = getattr(self, name)
            if list(value) != sorted(set(value)) or min(value, default=1) < 1:
                raise ValueError(f"{name} must be positive and ascending, got {', '.join(map(str, value))}")
        if not self.lengths or not self.tasks:
            raise ValueError(f"{'tasks' if self.lengths else 'lengths'} must name at least one, got none")
        for name in ("count", "blocks"):
            if isinstance(getattr(self, name), bool) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)}")
        for task in self.tasks:
            if task_named(task).needs == "qa_file":
                raise ValueError(f"tasks must not need a question file, got {task}")
        Budget.parse(self.budget)

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, value: Mapping) -> "FitConfig":
        """Reads what `to_dict` wrote."""
        return cls(**value)


def run_fit(config: FitConfig, output, *, model=None, tokenizer=None, indexer=None) -> dict:
    """The report of a fit; `report["budget"]` is the spelling of the Budget that was found.

    Arguments and errors as in `run_eval`; ValueError where there is no indexer, or where `budget.k` is no single number.
    """
    if config.adapter is None and indexer is None:
        raise ValueError("adapter must name an indexer's directory, got none")
    directory = open_stage(output, "fit", config)
    subject = with_tokenizer(load_subject(config, ("indexer",), model, tokenizer, indexer), config)
    start = Budget.of(config.budget or subject.indexer.budget or "")
    if not isinstance(start.k, int):
        raise ValueError(f"budget must have one k to fit from, got tiers k={start.k}")
    start = start.replace(per_layer={})
    ladder = config.ladder or tuple(max(1, start.k * n // 4) for n in (1, 2, 4, 8, 16))
    ladder = tuple(k for k in dict.fromkeys(ladder) if k <= config.lengths[0])
    if start.k not in ladder:
        raise ValueError(f"ladder must hold the budget's k and fit into the prompts, got {start.k} for {ladder}")
    check_context(subject.model, config.lengths[-1])
    fingerprint = adapter_fingerprint(subject.indexer)
    inputs = {"base": subject.base(), "adapter": fingerprint, "start": str(start), "ladder": list(ladder)}
    names = [f"{length}-{n}" for length in config.lengths for n in range(config.count * len(config.tasks))]
    form = {"layers": [{"layer": int, "k": int, "mean": float, "square": float, "p95": float}], "seconds": {str: float}}
    cells = Cells(directory / "records", {name: {"cell": name, **inputs} for name in names}, form)
    prompts: dict[int, list[Tensor]] = {}

    def measured(name: str) -> dict:
        length, n = map(int, name.split("-"))
        if length not in prompts:
            prompts[length] = _prompts(config, subject.tokenizer, length)
        record = lost_mass(
            subject.model, subject.indexer, prompts[length][n], start, ladder, blocks=config.blocks, impl=config.impl,
            workspace_mib=config.workspace_mib,
        )  # fmt: skip
        say(f"{length} tokens, prompt {n}: measured")
        return {**record, "machine": machine(config.device)}

    cells.compute(measured)
    result = _tabulate(config, start, cells.records())
    write_json(directory / "report.json", result)
    write_text(directory / "report.md", _markdown(result))
    adapter = subject.indexer.copy_for(subject.model)
    adapter.budget = Budget.parse(result["budget"]).to_dict()
    adapter.save_pretrained(directory / "adapter")
    return result


def _prompts(config: FitConfig, tokenizer, length: int) -> list[Tensor]:
    """Prompts of all tasks at one length, int64 `[T]` each."""
    prompts = []
    for task in config.tasks:
        haystack = {"haystack": documents(config.texts)} if task_named(task).needs == "haystack" else {}
        examples = generate(task, tokenizer, length=length, count=config.count, seed=config.seed, **haystack)
        prompts += [torch.tensor(encode(tokenizer, example)) for example in examples]
    return prompts


@torch.no_grad()
def lost_mass(
    model, indexer, ids: Tensor, budget: Budget, ladder: tuple[int, ...], *, blocks: int = 48, impl: str = "auto",
    workspace_mib: int = workspace.DEFAULT_MIB,
) -> dict:  # fmt: skip
    """What every layer loses at every k of `ladder`, on the dense trajectory of one prompt.

    Args:
        ids: int64 `[T]`; no k may exceed T.
        budget: sharing, reduction, sinks, recent keys and candidates; its exact end is left out of what is measured.
        blocks: blocks of queries, spread evenly over those that can lose something.

    Returns `{"layers": [{"layer", "k", "mean", "square", "p95"}], "seconds": {k: s}}`: lost mass in [0, 1] of a query, its mean,
    mean square and 95th percentile over queries; seconds of the middle layer's sparse attention over all queries.
    """
    chooser = _Measuring(indexer, budget, ladder, blocks)
    plain = budget.replace(k=min(ladder), dense_below=0, share_layers=1, anchors=(), tail=False, exact_last=0, candidates=0)
    if budget.candidates:  # a group's partition is read where there are candidates
        plain = plain.replace(candidates=budget.candidates)
    with SparsePrefill.attach(model, chooser, plain, impl=impl, workspace_mib=workspace_mib):
        model(input_ids=ids[None].to(model.device), logits_to_keep=1, use_cache=False)
    return {"layers": chooser.rows, "seconds": chooser.seconds}


class _Measuring:
    """A selector that notes what an indexer's supports lose and lets the layer read every key."""

    def __init__(self, indexer, budget: Budget, ladder: tuple[int, ...], blocks: int):
        self.inner = ByIndexer(indexer)
        self.indexer, self.evidence, self.name = indexer, self.inner.evidence, "indexer, measured"
        self.budget, self.ladder, self.blocks = budget, ladder, blocks
        self.timed = sorted(indexer.config.layers)[len(indexer.config.layers) // 2]
        self.rows: list[dict] = []
        self.seconds: dict[str, float] = {}

    def select(self, inputs: LayerInputs, budget: Budget) -> Support:
        supports = {}
        for k in self.ladder:
            candidates = max(budget.candidates, k) if budget.candidates else 0
            supports[k] = self.inner.select(inputs, budget.replace(k=k, candidates=candidates))
        T, block = inputs.q.shape[2], budget.block
        first, last = min(self.ladder) // block, -(-max(1, T - self.budget.exact_last) // block)
        chosen = sorted({first + (last - first) * n // self.blocks for n in range(self.blocks)} & set(range(last)))
        lost: dict[int, list[Tensor]] = {k: [] for k in self.ladder}
        for n in chosen:
            start, stop = n * block, min((n + 1) * block, T)
            mass = ops.attention_mass(inputs.q[:, :, start:stop], inputs.k[:, :, :stop], scale=inputs.scale, impl=inputs.impl)
            for k, support in supports.items():
                keys = support.indices[0, 0, n].clamp(max=stop - 1).long()
                used = torch.arange(len(keys), device=keys.device) < support.count[0, 0, n]
                kept = (mass[0, 0][:, keys] * used).sum(-1)
                lost[k].append((1.0 - kept).clamp_(min=0.0))
        for k, parts in lost.items():
            values = torch.cat(parts).double()
            p95 = float(values.sort().values[int(0.95 * (len(values) - 1))])
            row = {"mean": float(values.mean()), "square": float(values.square().mean()), "p95": p95}
            self.rows.append({"layer": inputs.layer, "k": k, **row})
        if inputs.layer == self.timed:
            self.seconds = {str(k): self._seconds(inputs, support) for k, support in supports.items()}
        return _everything(T, block, inputs.q.device)

    @staticmethod
    def _seconds(inputs: LayerInputs, support: Support) -> float:
        """The median time of one layer's sparse attention."""
        times = []
        for _ in range(TIMINGS):
            synchronize(inputs.q.device)
            began = time.perf_counter()
            ops.sparse_attention(inputs.q, inputs.k, inputs.v, support, scale=inputs.scale, impl=inputs.impl)
            synchronize(inputs.q.device)
            times.append(time.perf_counter() - began)
        return median(times)


def _everything(length: int, block: int, device: torch.device) -> Support:
    """The Support that holds every key its block sees: no selection has to sort them."""
    count = (torch.arange(-(-length // block), device=device) + 1).mul(block).clamp(max=length)
    keys = torch.arange(length, device=device).expand(len(count), -1)
    indices = keys.masked_fill(keys >= count[:, None], -1)
    return Support(indices[None, None].int(), count[None, None].int(), block)


def spend(losses: Mapping[int, Mapping[int, float]], costs: Mapping[int, float], total: float) -> dict[int, int]:
    """`{layer: k}` with the smallest sum of `losses[layer][k]` whose `costs[k]` add up to at most `total`.

    A multiple-choice knapsack by dynamic programming over `UNITS` steps of cost, each cost rounded up; of equal sums the cheaper.
    Raises ValueError where not even the cheapest k of every layer fits.
    """
    cheapest = min(costs.values())
    if cheapest * len(losses) > total * (1 + 1e-9):
        raise ValueError(f"total must pay for the cheapest k of {len(losses)} layers ({cheapest * len(losses)}), got {total}")
    spare = total - cheapest * len(losses)
    steps = {k: ceil((cost - cheapest) / spare * UNITS - 1e-9) if spare > 0 else (cost > cheapest) * (UNITS + 1)
             for k, cost in costs.items()}  # fmt: skip
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for layer in sorted(losses):
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (loss, path) in best.items():
            for k in sorted(costs):
                at = used + steps[k]
                if at <= UNITS and (at not in reached or loss + losses[layer][k] < reached[at][0]):
                    reached[at] = (loss + losses[layer][k], (*path, k))
        best, lowest = {}, float("inf")
        for used in sorted(reached):  # what costs more and loses as much leads nowhere
            if reached[used][0] < lowest:
                best[used], lowest = reached[used], reached[used][0]
    return dict(zip(sorted(losses), min(best.values())[1], strict=True))


def _tabulate(config: FitConfig, start: Budget, records: Mapping[str, Mapping]) -> dict:
    """The report: rows of layers (one length) or of lengths, and the Budget that was found."""
    by_length: dict[int, list[Mapping]] = {}
    for name, record in records.items():
        by_length.setdefault(int(name.split("-")[0]), []).append(record)
    losses = {length: _losses(samples, config.objective) for length, samples in by_length.items()}
    tails = {length: _losses(samples, "p95") for length, samples in by_length.items()}
    first = config.lengths[0]
    ladder = sorted(next(iter(losses[first].values())))
    seconds = {k: median(record["seconds"][str(k)] for record in by_length[first]) for k in ladder}
    costs = {k: float(k) for k in ladder} if config.cost == "keys" else _ascending(seconds)
    whole = {length: {k: fmean(of[k] for of in lost.values()) for k in ladder} for length, lost in losses.items()}
    if len(config.lengths) == 1:
        chosen = spend(losses[first], costs, costs[start.k] * len(losses[first]))
        rows = [
            {
                "layer": layer, "k": k, "lost_before": losses[first][layer][start.k], "lost": losses[first][layer][k],
                "p95_before": tails[first][layer][start.k], "p95": tails[first][layer][k],
            }
            for layer, k in chosen.items()
        ]  # fmt: skip
        common = max(set(chosen.values()), key=list(chosen.values()).count)
        budget = start.replace(k=common, per_layer={layer: k for layer, k in chosen.items() if k != common})
        spent = {"before": costs[start.k] * len(chosen), "after": sum(costs[k] for k in chosen.values())}
    else:
        wanted = whole[first][start.k]
        enough = {length: min((k for k in ladder if whole[length][k] <= wanted), default=ladder[-1]) for length in config.lengths}
        ends = [0, *(length + 1 for length in config.lengths[:-1])]
        budget = start.replace(k={end: k for end, k in zip(ends, enough.values(), strict=True)})
        rows = [
            {"length": length, "k": k, "lost_before": whole[length][start.k], "lost": whole[length][k]}
            for length, k in enough.items()
        ]
        spent = {"before": costs[start.k], "after": costs[enough[config.lengths[-1]]]}
    return {
        "stage": "fit", "config": config.to_dict(), "start": str(start), "budget": str(budget), "rows": rows, "cost": spent,
        "lost": {str(length): {str(k): value for k, value in lost.items()} for length, lost in whole.items()},
        "seconds": {str(k): value for k, value in seconds.items()},
        "base": next(iter(records.values()))["base"], "adapter": next(iter(records.values()))["adapter"],
        "machines": list({json.dumps(record["machine"]): record["machine"] for record in records.values()}.values()),
    }  # fmt: skip


def _losses(records: list[Mapping], statistic: str) -> dict[int, dict[int, float]]:
    """`{layer: {k: mean over prompts}}`; no k loses more than a smaller one, as far as rounding and ties of selection go."""
    samples: dict[int, dict[int, list[float]]] = {}
    for record in records:
        for row in record["layers"]:
            samples.setdefault(row["layer"], {}).setdefault(row["k"], []).append(row[statistic])
    return {layer: {k: fmean(values) for k, values in sorted(by_k.items())} for layer, by_k in samples.items()}


def _ascending(seconds: Mapping[int, float]) -> dict[int, float]:
    """No k is cheaper than a smaller one: clocks are noisy."""
    ascending, highest = {}, 0.0
    for k in sorted(seconds):
        highest = max(highest, seconds[k])
        ascending[k] = highest
    return ascending


def _markdown(result: Mapping) -> str:
    config, by_layer = result["config"], "layer" in result["rows"][0]
    what = "layer" if by_layer else "length"
    loss = "mean square of the lost mass" if config["objective"] == "square" else "lost mass"
    columns = {what: what, "k": "k", "lost_before": f"{loss} at the first k", "lost": "at this k"}
    rows = [{**row, "lost_before": f"{row['lost_before']:.5f}", "lost": f"{row['lost']:.5f}"} for row in result["rows"]]
    totals = [sum(row[name] for row in result["rows"]) for name in ("lost_before", "lost")]
    return "\n\n".join([
        f"# A budget fitted for {config['model']}",
        f"From `{result['start']}`, on {config['count']} prompts each of {', '.join(config['tasks'])} at "
        f"{', '.join(map(str, config['lengths']))} tokens; cost: {config['cost']}. Distilled or untrained as the adapter is; "
        "attention mass on the dense trajectory, not answers.",
        f"**`{result['budget']}`**",
        f"{loss[0].upper() + loss[1:]}, sum over {what}s: {totals[0]:.5f} before, {totals[1]:.5f} after; "
        f"cost {result['cost']['before']:.6g} before, {result['cost']['after']:.6g} after.",
        markdown_table(rows, columns),
        *(f"Measured on {machine_line(one)}." for one in result["machines"]),
    ]) + "\n"  # fmt: skip
