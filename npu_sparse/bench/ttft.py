"""How long until the first token, dense against sparse, and where the time goes: `npu-sparse ttft`.

TTFT (s) runs from a prompt's token ids on the host to the id of the first token on the host, selection included, batch
1. All variants run interleaved in one process, every round in a new (seeded) order. Stages and dense attention are
timed in separate runs, because their clocks wait for the device.

A run directory holds config.json, records/<length>.json (one finished length each, not measured again), report.json,
report.md and report.png.
"""

import gc
import json
import os
import random
import time
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .. import report
from ..budget import Budget
from ..ops import workspace
from ..ops.dispatch import IMPLEMENTATIONS
from ..report import RunError
from . import stats
from .timing import (
    StageTimer,
    amdahl_ceiling,
    dense_attention_timed,
    peak_memory_bytes,
    reset_peak_memory,
    synchronize,
)
from .variants import (
    Subject,
    adapter_fingerprint,
    attachable,
    budget_of,
    budget_words,
    check_budgets,
    check_context,
    check_names,
    evidence_of,
    load_subject,
    needs_indexer,
    selector_of,
    tail_note,
    variant_named,
    with_tokenizer,
)

STAGES = ("projection", "scoring", "top-k", "attention", "rest")
ATTACHED = "attached"
PROMPTS = ("text", "random")


@dataclass(frozen=True)
class TtftConfig:
    """What one timing run compares, and on what.

    Attributes:
        model: hub id, directory, GGUF file or demo name.
        adapter: directory of the indexer; None = an untrained one (evidence: untrained, runtime only).
        lengths: prompt lengths in tokens.
        k, block, reduce, sink, recent, share_layers, candidates, key_block, tail: the Budget of all sparse variants; per-query
            variants run at block 1, and only indexers have candidates.
        variants: names of `VARIANTS`; "dense" must be among them. Options after a name change its Budget:
            indexer-shared+candidates=2048+key_block=32, indexer-shared+share_layers=2.
        runs: timed rounds; warmup: rounds before them; stage_runs: rounds with stage clocks, after them.
        prompt: "text" (real text from `texts`) or "random" (uniform token ids).
        texts: sources of the text, see `tasks.texts.documents`.
        overhead: also times "attached": the indexer attached, but `dense_below` above the length, so that dense runs.
        seed: of prompts, order and bootstrap.
        dtype: of weights and activations.
        device: "cpu", "cuda", "cuda:1", "npu", ...; its index is not part of the run's identity.
        impl: which operators run: "auto", "reference" or "kernel".
        workspace_mib: MiB of a slice of scores, as in `SparsePrefill.attach`: smaller where memory is short.
    """

    model: str
    adapter: str | None = None
    lengths: tuple[int, ...] = (4096,)
    k: int = 512
    block: int = 64
    reduce: str = "max"
    sink: int = 0
    recent: int = 0
    share_layers: int = 1
    tail: bool = False
    candidates: int = 0
    key_block: int = 64
    variants: tuple[str, ...] = ("dense", "indexer", "indexer-shared")
    runs: int = 10
    warmup: int = 2
    stage_runs: int = 3
    prompt: str = "text"
    texts: tuple[str, ...] = ("builtin",)
    overhead: bool = False
    seed: int = 0
    dtype: str = "bfloat16"
    device: str = "cpu"
    impl: str = "auto"
    workspace_mib: int = workspace.DEFAULT_MIB

    def __post_init__(self):
        for name in ("variants", "texts"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(map(str, value)))
        lengths = (self.lengths,) if isinstance(self.lengths, int) else tuple(self.lengths)
        object.__setattr__(self, "lengths", lengths)
        if not lengths or len(set(lengths)) != len(lengths):
            raise ValueError(f"lengths must name at least one length and none twice, got {lengths}")
        check_names(self.variants)
        if "dense" not in self.variants:
            raise ValueError(
                f"variants must include 'dense', which speed-ups are measured against, got {self.variants}"
            )
        whole = {"runs": self.runs, "stage_runs": self.stage_runs, **{f"length {n}": n for n in lengths}}
        for name, value in whole.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name.split()[0]} must be a positive integer, got {value!r}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be >= 0, got {self.warmup}")
        if self.prompt not in PROMPTS:
            raise ValueError(f"prompt must be one of {', '.join(PROMPTS)}, got {self.prompt!r}")
        if self.impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {self.impl!r}")
        workspace.check(self.workspace_mib)
        check_budgets(self.variants, min(lengths), self.budget)

    @property
    def budget(self) -> Budget:
        """The Budget of the variants that share supports."""
        names = ("k", "block", "reduce", "sink", "recent", "share_layers", "candidates", "key_block", "tail")
        return Budget(**{name: getattr(self, name) for name in names})

    def to_dict(self) -> dict:
        """Plain JSON types; `from_dict` reads them back."""
        return json.loads(json.dumps(asdict(replace(self, device=self.device.partition(":")[0]))))

    @classmethod
    def from_dict(cls, data: Mapping) -> "TtftConfig":
        """The TtftConfig that `to_dict` wrote; unknown fields are refused."""
        if unknown := set(data) - set(cls.__dataclass_fields__):
            raise ValueError(f"a ttft config must have known fields only, got {', '.join(sorted(unknown))}")
        return cls(**data)


