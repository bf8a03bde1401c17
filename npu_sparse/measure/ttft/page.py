"""The report of a timing run: its rows and ceilings, report.md and report.png."""

import json
from dataclasses import asdict, dataclass

from ...budget import Budget
from ...models.crossover import NEVER, first_faster
from ...runs import stats
from ...runs.figures import PALETTE, caption, new_figure
from ...runs.figures import STAGES as STAGE_COLOURS
from ...runs.machine import machine_line
from ...runs.page import markdown_table
from ..clocks import amdahl_ceiling
from ..variants import budget_in, budget_of, budget_words, variant_named
from .config import ATTACHED, PARTS, STAGES, TtftConfig

STYLES = tuple((marker, line) for line in ("-", "--", ":") for marker in "osv^D")  # of what has one colour


@dataclass(frozen=True)
class Row:
    """One prefill at one length, as a report has it.

    Attributes:
        variant: its name, that of a `Way`; label: what a table calls it.
        layers: around attention, "stock" or "fast".
        seconds: of every timed round; ttft_s: their `stats.summary`.
        over: speed-ups over every dense row with the same layers, by its variant, with 95% intervals of a paired bootstrap.
        speed_up: that over the first of them; over_best_dense: that over the fastest. None where no dense row ran.
        peak_bytes: the largest of all rounds; peak_over_best_dense: divided by that of the fastest dense.
        stages_s: mean seconds in the rounds with clocks, which add up to "total".
    """

    length: int
    variant: str
    label: str
    evidence: str
    layers: str
    k: object
    block: int | None
    seconds: list[float]
    ttft_s: dict
    over: dict[str, dict]
    speed_up: dict | None
    over_best_dense: dict | None
    peak_bytes: int | None
    peak_over_best_dense: float | None
    stages_s: dict | None


def tabulate(config: TtftConfig, records: list[dict], source: str = "") -> dict:
    """The report of finished records, those of the run directory `source`."""
    rows = [row for record in records for row in _rows(config, record)]
    dense = [row for row in rows if config.ways()[row.variant].dense]
    done = {record["length"] for record in records}
    return {
        "stage": "ttft",
        "config": config.to_dict(),
        "weights": config.weights(),
        "base": records[0]["base"],
        "adapter": records[0]["adapter"],
        "machines": [{**record["machine"], "length": record["length"], **record["setting"]} for record in records],
        "rows": [asdict(row) for row in rows],
        "ceilings": [{
            "length": row.length, "label": row.label, "attention_s": row.stages_s["attention"], "total_s": row.stages_s["total"],
            "attention_share": row.stages_s["attention"] / row.stages_s["total"],
            "ceiling": amdahl_ceiling(row.stages_s["total"], row.stages_s["attention"]),
        } for row in dense],
        "refused": [[name, reason] for record in records for name, reason in record["refused"].items()],
        "crossovers": crossovers(config, records, rows, source),
        "missing": [length for length in config.lengths if length not in done],
    }  # fmt: skip


def _rows(config: TtftConfig, record: dict) -> list[Row]:
    ways, seconds = config.ways(), record["seconds"]
    ran = [way for way in ways.values() if way.name in seconds]
    peaks = {way.name: max((peak for peak in record["peak_bytes"][way.name] if peak), default=None) for way in ran}
    rows = []
    for way in ran:
        peers = [one.name for one in ran if one.dense and one.layers == way.layers]
        over = {name: stats.ratio_of_medians(seconds[name], seconds[way.name], seed=config.seed).to_dict() for name in peers}
        best = min(peers, key=lambda name: stats.summary(seconds[name])["median"], default=None)
        peak = peaks[way.name] / peaks[best] if best and peaks[way.name] and peaks[best] else None
        budget = None if way.variant == ATTACHED else budget_of(way.variant, config.budget)
        rows.append(Row(
            length=record["length"], variant=way.name, label=way.label, evidence=record["evidence"][way.name],
            layers=way.layers, k=budget and budget.k, block=budget and budget.block, seconds=seconds[way.name],
            ttft_s=stats.summary(seconds[way.name]), over=over, speed_up=over[peers[0]] if peers else None,
            over_best_dense=over.get(best), peak_bytes=peaks[way.name], peak_over_best_dense=peak,
            stages_s=_breakdown(record["stages"][way.name]) if way.name in record["stages"] else None,
        ))  # fmt: skip
    return rows


