"""The teacher-forced part of a quality report: its rows and gaps, its tables, and forced.png."""

from ...runs import stats
from ...runs.figures import RULE, new_figure
from ...runs.page import markdown_table
from ..teacher_forced import FLATTERS
from ..variants import budget_of, in_order, variant_named
from .config import GAPS, MACRO, TOTAL, EvalConfig

MEASURES = ("right", "kl", "stress_right", "stress_kl")


def tabulate_forced(config: EvalConfig, records: dict) -> dict | None:
    """`{"tasks", "rows", "gaps"}`, or None where nothing was teacher-forced.

    A row has the estimates of `right` (a share) and `kl` (nats), of the same under stress where that was measured, and of
    `change`, the paired difference of `right` to dense. Gaps are paired differences of both. The macro average is over the tasks
    that dense attention solves teacher-forced.
    """
    if "forced" not in config.instruments:
        return None

    def samples(task: str, name: str, measure: str) -> list[float]:
        return [sample[measure] for sample in records[task, name]["samples"]]

    def mean(measure: str, tasks: list[str], name: str) -> dict:
        return stats.macro_mean([samples(task, name, measure) for task in tasks], seed=config.seed).to_dict()

    def difference(measure: str, tasks: list[str], before: str, after: str) -> dict:
        first, second = ([samples(task, name, measure) for task in tasks] for name in (before, after))
        return stats.macro_difference(first, second, seed=config.seed).to_dict()

    dense = {task: sum(samples(task, "dense", "right")) / config.count for task in config.tasks}
    solved = [task for task in config.tasks if dense[task] >= config.min_dense_score]
    measured = [measure for measure in MEASURES if config.stress or not measure.startswith("stress")]

    def scopes(*names: str):
        """The macro average and every task, with the tasks that they are made of, where all of these variants ran on them."""
        for scope in (MACRO, *config.tasks):
            tasks = solved if scope == MACRO else [scope]
            if tasks and all((task, name) in records for task in tasks for name in names):
                yield scope, tasks

    rows, gaps = [], []
    for name in in_order(config.variants):
        evidence = next((record["evidence"] for cell, record in records.items() if cell[1] == name), None)
        budget = budget_of(name, config.budget)
        for scope, tasks in scopes("dense", name):
            rows.append({
                "task": scope, "variant": name, "label": variant_named(name).label, "evidence": evidence,
                "k": budget and budget.k, "block": budget and budget.block, "prompts": config.count * len(tasks),
                **{measure: mean(measure, tasks, name) for measure in measured},
                "change": None if name == "dense" else difference("right", tasks, "dense", name),
            })  # fmt: skip
    for gap, pair in {**GAPS, **TOTAL}.items():
        if all(name in config.variants for name in pair):
            for scope, tasks in scopes(*pair):
                changes = {measure: difference(measure, tasks, *pair) for measure in ("right", "kl")}
                gaps.append({"gap": gap, "task": scope, **changes})
    return {
        "tasks": {task: {"dense": dense[task], "solved": task in solved} for task in config.tasks},
        "rows": rows,
        "gaps": gaps,
    }


def percent(estimate: dict | None) -> str | None:
    """A share as points of 100, with its interval."""
    if estimate is None:
        return None
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def nats(estimate: dict | None) -> str | None:
    """A divergence with its interval."""
    if estimate is None:
        return None
    return f"{estimate['value']:.4f} [{estimate['low']:.4f}, {estimate['high']:.4f}]"