def run_ttft(config: TtftConfig, output, *, model=None, tokenizer=None, indexer=None) -> dict:
    """The report of a timing run. Lengths that have a record already are not measured again.

    Args:
        output: run directory; an earlier run of the same config is resumed, any other refused (RunError).
        model, tokenizer, indexer: used in place of loading `config.model` and `config.adapter`.

    Raises before anything is measured: ValueError (config, lengths), AdapterError, CheckpointError,
    KernelUnavailableError.
    """
    directory = report.open_run(output, {"stage": "ttft", **config.to_dict()})
    todo = [length for length in config.lengths if not _record_path(directory, length).exists()]
    if todo:
        subject = _subject(config, model, tokenizer, indexer)
        check_context(subject.model, max(todo))
        attachable(subject, config.variants, config.budget, config.impl)
        prompts = {length: prompt_ids(config, subject, length) for length in todo}
        for length in todo:
            record = _measure(config, subject, length, prompts[length])
            _record_path(directory, length).parent.mkdir(exist_ok=True)
            report.write_json(_record_path(directory, length), record)
    return report_ttft(directory)


def report_ttft(output) -> dict:
    """The report of a directory whose lengths are all measured, written to report.json, report.md and report.png."""
    directory = Path(output)
    found = _read_json(directory / "config.json")
    if found.pop("stage", None) != "ttft":
        raise RunError(f"{directory} must be the directory of a ttft run")
    config = TtftConfig.from_dict(found)
    records = [_read_json(_record_path(directory, length)) for length in config.lengths]
    for name in ("base", "adapter"):
        if any(record[name] != records[0][name] for record in records):
            raise RunError(
                f"all lengths of {directory} must have been measured with the same {name}: use another directory"
            )
    result = _tabulate(config, records)
    report.write_json(directory / "report.json", result)
    report.write_text(directory / "report.md", _markdown(result))
    report.write_figure(directory / "report.png", _figure(result))
    return result


def prompt_ids(config: TtftConfig, subject: Subject, length: int):
    """The prompt of a length: int64 `[1, length]` on the host, the same for all variants."""
    import torch

    if config.prompt == "random":
        vocabulary = subject.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(config.seed)
        return torch.randint(vocabulary, (1, length), generator=generator)
    from ..tasks import texts

    documents = texts.documents(config.texts)
    start = random.Random(config.seed).randrange(len(documents))
    ids: list[int] = []
    for document in documents[start:] + documents[:start]:
        ids += subject.tokenizer(document.text, add_special_tokens=not ids, verbose=False)["input_ids"]
        if len(ids) >= length:
            return torch.tensor([ids[:length]])
    raise ValueError(f"texts must hold {length} tokens for a prompt of that length, got {len(ids)}")


def time_to_first_token(model, ids, chunk: int = 0) -> tuple[float, int]:
    """`(seconds, first token id)` of one greedy prefill of token ids `[1, T]` on the host, `chunk` tokens at a time (0 = all)."""
    import torch
    from transformers import DynamicCache

    with torch.inference_mode():
        synchronize(model.device)
        started = time.perf_counter()
        prompt, cache = ids.to(model.device), DynamicCache(config=model.config)
        for part in prompt.split(chunk or ids.shape[1], 1):
            logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = int(logits[0, -1].argmax())  # waits for the device
        return time.perf_counter() - started, token


def _subject(config: TtftConfig, model, tokenizer, indexer) -> Subject:
    subject = load_subject(config, config.variants, model, tokenizer, indexer)
    if config.prompt == "text":
        subject = with_tokenizer(subject, config)
    if subject.indexer is None and (needs_indexer(config.variants) or config.overhead):
        from ..indexer import Indexer

        subject = replace(subject, indexer=Indexer.for_model(subject.model, seed=config.seed))
    return subject


@contextmanager
def _prefill(config: TtftConfig, subject: Subject, name: str, length: int, stage=None):
    """The model with one variant attached, or its attention timed where dense has a `stage`."""
    from ..prefill import SparsePrefill

    options = dict(impl=config.impl, stage=stage, workspace_mib=config.workspace_mib)
    if name == ATTACHED:
        budget = config.budget.replace(dense_below=length + 1)
        prefill = SparsePrefill.attach(subject.model, subject.indexer, budget, **options)
    elif (budget := budget_of(name, config.budget)) is not None:
        selector = selector_of(name, subject.indexer, config.seed)
        prefill = SparsePrefill.attach(subject.model, selector, budget, **options)
    else:
        prefill = nullcontext() if stage is None else dense_attention_timed(subject.model, stage)
    with prefill:
        yield