def crossovers(config: TtftConfig, records: list[dict], rows: list[Row], source: str) -> list[dict]:
    """From which of the finished lengths on each plain budget of an indexer is faster than the fastest dense, as crossover.json
    keeps it; with the fastest layers that were measured."""
    layers = "fast" if "fast" in config.layers else config.layers[0]
    median = {(row.variant, row.length): row.ttft_s["median"] for row in rows}
    ways = [way for way in config.ways().values() if way.layers == layers]
    records = sorted((record for record in records if "geometry" in record), key=lambda record: record["length"])
    lines = []
    for way in ways:
        if way.variant in ("dense", ATTACHED) or variant_named(way.variant).chooser != "indexer":
            continue
        budget = budget_of(way.variant, config.budget)
        dense_s, sparse_s, fastest = {}, {}, None
        for length in (record["length"] for record in records):
            dense = {one: median[one.name, length] for one in ways if one.dense and (one.name, length) in median}
            if dense and (way.name, length) in median:
                fastest = min(dense, key=dense.get)
                dense_s[length], sparse_s[length] = dense[fastest], median[way.name, length]
        if dense_s and budget == Budget(k=budget.k, block=budget.block):
            first = records[0]
            heads = {key: first["geometry"][key] for key in ("query_heads", "kv_heads", "head_dim")}
            lines.append({
                "device": first["setting"]["device_name"], **heads, "k": budget.k, "block": budget.block,
                "dense_below": first_faster(dense_s, sparse_s), "lengths": sorted(dense_s),
                "dense": fastest.baseline or first["setting"]["dense_attention"], "layers": layers, "weights": config.weights(),
                "evidence": first["evidence"][way.name], "commit": first["machine"]["commit"], "source": source,
            })  # fmt: skip
    return lines


def _breakdown(runs: list[dict]) -> dict:
    """Mean seconds per stage; they and "rest" add up to "total"."""
    timed = {name for run in runs for name in run}
    named = ("total", *STAGES[:-1], *(part for part in PARTS if part in timed))
    mean = {name: sum(run.get(name, 0.0) for run in runs) / len(runs) for name in named}
    return {**mean, "rest": mean["total"] - sum(mean[name] for name in named[1:])}


def stages_in(result: dict) -> list[str]:
    """The stages that have a clock in any row, in order, "rest" at the end."""
    timed = {name for row in result["rows"] for name in row["stages_s"] or ()}
    return [name for name in (*STAGES[:-1], *PARTS, "rest") if name in timed]


def ratio(estimate: dict | None) -> str | None:
    """A speed-up with its interval."""
    return None if estimate is None else f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def fed(config: dict) -> str:
    """How a prompt reached the model, where that is worth a word."""
    several = f" in chunks of {config['chunk']} tokens" if config["chunk"] else ""
    return several + (f", other layers {' and '.join(config['layers'])}" if config["layers"] != ["stock"] else "")