def markdown_forced(result: dict) -> str:
    """The section of report.md, or nothing."""
    forced = result["forced"]
    if forced is None:
        return ""
    solved = [task for task, task_result in forced["tasks"].items() if task_result["solved"]]
    by_task = {(row["variant"], row["task"]): row for row in forced["rows"]}
    names = list(dict.fromkeys(row["variant"] for row in forced["rows"]))
    macro, each, gaps = [], [], {}
    for name in names:
        rows = {task: by_task[name, task] for task in (MACRO, *forced["tasks"]) if (name, task) in by_task}
        some = next(iter(rows.values()))
        head = {"label": some["label"], "evidence": some["evidence"], "k": some["k"], "block": some["block"]}
        each.append({
            **head, **{task: f"{percent(row['right'])}; {row['kl']['value']:.4f}" for task, row in rows.items() if task != MACRO}
        })  # fmt: skip
        if MACRO in rows:
            row = rows[MACRO]
            worst = max(solved, key=lambda task: by_task[name, task]["kl"]["value"])
            macro.append({
                **head, "right": percent(row["right"]), "change": percent(row["change"]), "kl": nats(row["kl"]),
                "worst": None if name == "dense" else f"{worst} ({by_task[name, worst]['kl']['value']:.4f})",
                "stress_right": percent(row.get("stress_right")), "stress_kl": nats(row.get("stress_kl")),
            })  # fmt: skip
    for gap in forced["gaps"]:
        gaps.setdefault(gap["task"], {"task": gap["task"]})[gap["gap"]] = f"{percent(gap['right'])}; {nats(gap['kl'])}"
    head = {"label": "prefill", "evidence": "evidence", "k": "k", "block": "b_sel"}
    columns = {
        **head, "right": "right (%)", "change": "difference to dense (points)", "kl": "KL (nats)", "worst": "worst task (KL)"
    }  # fmt: skip
    if result["config"].get("stress"):
        columns |= {"stress_right": "stress: right (%)", "stress_kl": "stress: KL (nats)"}
    text = (
        f"## Teacher-forced\n\n{FLATTERS} Here the reference answer goes through one dense continuation on the cache that the "
        "prefill left. Right: prompts whose every token of an answer is the most likely one. KL(dense || prefill) over the "
        "answer's positions, logits in fp32. 95% bootstrap intervals; differences are paired. Stress: prompt and answer in one "
        "sparse forward, which no deployment does.\n\n"
    )
    if macro:
        text += f"Macro average over {len(solved)} tasks that dense attention solves: {', '.join(solved)}.\n\n"
        text += markdown_table(macro, columns) + "\n"
    text += "Right (%); KL (nats), by task. \\* Not solved by dense attention, and not in the macro average.\n\n"
    marks = {task: task if task_result["solved"] else f"{task} *" for task, task_result in forced["tasks"].items()}
    text += markdown_table(each, {**head, **marks}) + "\n"
    if gaps:
        pairs = {gap: f"{gap} ({' → '.join(pair)})" for gap, pair in {**GAPS, **TOTAL}.items()}
        shown = {gap: pairs[gap] for gap in pairs if any(gap in line for line in gaps.values())}
        text += "Gaps: change of right (points); change of KL (nats, positive = lost).\n\n"
        text += markdown_table(list(gaps.values()), {"task": "task", **shown}) + "\n"
    return text


def figure_forced(result: dict, styles: dict):
    """Two panels, per task and variant: what is right, and the KL to dense, linear up to 0.01 nats and logarithmic from there.

    styles: how a variant is drawn, by name.
    """
    forced = result["forced"]
    tasks = [task for task in (MACRO, *forced["tasks"]) if any(row["task"] == task for row in forced["rows"])]
    figure, axes = new_figure(columns=2, width=6.0, height=1.8 + 0.17 * len(tasks) * len(styles))
    panels = (
        ("right", 100, "prompts with every answer token the most likely one (%)", "How many answers survive?"),
        ("kl", 1, "KL(dense || prefill) on the answer (nats)", "How far is it from dense?"),
    )
    for ax, (measure, factor, label, question) in zip(axes[0], panels):
        for n, (name, style) in enumerate(styles.items()):
            offset = (n - (len(styles) - 1) / 2) * 0.8 / len(styles)
            lines = [row for row in forced["rows"] if row["variant"] == name]
            x = [factor * row[measure]["value"] for row in lines]
            errors = [
                [factor * max(0.0, row[measure]["value"] - row[measure]["low"]) for row in lines],
                [factor * max(0.0, row[measure]["high"] - row[measure]["value"]) for row in lines],
            ]
            y = [tasks.index(row["task"]) + offset for row in lines]
            ax.errorbar(x, y, xerr=errors, linestyle="none", markersize=5, elinewidth=1.2, capsize=2, **style)
        ax.set_yticks(range(len(tasks)), tasks)
        ax.set_ylim(len(tasks) - 0.4, -0.6)
        for edge in range(1, len(tasks)):
            ax.axhline(edge - 0.5, color=RULE, linewidth=0.6)
        ax.set_xlabel(label)
        ax.set_title(question, fontsize=10, loc="left")
    axes[0, 1].set_xscale("symlog", linthresh=0.01)
    axes[0, 1].tick_params(labelleft=False)
    axes[0, 0].legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)
    return figure
