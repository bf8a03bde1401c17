"""The report of a quality run: its rows and gaps, report.md and report.png."""

import itertools
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from ...runs import stats
from ...runs.figures import PALETTE, RULE, SERIES, caption, new_figure
from ...runs.machine import machine_line
from ...runs.page import markdown_table
from ...tasks.catalogue import task_named
from ..variants import (
    VARIANTS,
    budget_in,
    budget_of,
    budget_words,
    in_order,
    variant_named,
)
from .config import GAPS, MACRO, TOTAL, EvalConfig
from .forced import figure_forced, markdown_forced, tabulate_forced


@dataclass(frozen=True)
class Row:
    """The score of one variant on one task, or on all that dense attention solves, as a report has it.

    Attributes:
        task: its name, or `MACRO`.
        variant: its name, that of `VARIANTS` with its options; label: what a table calls it.
        options: fields of its own Budget; k, block: of the Budget that it ran with, None where it has none.
        prompts: how many it was scored on.
        score: an estimate with its interval, as `runs.stats` writes it; a share of 1.
    """

    task: str
    variant: str
    label: str
    evidence: str
    options: dict
    k: object
    block: int | None
    prompts: int
    score: dict


def mean_score(record: dict) -> float:
    return sum(_scores(record)) / len(record["samples"])


def _scores(record: dict) -> list[float]:
    """Generated scores, or what is right teacher-forced where nothing was generated."""
    return [sample["score"] if "score" in sample else sample["right"] for sample in record["samples"]]


def is_solved(config: EvalConfig, dense: dict) -> bool:
    """Whether dense attention solves a task by one of the run's instruments."""
    means = [
        sum(sample[name] for sample in dense["samples"]) / len(dense["samples"])
        for name in ("score", "right") if name in dense["samples"][0]
    ]  # fmt: skip
    return max(means) >= config.min_dense_score


def tabulate(config: EvalConfig, records: dict) -> dict:
    names = in_order(config.variants)
    dense = {task: mean_score(records[task, "dense"]) for task in config.tasks}
    solved = [task for task in config.tasks if dense[task] >= config.min_dense_score]
    rows = []
    for name in names:
        evidence = [record["evidence"] for cell, record in records.items() if cell[1] == name]
        budget = budget_of(name, config.budget)
        for task in (MACRO, *config.tasks):
            tasks = solved if task == MACRO else [task]
            if not tasks or any((task, name) not in records for task in tasks):
                continue
            estimate = stats.macro_mean([_scores(records[task, name]) for task in tasks], seed=config.seed)
            rows.append(Row(
                task=task, variant=name, label=variant_named(name).label, evidence=evidence[0],
                options=dict(variant_named(name).options), k=budget and budget.k, block=budget and budget.block,
                prompts=config.count * len(tasks), score=estimate.to_dict(),
            ))  # fmt: skip

    def changes(before: str, after: str) -> list[dict]:
        """The paired difference of two variants on every task, and on those that dense attention solves."""
        listed = []
        for task in (MACRO, *config.tasks):
            tasks = solved if task == MACRO else [task]
            if not tasks or any((task, name) not in records for task in tasks for name in (before, after)):
                continue
            first, second = ([_scores(records[task, name]) for task in tasks] for name in (before, after))
            estimate = stats.macro_difference(first, second, seed=config.seed)
            listed.append({"from": before, "to": after, "task": task, "change": estimate.to_dict()})
        return listed

    gaps = [{"gap": gap, **change} for gap, pair in {**GAPS, **TOTAL}.items() for change in changes(*pair)]
    options = [
        change for name in names if variant_named(name).options
        for before in ("dense", variant_named(name).base) if before in names for change in changes(before, name)
    ]  # fmt: skip
    any_record = next(iter(records.values()))
    adapters = {record["adapter"] for record in records.values()} - {None}
    return {
        "complete": True,
        "stage": "eval",
        "config": config.to_dict(),
        "base": any_record["base"],
        "adapter": next(iter(adapters), None),
        "prompts": {task: records[task, "dense"]["prompts"] for task in config.tasks},
        "machines": _distinct([record["machine"] for record in records.values()]),
        "tasks": {
            task: {"dense": dense[task], "solved": task in solved, "label": task_named(task).label} for task in config.tasks
        },
        "rows": [asdict(row) for row in rows],
        "gaps": gaps,
        "options": options,
        "forced": tabulate_forced(config, records),
    }


