"""Rows of a report from the cells of a study: means over prompts, with bootstrap intervals."""

from collections.abc import Iterable

from ..runs.stats import Estimate, macro_difference, macro_mean
from .config import OracleConfig, Variant, sparsity, variants

LEAST_VALUES = 3  # fewer values get no interval
AVERAGED = ("kl", "agreement", "kl_second_half", "agreement_second_half")


def summarise(config: OracleConfig, kv_heads: int, cells: dict[str, dict]) -> dict:
    """`{"end_to_end": rows, "layers": rows, "overlap": rows}`; every row names its evidence."""
    dense = cells.get("dense", {}).get("scores", {})
    rows = []
    if dense:
        rows.append({"evidence": "dense", "label": f"dense in {config.dtype}", **_tasks(dense, None, config)})
    if config.floor_dtype:
        cell = cells[f"noise-{config.floor_dtype}"]
        label = f"dense in {config.floor_dtype}"
        rows.append({"evidence": "noise floor", "label": label, **_end_to_end(cell, dense, config)})
    by_layer = [cells[f"layers-{n}"] for n in range(config.layer_prompts)]
    if by_layer:
        paths = {"prompts": [cell["path"] for cell in by_layer], "scores": {}}
        row = _end_to_end(paths, {}, config)
        rows.append({"evidence": "noise floor", "label": "all keys through the sparse path", **row})
    for variant in variants(config, kv_heads):
        rows.append({**_columns(variant, config), **_end_to_end(cells[variant.cell], dense, config)})
    return {
        "end_to_end": rows,
        "layers": [
            {**_columns(_variant_of(row), config), "layer": row["layer"], **values}
            for row, values in _mean_over_prompts([cell["layers"] for cell in by_layer], 5)
        ],
        "overlap": [
            {"evidence": "oracle", "heads": row["heads"], "k": row["k"], "layer": row["layer"], **values}
            for row, values in _mean_over_prompts([cell["overlap"] for cell in by_layer], 3)
        ],
    }


def _columns(variant: Variant, config: OracleConfig) -> dict:
    return {
        "evidence": variant.evidence,
        "label": variant.label,
        "selector": variant.selector,
        "heads": variant.heads,
        "block": variant.block,
        "reduce": variant.reduce,
        "share_layers": variant.share_layers,
        "k": variant.k,
        "skipped_pairs": sparsity(variant.k, config.length),
    }


def _variant_of(row: dict) -> Variant:
    return Variant("oracle", "oracle", row["k"], row["heads"], row["block"], row["reduce"])


def _end_to_end(cell: dict, dense: dict[str, list[float]], config: OracleConfig) -> dict:
    prompts = cell["prompts"]
    row = {}
    for name in AVERAGED:
        values = [prompt[name] for prompt in prompts]
        row |= _with_interval(name, macro_mean([values], seed=config.seed), len(values))
    retained = [prompt["retained_by_layer"] for prompt in prompts if prompt.get("retained_by_layer")]
    if retained:
        by_layer = [_mean(values) for values in zip(*retained)]
        row |= {"retained": _mean(by_layer), "retained_by_layer": by_layer}
    return {**row, **_tasks(cell["scores"], dense, config)}


def _tasks(scores: dict[str, list[float]], dense: dict[str, list[float]] | None, config: OracleConfig) -> dict:
    """The mean of the tasks' mean scores, its difference from dense example by example, and each task's mean."""
    if not scores:
        return {}
    strata = list(scores.values())
    row = _with_interval("score", macro_mean(strata, seed=config.seed), config.task_count)
    row["scores"] = {task: _mean(values) for task, values in scores.items()}
    if dense is not None:
        difference = macro_difference([dense[task] for task in scores], strata, seed=config.seed)
        row |= _with_interval("score_minus_dense", difference, config.task_count)
    return row


def _with_interval(name: str, estimate: Estimate, values: int) -> dict:
    interval = [estimate.low, estimate.high] if values >= LEAST_VALUES else None
    return {name: estimate.value, f"{name}_interval": interval}


def _mean_over_prompts(prompts: list[list[dict]], keys: int) -> Iterable[tuple[dict, dict]]:
    """`(row, means of its values)`; all prompts have their rows in one order, named by their first `keys` entries."""
    for rows in zip(*prompts):
        names = list(rows[0])[keys:]
        yield rows[0], {name: _mean([row[name] for row in rows]) for name in names}


def _mean(values) -> float:
    return sum(values) / len(values)
