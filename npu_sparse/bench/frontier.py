"""Which budgets are worth their quality? Score against TTFT at every k and b_sel, in one table: `npu-sparse frontier`.

A run directory holds config.json; quality/k<k>-b<block>/ and ttft/k<k>-b<block>/, which are runs of `quality` and
`ttft`; report.json, report.md and report.png. Cells that do not depend on what changes (dense; per-query variants at
the same k) are computed once and shared. Running again resumes.

At block 1 every query selects for itself, so that the indexer per query is what is timed; at larger blocks the shared
one is.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .. import report
from ..ops import workspace
from ..report import RunError
from .quality import EVIDENCE_COLOURS, GAPS, MACRO, EvalConfig, adopt_records, machine_lines, points, run_eval
from .stats import summary
from .ttft import TtftConfig, run_ttft
from .variants import VARIANTS, Subject, budget_words, load_subject, tail_note, with_tokenizer

RUNTIME = (
    "reduce", "sink", "recent", "share_layers", "candidates", "key_block", "tail", "seed", "dtype", "device", "impl"
)  # fmt: skip


@dataclass(frozen=True)
class FrontierConfig:
    """A grid of budgets on one model, task slice, length, indexer and runtime.

    Attributes:
        ks, blocks: the grid: every k with every block (b_sel).
        All others: as in EvalConfig and TtftConfig; tasks that dense attention does not solve are skipped.
    """

    model: str
    adapter: str | None = None
    length: int = 4096
    ks: tuple[int, ...] = (256, 512, 1024)
    blocks: tuple[int, ...] = (1, 64)
    tasks: tuple[str, ...] = EvalConfig.tasks
    count: int = 50
    seed: int = 0
    reduce: str = "max"
    sink: int = 0
    recent: int = 0
    share_layers: int = 1
    tail: bool = False
    candidates: int = 0
    key_block: int = 64
    batch: int = 10
    max_new_tokens: int | None = None
    chat: bool = False
    texts: tuple[str, ...] = ("builtin",)
    min_dense_score: float = 0.5
    runs: int = 10
    warmup: int = 2
    stage_runs: int = 3
    prompt: str = "text"
    dtype: str = "bfloat16"
    device: str = "cpu"
    impl: str = "auto"
    workspace_mib: int = workspace.DEFAULT_MIB

    def __post_init__(self):
        for name in ("ks", "blocks"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, int) else tuple(value)
            if not value or len(set(value)) != len(value):
                raise ValueError(f"{name} must name at least one value and none twice, got {value}")
            object.__setattr__(self, name, value)
        for name in ("tasks", "texts"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(map(str, value)))
        for k, block in self.points():
            self.quality_at(k, block)
            self.ttft_at(k, block)

    def points(self) -> list[tuple[int, int]]:
        """All (k, block) of the grid."""
        return [(k, block) for k in self.ks for block in self.blocks]

    def quality_at(self, k: int, block: int) -> EvalConfig:
        """The quality run of one point."""
        shared = ("oracle-shared", "indexer-shared") if block > 1 else ()
        return EvalConfig(
            k=k,
            block=block,
            variants=("dense", "oracle", "indexer", *shared),
            only_solved=True,
            **self._common(EvalConfig),
        )

    def ttft_at(self, k: int, block: int) -> TtftConfig:
        """The timing run of one point."""
        return TtftConfig(
            k=k,
            block=block,
            variants=("dense", timed_variant(block)),
            lengths=(self.length,),
            **self._common(TtftConfig),
        )

    def _common(self, of) -> dict:
        shared = set(self.__dataclass_fields__) & set(of.__dataclass_fields__)
        return {name: getattr(self, name) for name in shared}

    def to_dict(self) -> dict:
        """Plain JSON types; `from_dict` reads them back."""
        return json.loads(json.dumps(asdict(replace(self, device=self.device.partition(":")[0]))))

    @classmethod
    def from_dict(cls, data: Mapping) -> "FrontierConfig":
        """The FrontierConfig that `to_dict` wrote; unknown fields are refused."""
        if unknown := set(data) - set(cls.__dataclass_fields__):
            raise ValueError(f"a frontier config must have known fields only, got {', '.join(sorted(unknown))}")
        return cls(**data)


def timed_variant(block: int) -> str:
    """The variant whose quality and TTFT make a point at this block."""
    return "indexer-shared" if block > 1 else "indexer"


def run_frontier(config: FrontierConfig, output, *, model=None, tokenizer=None, indexer=None) -> dict:
    """The joined report of a grid; what is finished already is only read.

    Arguments and errors as in `run_eval` and `run_ttft`; ValueError where there is no indexer.
    """
    if config.adapter is None and indexer is None:
        raise ValueError("adapter must name an indexer's directory, got none")
    directory = report.open_run(output, {"stage": "frontier", **config.to_dict()})
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
    report.write_json(directory / "report.json", result)
    report.write_text(directory / "report.md", _markdown(result))
    report.write_figure(directory / "report.png", _figure(result))
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
    solved = [task for task, found in first["tasks"].items() if found["solved"]]
    if not solved:
        raise RunError("dense attention must solve at least one task for a frontier, got none: see the quality reports")
    timings = [ttft for _, ttft in pairs]
    dense_s = [seconds for ttft in timings for seconds in _row(ttft, "dense")["seconds"]]
    oracles = {quality["config"]["k"]: quality for quality, _ in pairs}
    return {
        "base": whole["model"],
        "adapter": whole["adapter"],
        "length": whole["length"],
        "tasks": solved,
        "unsolved": [task for task in first["tasks"] if task not in solved],
        "rows": [
            {**_scored(first, "dense"), "ttft_s": summary(dense_s), **_where(first, *timings)},
            *({**_scored(oracles[k], "oracle"), **_where(oracles[k])} for k in sorted(oracles)),
            *(_point(quality, ttft) for quality, ttft in pairs),
        ],
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
    return {**common, **{name: config[name] for name in RUNTIME}}


def _grid(half: dict) -> dict:
    return {name: half["config"][name] for name in ("k", "block")}


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
    """A row with the macro score of a variant and nothing timed."""
    row = _row(quality, variant)
    kept = {name: row[name] for name in ("variant", "label", "evidence", "k", "block", "score")}
    return {**kept, "ttft_s": None, "dense_ttft_s": None, "speed_up": None, "gaps": {}}


def _point(quality: dict, ttft: dict) -> dict:
    scored = _scored(quality, timed_variant(quality["config"]["block"]))
    timed = _row(ttft, scored["variant"])
    if scored["evidence"] != timed["evidence"]:
        raise RunError(f"a point must have one evidence type, got {scored['evidence']} and {timed['evidence']}")
    gaps = {gap["gap"]: gap["change"] for gap in quality["gaps"] if gap["task"] == MACRO and gap["gap"] in GAPS}
    times = {"ttft_s": timed["ttft_s"], "dense_ttft_s": _row(ttft, "dense")["ttft_s"], "speed_up": timed["speed_up"]}
    return {**scored, **times, "gaps": gaps, **_where(quality, ttft)}


def _markdown(result: dict) -> str:
    config = result["config"]
    lines = []
    for row in result["rows"]:
        ttft, dense, speed_up = row["ttft_s"], row["dense_ttft_s"], row["speed_up"]
        lines.append({
            **{name: row[name] for name in ("label", "evidence", "k", "block", "how")},
            "score": points(row["score"]),
            "ttft": ttft and f"{ttft['median']:.4g} ({ttft['q1']:.4g} - {ttft['q3']:.4g})",
            "dense": dense and dense["median"],
            "speed_up": speed_up and f"{speed_up['value']:.3f} [{speed_up['low']:.3f}, {speed_up['high']:.3f}]",
            **{gap: points(change) for gap, change in row["gaps"].items()},
        })  # fmt: skip
    label = {name: variant.label for name, variant in VARIANTS.items()}
    columns = {
        "label": "prefill", "evidence": "evidence", "k": "k", "block": "b_sel", "score": "score (of 100)",
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
        f"{tail_note(config)} "
        "Gaps: paired differences in points, negative = lost; at b_sel = 1 nothing is shared and there is no "
        "realization gap. Every point is timed interleaved with dense: speed-ups compare the two, whatever the machine "
        f"did since.{budget_words(config)}\n\n"
        f"{report.markdown_table(lines, columns)}\n"
    )
    if any(row["evidence"] == "untrained" for row in result["rows"]):
        text += "The indexer is untrained: its scores say nothing about quality.\n\n"
    text += "".join(f"Measured on {line}.\n" for line in machine_lines(result))
    line = {"config": config, "base": result["base"], "adapter": result["adapter"], "machine": result["machines"][0]}
    return text + f"\n```json\n{json.dumps(line)}\n```\n"


K_COLOURS = ("#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
BLOCK_MARKERS = "os^vPX*h"


def _figure(result: dict):
    config = result["config"]
    figure, axes = report.new_figure(width=7.6, height=4.6)
    ax = axes[0, 0]
    colour = {k: K_COLOURS[n % len(K_COLOURS)] for n, k in enumerate(sorted(config["ks"]))}
    marker = {block: BLOCK_MARKERS[n] for n, block in enumerate(sorted(config["blocks"]))}
    oracles = 0
    for row in result["rows"]:
        score = {name: 100 * value for name, value in row["score"].items()}
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
            color=EVIDENCE_COLOURS["dense"] if dense else colour[row["k"]],
            label="dense" if dense else f"k = {row['k']}, b_sel = {row['block']} ({row['evidence']})",
        )  # fmt: skip
    ax.set_xlim(left=0)
    ax.set_xlabel("TTFT (s): median and quartiles")
    ax.set_ylabel("macro score (points of 100), 95% interval")
    ax.set_title("Which budgets are worth their quality? Up and left is better.", fontsize=10, loc="left")
    ax.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(
        f"{Path(config['model']).name}, {result['length']} tokens, {config['dtype']}, {len(result['tasks'])} tasks x "
        f"{config['count']} prompts\n"
        + "\n".join(f"measured: {line}" for line in machine_lines(result)),
        fontsize=8, x=0.01, ha="left",
    )  # fmt: skip
    return figure
