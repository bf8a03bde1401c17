"""report.md of an oracle study."""

from collections.abc import Iterable
from pathlib import Path

from ..budget import Budget
from ..measure.variants import budget_words
from ..runs.machine import machine_line
from ..runs.page import markdown_table

CAPTIONS = {
    "quality.png": "How close to dense does each budget come, end to end?",
    "tasks.png": "Does the model still solve the tasks?",
    "retained.png": "How much of the attention mass fits in the budget, layer by layer?",
    "error.png": "How far is each layer's attention output from dense?",
    "sharing.png": "What does sharing a support among neighbouring queries cost?",
}


def markdown(report: dict, drawn: list[str]) -> str:
    """The report as a page: what was measured, the tables, the figures, and what they do not say."""
    config, model = report["config"], report["model"]
    layers = f"{len(model['layers'])} of {model['num_layers']} layers are full attention"
    heads = f"{model['query_heads']} query and {model['kv_heads']} KV heads of {model['head_dim']}"
    every = f", at every {config['position_stride']}th position" if config["position_stride"] > 1 else ""
    common = Budget.parse(config["budget"], Budget(k=max(config["budgets"]), block=1))
    lines = [
        f"# How much dense attention does {Path(config['model']).name} need at {config['length']} tokens?",
        "",
        f"{model['model_type']}, {layers}, {heads}. {config['prompts']} prompts of real text, {config['dtype']} on "
        f"{config['device']}, operators: {config['impl']}. {machine_line(report['machine'])}.",
        "",
        "## End to end",
        "",
        "Every full-attention layer is sparse at once, each on the hidden states that the sparse layers before it "
        "left. KL is the mean of KL(dense || sparse) over next-token distributions"
        f"{every}; agreement is the share of positions with the same most likely token; the second half leaves out the "
        "early positions, which see few more than k keys. Pairs skipped are causal (query, key) pairs. Retained is the "
        "attention mass within the support, along this trajectory, over 64 queries of each prompt's second half. "
        f"[Brackets] are 95% bootstrap intervals over prompts.{budget_words(common)}",
        "",
        _end_to_end_table(report),
        "The oracle selects with the attention mass itself: it tells what a budget could achieve, not what a trained "
        "indexer does. Controls choose without looking. Below the noise floor a difference means nothing.",
        "",
    ]  # fmt: skip
    if config["tasks"]:
        lines += ["## Tasks", "", _tasks_note(config), "", _tasks_table(report)]
    if report["layers"]:
        lines += [
            "## Layer by layer on the dense trajectory",
            "",
            f"Each layer with the inputs it has in the dense model; prompts measured: {config['layer_prompts']}, "
            'second half; means over layers. "2k, vs own" is the mass within a support of 2k keys; both "vs own" '
            "columns divide by what each query's own top-k keeps at k. p5 is the 5th percentile over queries, mean "
            "over layers. Output error is the RMS of the difference from the layer's dense attention output, over the "
            "RMS of that output.",
            "",
            _layers_table(report),
            "How alike are the supports that neighbouring queries choose for themselves? Unions are in keys.",
            "",
            _overlap_table(report),
        ]  # fmt: skip
    lines += ["## Figures", ""]
    for name in drawn:
        lines += [f"**{CAPTIONS[name]}**", "", f"![{CAPTIONS[name]}]({name})", ""]
    lines += ["## Prompts", "", *[f"- {name}" for name in report["prompts"]], ""]
    return "\n".join(lines)