def _distinct(machines: list[dict]) -> list[dict]:
    keys = Counter(json.dumps(machine, sort_keys=True) for machine in machines)
    return [json.loads(key) for key in sorted(keys)]


def machine_lines(*results: dict) -> list[str]:
    """`machine_line` of everything that reports were measured on, none twice."""
    return list(dict.fromkeys(machine_line(machine) for result in results for machine in result["machines"]))


def points(estimate: dict) -> str:
    """A score or a change as points of 100, with its interval."""
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def markdown(result: dict) -> str:
    config = result["config"]
    tasks = result["tasks"]
    solved = [task for task in tasks if tasks[task]["solved"]]
    shown = [MACRO, *tasks] if solved else list(tasks)
    heading = {
        task: f"{task}{' (' + tasks[task]['label'] + ')' if tasks[task]['label'] else ''}"
        f"{'' if tasks[task]['solved'] else ' *'}"
        for task in tasks
    }
    heading[MACRO] = f"{MACRO} ({len(solved)} tasks)"
    by_variant: dict[str, dict] = {}
    for row in result["rows"]:
        line = by_variant.setdefault(row["variant"], {
            "label": row["label"], "evidence": row["evidence"], "k": row["k"], "block": row["block"]
        })  # fmt: skip
        line[row["task"]] = points(row["score"])
    by_task: dict[str, dict] = {task: {"task": heading[task]} for task in shown}
    for gap in result["gaps"]:
        by_task[gap["task"]][gap["gap"]] = points(gap["change"])
    label = {name: variant.label for name, variant in VARIANTS.items()}
    gap_columns = {
        gap: f"{gap} ({label[before]} → {label[after]})"
        for gap, (before, after) in {**GAPS, **TOTAL}.items()
        if any(one["gap"] == gap for one in result["gaps"])
    }
    unsolved = "" if len(solved) == len(tasks) else (
        f"\\* Dense attention scores less than {100 * config['min_dense_score']:.0f} here: "
        "the task says nothing about sparsity and is not in the macro average.\n\n"
    )  # fmt: skip
    columns = {"label": "prefill", "evidence": "evidence", "k": "k", "block": "b_sel", **{t: heading[t] for t in shown}}
    how = "greedy" if "generated" in config.get("instruments", ("generated",)) else "teacher-forced"
    place = config.get("question", "end")  # runs of before had no other
    if place != "end":
        how += f", the question {'in' if place == 'middle' else 'at'} the {place} of the prompt"
    text = (
        f"# How much quality does sparse prefill lose?\n\n{config['model']}, {config['length']} tokens, "
        f"{config['count']} prompts per task, {how}, {config['dtype']}; scores of 100 with 95% bootstrap intervals "
        f"over prompts, all variants on the same prompts.{budget_words(budget_in(config))}\n\n"
        "## Scores\n\n"
        f"{markdown_table(list(by_variant.values()), columns)}\n{unsolved}"
    )
    if gap_columns:
        text += (
            "## Gaps\n\nPaired differences on the same prompts, in points; negative = lost.\n\n"
            f"{markdown_table(list(by_task.values()), {'task': 'task', **gap_columns})}\n"
        )
    if result["options"]:
        lines: dict[tuple, dict] = {}
        for entry in result["options"]:
            line = lines.setdefault((entry["from"], entry["to"]), {
                "to": by_variant[entry["to"]]["label"], "from": by_variant[entry["from"]]["label"]
            })  # fmt: skip
            line[entry["task"]] = points(entry["change"])
        columns = {"to": "prefill", "from": "measured against", **{task: heading[task] for task in shown}}
        text += (
            "## Options\n\nPaired differences on the same prompts, in points; negative = lost.\n\n"
            f"{markdown_table(list(lines.values()), columns)}\n"
        )
    text += markdown_forced(result)
    if any(row["evidence"] == "untrained" for row in result["rows"]):
        text += "The indexer is untrained: its scores say nothing about quality.\n\n"
    text += "".join(f"Measured on {line}.\n" for line in machine_lines(result))
    return (
        text
        + f"\n```json\n{json.dumps({'config': config, 'base': result['base'], 'adapter': result['adapter']})}\n```\n"
    )


