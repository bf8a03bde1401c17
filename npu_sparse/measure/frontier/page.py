"""report.md and report.png of a frontier."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ...runs.figures import PALETTE, SERIES, caption, new_figure
from ...runs.page import markdown_table
from ..quality import GAPS, machine_lines, points
from ..quality.forced import nats, percent
from ..teacher_forced import FLATTERS
from ..variants import VARIANTS, budget_in, budget_words


@dataclass(frozen=True)
class Row:
    """A variant at one point of the grid, as a report has it.

    Attributes:
        score: the macro average of generated scores; forced: `right`, `change` and `kl` of the teacher-forced one, or None where
            nothing was teacher-forced. Estimates, as `runs.stats` writes them.
        ttft_s: summary of the seconds; dense_ttft_s: that of dense beside it. None where nothing was timed.
        speed_up: over that dense; gaps: by name, paired differences of the score.
        how: "measured"; machine, commit: of everything that the row is made of.
    """

    variant: str
    label: str
    evidence: str
    k: int | None
    block: int | None
    score: dict
    forced: dict | None
    how: str
    machine: str
    commit: str
    ttft_s: dict | None = None
    dense_ttft_s: dict | None = None
    speed_up: dict | None = None
    gaps: dict = field(default_factory=dict)


def markdown(result: dict) -> str:
    config = result["config"]
    forced = bool(result["forced_tasks"])
    lines = []
    for row in result["rows"]:
        ttft, dense, speed_up = row["ttft_s"], row["dense_ttft_s"], row["speed_up"]
        lines.append({
            **{name: row[name] for name in ("label", "evidence", "k", "block", "how")},
            "score": points(row["score"]),
            **(_forced(row["forced"]) if forced else {}),
            "ttft": ttft and f"{ttft['median']:.4g} ({ttft['q1']:.4g} - {ttft['q3']:.4g})",
            "dense": dense and dense["median"],
            "speed_up": speed_up and f"{speed_up['value']:.3f} [{speed_up['low']:.3f}, {speed_up['high']:.3f}]",
            **{gap: points(change) for gap, change in row["gaps"].items()},
        })  # fmt: skip
    label = {name: variant.label for name, variant in VARIANTS.items()}
    columns = {
        "label": "prefill", "evidence": "evidence", "k": "k", "block": "b_sel", "score": "score (of 100)",
        **({"right": "teacher-forced: right (%)", "change": "difference to dense (points)", "kl": "KL (nats)"} if forced else {}),
        "ttft": "TTFT median (quartiles) (s)", "dense": "dense beside it (s)", "speed_up": "speed-up",
        **{gap: f"{gap} ({label[before]} → {label[after]})" for gap, (before, after) in GAPS.items()}, "how": "how",
    }  # fmt: skip
    skipped = (
        f" Not solved by dense attention, and left out: {', '.join(result['unsolved'])}." if result["unsolved"] else ""
    )
    text = (
        f"# Which budgets are worth their quality?\n\n{config['model']}, {result['length']} tokens, {config['dtype']}, "
        f"operators `{config['impl']}`. Score: macro average over {', '.join(result['tasks'])}, {config['count']} "
        f"prompts each, with 95% bootstrap intervals.{skipped} TTFT: batch 1, {config['runs']} interleaved rounds."
        " "
        "Gaps: paired differences in points, negative = lost; at b_sel = 1 nothing is shared and there is no "
        "realization gap. Every point is timed interleaved with dense: speed-ups compare the two, whatever the machine "
        f"did since.{budget_words(budget_in(config))}\n\n"
        f"{markdown_table(lines, columns)}\n"
    )
    if forced:
        text += f"{FLATTERS} Teacher-forced: macro average over {', '.join(result['forced_tasks'])}; differences are paired.\n\n"
    if any(row["evidence"] == "untrained" for row in result["rows"]):
        text += "The indexer is untrained: its scores say nothing about quality.\n\n"
    text += "".join(f"Measured on {line}.\n" for line in machine_lines(result))
    line = {"config": config, "base": result["base"], "adapter": result["adapter"], "machine": result["machines"][0]}
    return text + f"\n```json\n{json.dumps(line)}\n```\n"


def _forced(values: dict) -> dict:
    return {"right": percent(values["right"]), "change": percent(values["change"]), "kl": nats(values["kl"])}


BLOCK_MARKERS = "os^vPX*h"


def figure(result: dict):
    config = result["config"]
    forced = bool(result["forced_tasks"])
    figure, axes = new_figure(rows=2 if forced else 1, width=7.6, height=4.6)
    _panel(axes[0, 0], result, lambda row: {name: 100 * value for name, value in row["score"].items()})
    axes[0, 0].set_ylabel("macro score (points of 100), 95% interval")
    axes[0, 0].set_title("Which budgets are worth their quality? Up and left is better.", fontsize=10, loc="left")
    if forced:
        _panel(axes[1, 0], result, lambda row: row["forced"]["kl"])
        axes[1, 0].set_yscale("symlog", linthresh=0.01)
        axes[1, 0].set_ylim(bottom=0)
        axes[1, 0].set_ylabel("teacher-forced KL to dense (nats), 95% interval")
        axes[1, 0].set_title("How far from dense is the answer? Down and left is better.", fontsize=10, loc="left")
    caption(
        figure, f"{Path(config['model']).name}, {result['length']} tokens, {config['dtype']}, {len(result['tasks'])} tasks x "
        f"{config['count']} prompts", *(f"measured: {line}" for line in machine_lines(result)),
    )  # fmt: skip
    return figure


def _panel(ax, result: dict, quality) -> None:
    """`quality(row)`, an estimate, of every point against its TTFT; oracles, which are not timed, as lines."""
    config = result["config"]
    colour = {k: SERIES[n % len(SERIES)] for n, k in enumerate(sorted(config["ks"]))}
    marker = {block: BLOCK_MARKERS[n] for n, block in enumerate(sorted(config["blocks"]))}
    oracles = 0
    for row in result["rows"]:
        score = quality(row)
        if row["evidence"] == "oracle":
            ax.axhline(
                score["value"],
                color=colour[row["k"]],
                linestyle=(4 * oracles, (4, 4 * len(colour) - 4 or 2)),  # equal scores show side by side
                linewidth=1.3,
                label=f"{row['label']}, k = {row['k']}",
            )
            oracles += 1
            continue
        dense = row["evidence"] == "dense"
        ttft = row["ttft_s"]
        ax.errorbar(
            [ttft["median"]], [score["value"]],
            xerr=[[ttft["median"] - ttft["q1"]], [ttft["q3"] - ttft["median"]]],
            yerr=[[max(0.0, score["value"] - score["low"])], [max(0.0, score["high"] - score["value"])]],
            marker="D" if dense else marker[row["block"]], markersize=7, capsize=2, elinewidth=1, linestyle="none",
            color=PALETTE["dense"] if dense else colour[row["k"]],
            label="dense" if dense else f"k = {row['k']}, b_sel = {row['block']} ({row['evidence']})",
        )  # fmt: skip
    ax.set_xlim(left=0)
    ax.set_xlabel("TTFT (s): median and quartiles")
    ax.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
