"""The report of a timing run: its rows and ceilings, report.md and report.png."""

import json
from pathlib import Path

from ...runs import stats
from ...runs.figures import PALETTE, caption, new_figure
from ...runs.figures import STAGES as STAGE_COLOURS
from ...runs.machine import machine_line
from ...runs.page import markdown_table
from ..clocks import (
    amdahl_ceiling,
)
from ..variants import (
    budget_in,
    budget_of,
    budget_words,
    variant_named,
)
from .config import ATTACHED, STAGES, TtftConfig


def tabulate(config: TtftConfig, records: list[dict]) -> dict:
    rows, ceilings = [], []
    for record in records:
        dense_s = record["seconds"]["dense"]
        for name, times in record["seconds"].items():
            budget = None if name == ATTACHED else budget_of(name, config.budget)
            peaks = [peak for peak in record["peak_bytes"][name] if peak is not None]
            rows.append({
                "length": record["length"], "variant": name, "label": _label(name),
                "evidence": record["evidence"][name],
                "k": budget and budget.k, "block": budget and budget.block, "seconds": times,
                "ttft_s": stats.summary(times),
                "speed_up": stats.ratio_of_medians(dense_s, times, seed=config.seed).to_dict(),
                "peak_bytes": max(peaks) if peaks else None,
                "stages_s": _breakdown(record["stages"][name]) if name in record["stages"] else None,
            })  # fmt: skip
        dense = _breakdown(record["stages"]["dense"])
        ceilings.append({
            "length": record["length"], "attention_s": dense["attention"], "total_s": dense["total"],
            "attention_share": dense["attention"] / dense["total"],
            "ceiling": amdahl_ceiling(dense["total"], dense["attention"]),
        })  # fmt: skip
    return {
        "stage": "ttft",
        "config": config.to_dict(),
        "base": records[0]["base"],
        "adapter": records[0]["adapter"],
        "machines": [{**record["machine"], "length": record["length"], **record["setting"]} for record in records],
        "rows": rows,
        "ceilings": ceilings,
    }


def _label(name: str) -> str:
    return "attached, runs dense" if name == ATTACHED else variant_named(name).label


def _breakdown(runs: list[dict]) -> dict:
    """Mean seconds per stage; they and "rest" add up to "total"."""
    mean = {name: sum(run.get(name, 0.0) for run in runs) / len(runs) for name in ("total", *STAGES[:-1])}
    return {**mean, "rest": mean["total"] - sum(mean[name] for name in STAGES[:-1])}


def markdown(result: dict) -> str:
    config = result["config"]
    table, stage_table = [], []
    for row in result["rows"]:
        ttft, speed_up = row["ttft_s"], row["speed_up"]
        head = {name: row[name] for name in ("length", "label", "evidence", "k", "block")}
        table.append({
            **head, "median": ttft["median"], "quartiles": f"{ttft['q1']:.4g} - {ttft['q3']:.4g}", "p95": ttft["p95"],
            "speed_up": f"{speed_up['value']:.3f} [{speed_up['low']:.3f}, {speed_up['high']:.3f}]",
            "peak": None if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
        })  # fmt: skip
        if row["stages_s"] is not None:
            shown = {name: row["stages_s"][name] for name in (*STAGES, "total")}
            stage_table.append({**head, **shown})
    names = {"length": "tokens", "label": "prefill", "evidence": "evidence", "k": "k", "block": "b_sel"}
    ceilings = [{**entry, "attention_share": f"{100 * entry['attention_share']:.1f}"} for entry in result["ceilings"]]
    first = result["machines"][0]
    text = (
        f"# How long until the first token, dense against sparse?\n\n{config['model']}, batch 1, {config['prompt']} "
        f"prompts, dense attention `{first['dense_attention']}`, operators `{config['impl']}`; {config['runs']} "
        f"interleaved rounds after {config['warmup']} of warm-up; speed-up over dense with 95% paired bootstrap "
        f"intervals.{budget_words(budget_in(config))}\n\n"
        "## Time to first token\n\n"
        + markdown_table(table, {
            **names, "median": "TTFT median (s)", "quartiles": "quartiles (s)", "p95": "p95 (s)",
            "speed_up": "speed-up",
            "peak": "peak memory (MiB)",
        })  # fmt: skip
        + "\n## Where the time goes\n\nMean seconds per stage, measured in separate runs whose clocks wait for the "
        "device; a dense row's attention is that of its full-attention layers.\n\n"
        + markdown_table(stage_table, {**names, **{n: f"{n} (s)" for n in (*STAGES, "total")}})
        + "\n## How much could sparsity gain at most?\n\n"
        "TTFT / (TTFT - dense attention), both from the runs with clocks.\n\n"
        + markdown_table(ceilings, {
            "length": "tokens", "attention_s": "dense attention (s)", "total_s": "total (s)",
            "attention_share": "share (%)", "ceiling": "largest possible speed-up",
        })
    )  # fmt: skip
    if any(row["evidence"] == "untrained" for row in result["rows"]):
        text += "\nThe indexer is untrained: these are figures of the runtime and say nothing about quality.\n"
    for entry in result["machines"]:
        text += (
            f"\n{entry['length']} tokens: measured on {machine_line(entry)}; {entry['device']}, "
            f"{entry['dtype']}, {entry['threads']} threads, load average {entry['load_average'][0]:.2f} at the start.\n"
        )
    line = {"config": config, "base": result["base"], "adapter": result["adapter"], "machine": first}
    return text + f"\n```json\n{json.dumps(line)}\n```\n"


