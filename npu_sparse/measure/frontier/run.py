"""Which budgets are worth their quality? One table of score against TTFT at every k and b_sel: `npu-sparse frontier`.

A run directory holds config.json; quality/k<k>-b<block>/ and ttft/k<k>-b<block>/, which are runs of `quality` and
`ttft`; report.json, report.md and report.png. Cells that do not depend on what changes (dense; per-query variants at
the same k) are computed once and shared. Running again resumes.

At block 1 every query selects for itself, so the per-query indexer is timed; at larger blocks the shared one is.
"""

from dataclasses import asdict
from pathlib import Path

from ...runs.figures import write_figure
from ...runs.stats import summary
from ...runs.store import RunError, open_stage, write_json, write_text
from ..quality import GAPS, MACRO, adopt_records, machine_lines, run_eval
from ..ttft import run_ttft
from ..variants import Subject, budget_in, load_subject, with_tokenizer
from .config import RUNTIME, FrontierConfig, timed_variant
from .page import Row, figure, markdown


def run_frontier(config: FrontierConfig, output, *, model=None, tokenizer=None, indexer=None) -> dict:
    """The joined report of a grid; finished cells are only read.

    Arguments and errors as in `run_eval` and `run_ttft`; ValueError where there is no indexer.
    """
    if config.adapter is None and indexer is None:
        raise ValueError("adapter must name an indexer's directory, got none")
    directory = open_stage(output, "frontier", config)
    subject = Subject(model, tokenizer, indexer)
    runs = [_run_path(directory, kind, *point) for kind in ("quality", "ttft") for point in config.points()]
    if not all((run / "report.json").exists() for run in runs):
        subject = with_tokenizer(load_subject(config, ("indexer",), model, tokenizer, indexer), config)
    loaded = {"model": subject.model, "tokenizer": subject.tokenizer, "indexer": subject.indexer}
    pairs, earlier = [], []
    for k, block in config.points():
        run = _run_path(directory, "quality", k, block)
        adopt_records(config.quality_at(k, block), run, earlier)
        quality = run_eval(config.quality_at(k, block), run, **loaded)
        earlier.append(run)
        ttft = run_ttft(config.ttft_at(k, block), _run_path(directory, "ttft", k, block), **loaded)
        pairs.append((quality, ttft))
    result = {"stage": "frontier", "config": config.to_dict(), **join(pairs)}
    write_json(directory / "report.json", result)
    write_text(directory / "report.md", markdown(result))
    write_figure(directory / "report.png", figure(result))
    return result


def join(pairs: list[tuple[dict, dict]]) -> dict:
    """One table of `(quality report, ttft report)` pairs, a point each.

    Raises RunError unless both halves of a point have the same model, adapter, length, budget and runtime, and all
    points the same model, adapter, length, runtime and prompts, timed on the same hardware.
    """
    if not pairs:
        raise ValueError("pairs must hold at least one point, got none")
    first = pairs[0][0]
    whole = {**_identity(first), "prompts": first["prompts"]}
    for quality, ttft in pairs:
        halves = "the quality and the ttft run of a point"
        _require_same(halves, _identity(quality) | _grid(quality), _identity(ttft) | _grid(ttft))
        _require_same("all points", whole, {**_identity(quality), "prompts": quality["prompts"]})
        _require_same("all ttft runs", _hardware(pairs[0][1]), _hardware(ttft))
    solved = [task for task, scored in first["tasks"].items() if scored["solved"]]
    if not solved or (first.get("forced") and not any(scored["solved"] for scored in first["forced"]["tasks"].values())):
        raise RunError("dense attention must solve at least one task by every instrument for a frontier: see the quality reports")
    timings = [ttft for _, ttft in pairs]
    dense_s = [seconds for ttft in timings for seconds in _row(ttft, "dense")["seconds"]]
    oracles = {budget_in(quality["config"]).k: quality for quality, _ in pairs}
    return {
        "base": whole["model"],
        "adapter": whole["adapter"],
        "length": whole["length"],
        "tasks": solved,
        "forced_tasks": [task for task, scored in (first.get("forced") or {"tasks": {}})["tasks"].items() if scored["solved"]],
        "unsolved": [task for task in first["tasks"] if task not in solved],
        "rows": [
            asdict(row) for row in (
                Row(**_scored(first, "dense"), ttft_s=summary(dense_s), **_where(first, *timings)),
                *(Row(**_scored(oracles[k], "oracle"), **_where(oracles[k])) for k in sorted(oracles)),
                *(_point(quality, ttft) for quality, ttft in pairs),
            )
        ],  # fmt: skip
        "machines": [half["machines"][0] for pair in pairs for half in pair],
    }


def _run_path(directory: Path, kind: str, k: int, block: int) -> Path:
    path = directory / kind / f"k{k}-b{block}"
    path.parent.mkdir(exist_ok=True)
    return path


def _identity(half: dict) -> dict:
    config = half["config"]
    if half["stage"] == "eval":
        length = config["length"]
    else:
        length, *more = config["lengths"]
        if more:
            raise RunError(f"the ttft run of a point must have one length, got {config['lengths']}")
    common = {"model": half["base"], "adapter": half["adapter"], "length": length}
    budget = {name: value for name, value in budget_in(config).to_dict().items() if name not in ("k", "block")}
    return {**common, **{name: config[name] for name in RUNTIME}, **budget}


def _grid(half: dict) -> dict:
    budget = budget_in(half["config"])
    return {"k": budget.k, "block": budget.block}


def _require_same(what: str, first: dict, second: dict) -> None:
    for name, value in first.items():
        if second[name] != value:
            raise RunError(f"{what} must have the same {name}, got {value} and {second[name]}")


def _row(half: dict, variant: str) -> dict:
    """The row of a variant: its macro average in a quality report, its only length in a ttft report."""
    for row in half["rows"]:
        if row["variant"] == variant and row.get("task", MACRO) == MACRO:
            return row
    raise RunError(f"the {half['stage']} run of a point must have variant {variant!r}, got none")


def _where(*halves: dict) -> dict:
    commits = dict.fromkeys(machine["commit"] for half in halves for machine in half["machines"])
    return {"how": "measured", "machine": "; ".join(machine_lines(*halves)), "commit": ", ".join(commits)}


def _hardware(ttft: dict) -> dict:
    return {name: ttft["machines"][0].get(name) for name in ("processor", "card", "threads", "dense_attention")}


def _scored(quality: dict, variant: str) -> dict:
    """The part of a Row that a quality report has: the macro score of a variant."""
    row = _row(quality, variant)
    kept = {name: row[name] for name in ("variant", "label", "evidence", "k", "block", "score")}
    kept["forced"] = None
    if quality.get("forced") is not None:
        forced = _row({**quality, "rows": quality["forced"]["rows"]}, variant)
        kept["forced"] = {name: forced[name] for name in ("right", "change", "kl")}
    return kept


def _point(quality: dict, ttft: dict) -> Row:
    scored = _scored(quality, timed_variant(budget_in(quality["config"]).block))
    timed = _row(ttft, scored["variant"])
    if scored["evidence"] != timed["evidence"]:
        raise RunError(f"a point must have one evidence type, got {scored['evidence']} and {timed['evidence']}")
    gaps = {gap["gap"]: gap["change"] for gap in quality["gaps"] if gap["task"] == MACRO and gap["gap"] in GAPS}
    times = {"ttft_s": timed["ttft_s"], "dense_ttft_s": _row(ttft, "dense")["ttft_s"], "speed_up": timed["speed_up"]}
    return Row(**scored, **times, gaps=gaps, **_where(quality, ttft))