def markdown(result: dict) -> str:
    config, rows = result["config"], result["rows"]
    table, stage_table, stages = [], [], stages_in(result)
    dense = list(dict.fromkeys(name for row in rows for name in row["over"]))
    for row in rows:
        ttft = row["ttft_s"]
        head = {name: row[name] for name in ("length", "label", "evidence", "k", "block")}
        table.append({
            **head, "median": ttft["median"], "quartiles": f"{ttft['q1']:.4g} - {ttft['q3']:.4g}", "p95": ttft["p95"],
            **{name: ratio(row["over"].get(name)) for name in dense},
            "peak": None if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
            "peak_over": row["peak_over_best_dense"],
        })  # fmt: skip
        if row["stages_s"] is not None:
            stage_table.append({**head, **{name: row["stages_s"].get(name) for name in (*stages, "total")}})
    names = {"length": "tokens", "label": "prefill", "evidence": "evidence", "k": "k", "block": "b_sel"}
    ceilings = [{**entry, "attention_share": f"{100 * entry['attention_share']:.1f}"} for entry in result["ceilings"]]
    first = result["machines"][0]
    text = (
        f"# How long until the first token, dense against sparse?\n\n{config['model'] or result['weights']}, batch 1, "
        f"{config['prompt']} prompts{fed(config)}, dense attention `{first['dense_attention']}`, operators `{config['impl']}`; "
        f"{config['runs']} interleaved rounds after {config['warmup']} of warm-up; speed-ups over dense with the same other "
        f"layers, with 95% paired bootstrap intervals.{budget_words(budget_in(config))}\n\n"
    )  # fmt: skip
    if table:
        text += "## Time to first token\n\n" + markdown_table(table, {
            **names, "median": "TTFT median (s)", "quartiles": "quartiles (s)", "p95": "p95 (s)",
            **{name: "speed-up" if len(dense) == 1 else f"over {name.removeprefix('dense ')}" for name in dense},
            "peak": "peak memory (MiB)", "peak_over": "peak / fastest dense",
        })  # fmt: skip
    if stage_table:
        text += (
            "\n## Where the time goes\n\nMean seconds per stage, measured in separate runs with clocks; a dense row's "
            "attention is that of its full-attention layers. rest: projections and rotary embedding of the attention layers, "
            "residuals, embedding, head, and what has no clock.\n\n"
            + markdown_table(stage_table, {**names, **{n: f"{n} (s)" for n in (*stages, "total")}})
        )
    if ceilings:
        text += (
            "\n## How much could sparsity gain at most?\n\nTTFT / (TTFT - dense attention), both from the runs with clocks.\n\n"
            + markdown_table(ceilings, {
                "length": "tokens", "label": "over", "attention_s": "dense attention (s)", "total_s": "total (s)",
                "attention_share": "share (%)", "ceiling": "largest possible speed-up",
            })
        )  # fmt: skip
    if result["refused"]:
        text += "\n## Left out\n\n" + "".join(f"- {name}: {reason}\n" for name, reason in result["refused"])
    if result["crossovers"] and len(config["lengths"]) > 1:
        text += "\n## From which length on sparse is faster\n\nThan the fastest dense, of the lengths measured "
        text += f"({NEVER}: of none).\n\n"
        text += markdown_table(result["crossovers"], {name: name for name in ("k", "block", "dense", "lengths", "dense_below")})
    if result["missing"]:
        text += f"\nNot measured yet: {', '.join(map(str, result['missing']))} tokens.\n"
    if config["shape"]:
        text += "\nThe weights are random: times are those of the checkpoint, and nothing here says anything about quality.\n"
    if any(row["evidence"] == "untrained" for row in rows):
        text += "\nThe indexer is untrained: these are figures of the runtime and say nothing about quality.\n"
    for entry in result["machines"]:
        linear = f", linear attention by {entry['linear_attention']}" if entry.get("linear_attention") else ""
        text += (
            f"\n{entry['length']} tokens: measured on {machine_line(entry)}; {entry['device']}, {entry['dtype']}, "
            f"{entry['threads']} threads{linear}, load average {entry['load_average'][0]:.2f} at the start.\n"
        )
    line = {"config": config, "base": result["base"], "adapter": result["adapter"], "machine": first}
    return text + f"\n```json\n{json.dumps(line)}\n```\n"