def _colour(name: str) -> str:
    """Of a variant: that of what chooses its keys, lighter where every query chooses for itself."""
    if name == ATTACHED:
        return PALETTE["attached"]
    variant = variant_named(name)
    kind = {"indexer": "distilled"}.get(variant.chooser, variant.chooser)
    own = f"{kind}, per query"
    return PALETTE[own if own in PALETTE and not variant.shared else kind]


def figure(result: dict):
    from matplotlib.ticker import LogLocator

    config = result["config"]
    names = list(dict.fromkeys(row["variant"] for row in result["rows"]))
    staged = [row for row in result["rows"] if row["stages_s"] is not None]
    figure, axes = new_figure(columns=2, width=6.0, height=max(3.8, 1.5 + 0.32 * len(staged)))
    left, right = axes[0]
    lengths = list(dict.fromkeys(row["length"] for row in result["rows"]))
    for n, name in enumerate(names):
        rows = [row for row in result["rows"] if row["variant"] == name]
        spread = 1.012 ** (n - (len(names) - 1) / 2)  # neighbours stay apart at one length
        median = [row["ttft_s"]["median"] for row in rows]
        errors = [
            [row["ttft_s"]["median"] - row["ttft_s"]["q1"] for row in rows],
            [row["ttft_s"]["q3"] - row["ttft_s"]["median"] for row in rows],
        ]
        left.errorbar(
            [row["length"] * spread for row in rows], median, yerr=errors, marker="o", markersize=4, capsize=2,
            linewidth=1.2, color=_colour(name), linestyle="--" if name != ATTACHED and variant_named(name).options else "-",
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
    for stage in STAGES:
        width = [max(0.0, row["stages_s"][stage]) for row in staged]
        right.barh(range(len(staged)), width, left=start, height=0.7, color=STAGE_COLOURS[stage], label=stage)
        start = [a + b for a, b in zip(start, width)]
    right.set_yticks(range(len(staged)), [f"{row['label']}, {row['length']}" for row in staged], fontsize=8)
    right.invert_yaxis()
    right.grid(False, axis="y")
    right.set_xlabel("time (s), runs with stage clocks")
    right.set_title("Where does it go?", fontsize=10, loc="left")
    right.legend(fontsize=7.5, frameon=False, ncols=len(STAGES), loc="upper left", bbox_to_anchor=(-0.02, -0.16))
    first = result["machines"][0]
    budget = budget_in(config)
    caption(
        figure, f"{Path(config['model']).name}, batch 1, {first['dtype']}, k = {budget.k}, b_sel = {budget.block}, "
        f"{config['runs']} interleaved rounds", f"measured: {machine_line(first)}, {first['threads']} threads",
    )  # fmt: skip
    return figure