def variant_styles(columns: dict) -> dict:
    """How matplotlib draws each variant of `{name: a row of it}`: its marker, its colour by evidence, hollow where shared."""
    markers = dict(zip(VARIANTS, "DososXxHp8"))
    with_options = [name for name in columns if variant_named(name).options]
    markers.update(zip(with_options, itertools.cycle("^v<>Pph*")))
    return {
        name: {
            "label": row["label"] if name == "dense" else f"{row['label']} ({row['evidence']})",
            "marker": markers[name],
            "color": PALETTE[row["evidence"]], "markerfacecolor": "white" if variant_named(name).shared else None,
        }
        for name, row in columns.items()
    }  # fmt: skip


def forced_figure(result: dict):
    """`figure_forced` in the colours of the report's other figure."""
    return figure_forced(result, variant_styles({row["variant"]: row for row in result["forced"]["rows"]}))


def figure(result: dict):
    tasks = result["tasks"]
    solved = [task for task in tasks if tasks[task]["solved"]]
    shown = [MACRO, *solved] if solved else list(tasks)  # what dense attention does not solve is in the table alone
    columns = {row["variant"]: row for row in result["rows"]}
    gaps = [gap for gap in (*GAPS, *TOTAL) if any(row["gap"] == gap for row in result["gaps"])]
    height = 1.8 + 0.17 * len(shown) * max(len(columns), len(gaps))
    figure, axes = new_figure(columns=2 if gaps else 1, width=6.0, height=height)

    def panel(ax, series, key, scale_label, question):
        place = {task: n for n, task in enumerate(shown)}
        for n, (name, style) in enumerate(series.items()):
            offset = (n - (len(series) - 1) / 2) * 0.8 / len(series)
            entries = [entry for entry in key(name) if entry["task"] in place]
            y = [place[entry["task"]] + offset for entry in entries]
            values = [entry["score"] if "score" in entry else entry["change"] for entry in entries]
            x = [100 * value["value"] for value in values]
            errors = [
                [100 * max(0.0, value["value"] - value["low"]) for value in values],
                [100 * max(0.0, value["high"] - value["value"]) for value in values],
            ]
            ax.errorbar(x, y, xerr=errors, linestyle="none", markersize=5, elinewidth=1.2, capsize=2, **style)
        ax.set_yticks(
            range(len(shown)), [task if task == MACRO or tasks[task]["solved"] else f"{task} *" for task in shown]
        )
        ax.set_ylim(len(shown) - 0.4, -0.6)
        for edge in range(1, len(shown)):
            ax.axhline(edge - 0.5, color=RULE, linewidth=0.6)
        ax.grid(False, axis="y")
        ax.set_xlabel(scale_label)
        ax.set_title(question, fontsize=10, loc="left")
        ax.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.55 / height - 0.06), ncols=2)

    panel(
        axes[0, 0], variant_styles(columns), lambda name: [row for row in result["rows"] if row["variant"] == name],
        "score (points of 100)", "What does each prefill score?",
    )  # fmt: skip
    if gaps:
        colours = dict(zip((*GAPS, *TOTAL), (*SERIES[:3], PALETTE["dense"])))
        label = {**GAPS, **TOTAL}
        panel(
            axes[0, 1],
            {gap: {"label": f"{gap}: {' → '.join(label[gap])}", "marker": "o", "color": colours[gap]} for gap in gaps},
            lambda gap: [row for row in result["gaps"] if row["gap"] == gap],
            "change of score (points; negative = lost)", "Where is quality lost?",
        )  # fmt: skip
        axes[0, 1].axvline(0, color=PALETTE["dense"], linewidth=0.8)
        axes[0, 1].tick_params(labelleft=False)
    config, budget = result["config"], budget_in(result["config"])
    caption(
        figure, f"{Path(config['model']).name}, {config['length']} tokens, k = {budget.k}, b_sel = {budget.block}, "
        f"{config['count']} prompts per task, 95% intervals", *(f"measured: {line}" for line in machine_lines(result)),
    )  # fmt: skip
    return figure