def _colour(row: dict, dense: set) -> str:
    """Of a row: that of what chooses its keys, lighter where every query chooses for itself."""
    if row["variant"] in dense:
        return PALETTE["dense"]
    base = row["variant"].partition(" ")[0]
    if base == ATTACHED:
        return PALETTE[ATTACHED]
    variant = variant_named(base)
    kind = {"indexer": "distilled"}.get(variant.chooser, variant.chooser)
    own = f"{kind}, per query"
    return PALETTE[own if own in PALETTE and not variant.shared else kind]


def figure(result: dict):
    from matplotlib.ticker import LogLocator

    config, stages = result["config"], stages_in(result)
    lengths, names = (list(dict.fromkeys(row[key] for row in result["rows"])) for key in ("length", "variant"))
    dense = {name for row in result["rows"] for name in row["over"]}
    staged = [row for row in result["rows"] if row["stages_s"] is not None]
    if len(staged) > 16:
        staged = [row for row in staged if row["length"] == max(lengths)]
    figure, axes = new_figure(columns=2, width=6.0, height=max(3.8, 1.5 + 0.32 * len(staged)))
    left, right = axes[0]
    used: dict[str, int] = {}
    for n, name in enumerate(names):
        rows = [row for row in result["rows"] if row["variant"] == name]
        spread = 1.012 ** (n - (len(names) - 1) / 2)  # neighbours stay apart at one length
        median = [row["ttft_s"]["median"] for row in rows]
        errors = [
            [row["ttft_s"]["median"] - row["ttft_s"]["q1"] for row in rows],
            [row["ttft_s"]["q3"] - row["ttft_s"]["median"] for row in rows],
        ]
        colour = _colour(rows[0], dense)
        used[colour] = used.get(colour, -1) + 1
        marker, line = STYLES[used[colour] % len(STYLES)]
        left.errorbar(
            [row["length"] * spread for row in rows], median, yerr=errors, marker=marker, markersize=4, capsize=2,
            linewidth=1.2, color=colour, linestyle=line,
            label=rows[0]["label"] if rows[0]["evidence"] == "dense" else f"{rows[0]['label']} ({rows[0]['evidence']})",
        )  # fmt: skip
    if len(lengths) > 1:
        left.set_xscale("log", base=2)
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        left.yaxis.set_major_formatter("{x:g}")
    else:
        left.set_xlim(lengths[0] * 0.9, lengths[0] * 1.1)
        left.set_ylim(bottom=0)
    left.set_xticks(lengths, [str(length) for length in lengths])
    left.minorticks_off()
    left.set_xlabel("prompt (tokens)")
    left.set_ylabel("TTFT (s), median and quartiles")
    left.set_title("How long until the first token?", fontsize=10, loc="left")
    left.legend(fontsize=7.5, frameon=False, loc="best")

    start = [0.0] * len(staged)
    for stage in stages:
        width = [max(0.0, row["stages_s"].get(stage, 0.0)) for row in staged]
        right.barh(range(len(staged)), width, left=start, height=0.7, color=STAGE_COLOURS[stage], label=stage)
        start = [a + b for a, b in zip(start, width)]
    right.set_yticks(range(len(staged)), [f"{row['label']}, {row['length']}" for row in staged], fontsize=8)
    right.invert_yaxis()
    right.grid(False, axis="y")
    right.set_xlabel("time (s), runs with stage clocks")
    right.set_title("Where does it go?", fontsize=10, loc="left")
    right.legend(fontsize=7.5, frameon=False, ncols=6, loc="upper left", bbox_to_anchor=(-0.02, -0.16))
    first = result["machines"][0]
    common = (("k", "k", budget_in(config).k), ("b_sel", "block", budget_in(config).block))
    told = [f"{name} = {value}, " for name, field, value in common if any(row[field] == value for row in result["rows"])]
    told.append(f"{config['runs']} interleaved rounds")
    caption(
        figure, f"{result['weights']}, batch 1{fed(config)}, {first['dtype']}, {''.join(told)}",
        f"measured: {machine_line(first)}, {first['threads']} threads",
    )  # fmt: skip
    return figure