def _end_to_end_table(report: dict) -> str:
    rows = []
    for row in report["end_to_end"]:
        if "kl" not in row:
            continue
        rows.append({
            "evidence": row["evidence"],
            "support": row["label"],
            "k": row.get("k"),
            "skipped": _percent(row.get("skipped_pairs")),
            "kl": _number(row, "kl"),
            "kl2": _number(row, "kl_second_half"),
            "agreement": _share(row, "agreement"),
            "agreement2": _share(row, "agreement_second_half"),
            "retained": _percent(row.get("retained")),
        })  # fmt: skip
    headings = {
        "evidence": "evidence", "support": "support", "k": "k", "skipped": "pairs skipped", "kl": "KL, nats",
        "kl2": "KL, 2nd half", "agreement": "agreement", "agreement2": "agreement, 2nd half", "retained": "retained",
    }  # fmt: skip
    return markdown_table(rows, headings)


def _tasks_note(config: dict) -> str:
    return (
        f"{config['task_count']} examples per task, {config['length']} tokens of which at most "
        f"{config['task_new_tokens']} are new; sparse prefill, dense greedy decode. Scores are RULER's, in percent. "
        "The difference from dense is taken example by example. Tasks with a haystack use this study's texts, so they "
        "compare within this page only."
    )


def _tasks_table(report: dict) -> str:
    rows = []
    for row in report["end_to_end"]:
        if "score" not in row:
            continue
        rows.append({
            "evidence": row["evidence"],
            "support": row["label"],
            "k": row.get("k"),
            "score": _share(row, "score"),
            "difference": _share(row, "score_minus_dense") if "score_minus_dense" in row else None,
            **{task: _percent(score) for task, score in row["scores"].items()},
        })  # fmt: skip
    names = {"evidence": "evidence", "support": "support", "k": "k", "score": "mean", "difference": "minus dense"}
    return markdown_table(rows, {**names, **{task: task for task in report["config"]["tasks"]}})


def _layers_table(report: dict) -> str:
    rows = []
    for (k, label), group in _grouped(report["layers"], ("k", "label")):
        rows.append({
            "evidence": "oracle",
            "support": label,
            "k": k,
            "retained": _mean(group, "retained_mean"),
            "retained_p5": _mean(group, "retained_p5"),
            "own": _pair(group, "relative"),
            "doubled": _pair(group, "doubled"),
            "error": _mean(group, "output_error"),
            "worst": max(row["output_error"] for row in group),
        })  # fmt: skip
    headings = {
        "evidence": "evidence", "support": "support", "k": "k", "retained": "retained", "retained_p5": "retained, p5",
        "own": "vs own (p5)", "doubled": "2k, vs own (p5)", "error": "output error", "worst": "worst layer",
    }  # fmt: skip
    return markdown_table(rows, headings)


def _overlap_table(report: dict) -> str:
    rows = []
    for (k, heads), group in _grouped(report["overlap"], ("k", "heads")):
        unions = {
            name: f"{_mean(group, name):.0f} ({_mean(group, name) / k:.1f}k)" for name in group[0] if "union" in name
        }
        owner = "all heads" if heads == "all" else "each KV group"
        rows.append({"evidence": "oracle", "owner": owner, "k": k, "jaccard": _mean(group, "jaccard"), **unions})
    headings = {"evidence": "evidence", "owner": "support of", "k": "k", "jaccard": "Jaccard of adjacent queries"}
    unions = {name: f"union of {name.removeprefix('union_')}" for name in rows[0] if name.startswith("union")}
    return markdown_table(rows, {**headings, **unions})


def _grouped(rows: list[dict], names: tuple[str, ...]) -> Iterable[tuple[tuple, list[dict]]]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return sorted(groups.items(), key=lambda group: group[0][0])


def _mean(rows: list[dict], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def _pair(rows: list[dict], name: str) -> str:
    return f"{_mean(rows, f'{name}_mean'):.3f} ({_mean(rows, f'{name}_p5'):.2f})"


def _number(row: dict, name: str) -> str:
    interval = row[f"{name}_interval"]
    return f"{row[name]:.3g}" + (f" [{interval[0]:.2g}, {interval[1]:.2g}]" if interval else "")


def _share(row: dict, name: str) -> str:
    interval = row[f"{name}_interval"]
    return _percent(row[name]) + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f}%"