def _measure(config: TtftConfig, subject: Subject, length: int, ids) -> dict:
    import torch

    from ..models.architectures import text_config

    device = subject.model.device
    load_average = list(os.getloadavg())
    names = [*config.variants, *((ATTACHED,) if config.overhead else ())]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, list[int | None]] = {name: [] for name in names}
    tokens: dict[str, int] = {}
    orders = []
    shuffled = random.Random(config.seed)
    for round_ in range(-config.warmup, config.runs):
        order = shuffled.sample(names, len(names))
        gc.collect()
        for name in order:
            with _prefill(config, subject, name, length):
                reset_peak_memory(device)
                elapsed, tokens[name] = time_to_first_token(subject.model, ids)
                peak = peak_memory_bytes(device)
            if round_ >= 0:
                seconds[name].append(elapsed)
                peaks[name].append(peak)
        if round_ >= 0:
            orders.append(order)
    stages: dict[str, list[dict]] = {name: [] for name in config.variants}
    for _ in range(config.stage_runs):
        for name in shuffled.sample(config.variants, len(config.variants)):
            timer = StageTimer(device)
            with _prefill(config, subject, name, length, timer):
                total, _ = time_to_first_token(subject.model, ids)
            stages[name].append({"total": total, **timer.seconds})
    report.say(
        f"{length} tokens: " + ", ".join(f"{name} {stats.summary(seconds[name])['median']:.3g} s" for name in names)
    )
    return {
        "length": length,
        "base": subject.base(),
        "adapter": None if subject.indexer is None else adapter_fingerprint(subject.indexer),
        "evidence": {name: _evidence(name, subject) for name in names},
        "machine": report.machine(str(device)),
        "setting": {
            "device": str(device),
            "dtype": str(subject.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "load_average": load_average,
            "dense_attention": text_config(subject.model)._attn_implementation,
        },
        "orders": orders,
        "seconds": seconds,
        "peak_bytes": peaks,
        "first_tokens": tokens,
        "stages": stages,
    }


def _evidence(name: str, subject: Subject) -> str:
    return "dense" if name == ATTACHED else evidence_of(name, subject.indexer)


def _tabulate(config: TtftConfig, records: list[dict]) -> dict:
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


def _record_path(directory: Path, length: int) -> Path:
    return directory / "records" / f"{length}.json"


def _read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}): run ttft again") from error


def _markdown(result: dict) -> str:
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
        f"intervals.{tail_note(config)}{budget_words(config)}\n\n"
        "## Time to first token\n\n"
        + report.markdown_table(table, {
            **names, "median": "TTFT median (s)", "quartiles": "quartiles (s)", "p95": "p95 (s)",
            "speed_up": "speed-up",
            "peak": "peak memory (MiB)",
        })  # fmt: skip
        + "\n## Where the time goes\n\nMean seconds per stage, measured in separate runs whose clocks wait for the "
        "device; a dense row's attention is that of its full-attention layers.\n\n"
        + report.markdown_table(stage_table, {**names, **{n: f"{n} (s)" for n in (*STAGES, "total")}})
        + "\n## How much could sparsity gain at most?\n\n"
        "TTFT / (TTFT - dense attention), both from the runs with clocks.\n\n"
        + report.markdown_table(ceilings, {
            "length": "tokens", "attention_s": "dense attention (s)", "total_s": "total (s)",
            "attention_share": "share (%)", "ceiling": "largest possible speed-up",
        })
    )  # fmt: skip
    if any(row["evidence"] == "untrained" for row in result["rows"]):
        text += "\nThe indexer is untrained: these are figures of the runtime and say nothing about quality.\n"
    for entry in result["machines"]:
        text += (
            f"\n{entry['length']} tokens: measured on {report.machine_line(entry)}; {entry['device']}, "
            f"{entry['dtype']}, {entry['threads']} threads, load average {entry['load_average'][0]:.2f} at the start.\n"
        )
    line = {"config": config, "base": result["base"], "adapter": result["adapter"], "machine": first}
    return text + f"\n```json\n{json.dumps(line)}\n```\n"


COLOURS = {
    "dense": "#222222", ATTACHED: "#8a8a8a", "oracle": "#56b4e9", "oracle-shared": "#0072b2", "indexer": "#e69f00",
    "indexer-shared": "#d55e00", "local": "#009e73", "random": "#cc79a7",
}  # fmt: skip
LINES = {False: "-", True: "--"}  # with options of its own
STAGE_COLOURS = dict(zip(STAGES, ("#f0e442", "#e69f00", "#d55e00", "#0072b2", "#cccccc")))


def _figure(result: dict):
    from matplotlib.ticker import LogLocator

    config = result["config"]
    names = list(dict.fromkeys(row["variant"] for row in result["rows"]))
    staged = [row for row in result["rows"] if row["stages_s"] is not None]
    figure, axes = report.new_figure(columns=2, width=6.0, height=max(3.8, 1.5 + 0.32 * len(staged)))
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
            linewidth=1.2, color=COLOURS[name.partition("+")[0]], linestyle=LINES["+" in name],
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
    figure.suptitle(
        f"{Path(config['model']).name}, batch 1, {first['dtype']}, k = {config['k']}, b_sel = {config['block']}, "
        f"{config['runs']} interleaved rounds\nmeasured: {report.machine_line(first)}, {first['threads']} threads",
        fontsize=8, x=0.01, ha="left",
    )  # fmt: skip
    return figure
