"""Quality of dense and sparse prefill on the same prompts, and the three gaps between them: `npu-sparse eval`.

A run directory holds
    config.json                     the EvalConfig
    prompts/<task>.json             the examples, the same for every variant
    records/<task>-<variant>.json   one finished cell: the score and output of every prompt
    report.json report.md report.png
A cell is finished when its record is there, and is not computed again. Cells may be computed by several processes
(`shard`), one per GPU, into one directory.

Generation is greedy, in left-padded batches; the prefill runs as the variant says and decoding is dense. Where queries
share a support, the blocks of a padded row begin at its padding: batches are the same for all variants, and `batch` is
in the config.
"""

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from .. import report
from ..budget import Budget
from ..ops import workspace
from ..ops.dispatch import IMPLEMENTATIONS
from ..report import RunError
from ..tasks import TASKS, Example, encode, generate, score, task_names, texts
from ..tasks.catalogue import task_named
from . import stats
from .variants import (
    VARIANTS,
    Subject,
    adapter_fingerprint,
    attachable,
    budget_of,
    budget_words,
    check_budgets,
    check_context,
    check_names,
    evidence_of,
    in_order,
    load_subject,
    needs_indexer,
    selector_of,
    tail_note,
    variant_named,
    with_tokenizer,
)

GAPS = {
    "oracle gap": ("dense", "oracle"),
    "indexer gap": ("oracle", "indexer"),
    "realization gap": ("indexer", "indexer-shared"),
}
TOTAL = {"total": ("dense", "indexer-shared")}
MACRO = "macro average"


@dataclass(frozen=True)
class EvalConfig:
    """What one quality run compares, and on what.

    Attributes:
        model: hub id, directory, GGUF file or demo name.
        adapter: directory of the indexer, or None.
        tasks: RULER tasks; those that need a question file need it in `qa_files`.
        length: tokens of prompt and answer together.
        count: prompts per task.
        seed: of prompts and bootstrap.
        k, block, reduce, sink, recent, share_layers, candidates, key_block, tail: the Budget of all sparse variants; per-query
            variants run at block 1, and only indexers have candidates.
        variants: names of `VARIANTS`; "dense" must be among them. Options after a name change its Budget:
            indexer-shared+candidates=2048+key_block=32, indexer-shared+share_layers=2.
        batch: prompts generated together.
        max_new_tokens: for all tasks in place of RULER's, or None.
        chat: whether questions go through the tokenizer's chat template.
        texts: sources of the haystacks, see `tasks.texts.documents`.
        qa_files: `{"qa_1": path, "qa_2": path}`.
        min_dense_score: in [0, 1]; a task that dense attention solves less well is listed, but not in the macro
            average.
        only_solved: sparse variants skip the tasks that are not in the macro average.
        dtype: of weights and activations.
        device: "cpu", "cuda", "cuda:1", "npu", ...; its index is not part of the run's identity.
        impl: which operators run: "reference", "kernel" or "auto".
        workspace_mib: MiB of a slice of scores, as in `SparsePrefill.attach`: smaller where memory is short.
    """

    model: str
    adapter: str | None = None
    tasks: tuple[str, ...] = task_names("qa_file")
    length: int = 4096
    count: int = 50
    seed: int = 0
    k: int = 512
    block: int = 64
    reduce: str = "max"
    sink: int = 0
    recent: int = 0
    share_layers: int = 1
    tail: bool = False
    candidates: int = 0
    key_block: int = 64
    variants: tuple[str, ...] = ("dense", "oracle", "oracle-shared", "indexer", "indexer-shared", "local")
    batch: int = 10
    max_new_tokens: int | None = None
    chat: bool = False
    texts: tuple[str, ...] = ("builtin",)
    qa_files: Mapping[str, str] = field(default_factory=dict)
    min_dense_score: float = 0.5
    only_solved: bool = False
    dtype: str = "bfloat16"
    device: str = "cpu"
    impl: str = "reference"
    workspace_mib: int = workspace.DEFAULT_MIB

    def __post_init__(self):
        for name in ("tasks", "variants", "texts"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(map(str, value)))
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks must name at least one task and none twice, got {', '.join(self.tasks) or 'none'}")
        for task in self.tasks:
            if task_named(task).needs == "qa_file" and task not in self.qa_files:
                raise ValueError(f"{task} needs a question file: set qa_files[{task!r}] to its path")
        check_names(self.variants)
        if "dense" not in self.variants:
            raise ValueError(
                f"variants must include 'dense', which the others are measured against, got {self.variants}"
            )
        for name in ("length", "count", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.max_new_tokens is not None and not 1 <= self.max_new_tokens < self.length:
            raise ValueError(f"max_new_tokens must lie in [1, length), got {self.max_new_tokens}")
        if not 0 <= self.min_dense_score <= 1:
            raise ValueError(f"min_dense_score must lie in [0, 1], got {self.min_dense_score}")
        if self.impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {self.impl!r}")
        workspace.check(self.workspace_mib)
        check_budgets(self.variants, self.length, self.budget)

    @property
    def budget(self) -> Budget:
        """The Budget of the variants that share supports."""
        names = ("k", "block", "reduce", "sink", "recent", "share_layers", "candidates", "key_block", "tail")
        return Budget(**{name: getattr(self, name) for name in names})

    def to_dict(self) -> dict:
        """Plain JSON types; `from_dict` reads them back."""
        out = asdict(replace(self, device=self.device.partition(":")[0]))
        return json.loads(json.dumps(out))

    @classmethod
    def from_dict(cls, data: Mapping) -> "EvalConfig":
        """The EvalConfig that `to_dict` wrote; unknown fields are refused."""
        if unknown := set(data) - set(cls.__dataclass_fields__):
            raise ValueError(f"an eval config must have known fields only, got {', '.join(sorted(unknown))}")
        return cls(**data)


@dataclass(frozen=True)
class Prompts:
    """The examples of one task, their token ids, and a digest of both."""

    examples: tuple[Example, ...]
    ids: tuple[tuple[int, ...], ...]
    digest: str


def run_eval(
    config: EvalConfig, output, *, model=None, tokenizer=None, indexer=None, shard: tuple[int, int] = (0, 1)
) -> dict:
    """The report of a finished run, or `{"complete": False, "missing": [...]}` while other shards have cells to finish.

    Computes the cells that have no record yet and belong to this shard, then writes the report if all are there.

    Args:
        output: run directory; an earlier run of the same config is resumed, any other refused (RunError).
        model, tokenizer, indexer: used in place of loading `config.model` and `config.adapter`.
        shard: `(i, n)`: this process computes cells i, i + n, i + 2n, ... in the order dense first, then variant by
            variant.

    Raises before anything is computed: ValueError (config, lengths), AdapterError, CheckpointError,
    KernelUnavailableError.
    """
    part, parts = shard
    if not 0 <= part < parts:
        raise ValueError(f"shard must be (i, n) with 0 <= i < n, got {shard}")
    if needs_indexer(config.variants) and config.adapter is None and indexer is None:
        raise ValueError("adapter must name an indexer's directory for variants that select by an indexer, got none")
    directory = report.open_run(output, {"stage": "eval", **config.to_dict()})
    mine = [cell for cell in _cells(config)[part::parts] if _missing(config, directory, cell)]
    if mine:
        _compute(config, directory, mine, model, tokenizer, indexer)
    missing = [cell for cell in _cells(config) if _missing(config, directory, cell)]
    if missing:
        return {"complete": False, "missing": [list(cell) for cell in missing]}
    return report_eval(directory)


def prepare_prompts(config: EvalConfig, output, *, tokenizer=None) -> Path:
    """Writes the prompts of every task into a run directory and returns it; needs the tokenizer only.

    For a machine that has the texts, when the models run on another that has not.
    """
    directory = report.open_run(output, {"stage": "eval", **config.to_dict()})
    if tokenizer is None:
        from ..checkpoints import load_tokenizer

        tokenizer = load_tokenizer(config.model)
    for task in config.tasks:
        _prompts(config, directory, task, tokenizer)
    return directory


def report_eval(output) -> dict:
    """The report of a directory whose cells are all there, written to report.json, report.md and report.png.

    Raises RunError where cells are missing or were not made from one model, one adapter and the same prompts.
    """
    directory = Path(output)
    config = _read_config(directory)
    cells = _cells(config)
    if missing := [cell for cell in cells if _missing(config, directory, cell)]:
        raise RunError(
            f"{directory} must hold all cells, got none for {missing[0][0]} / {missing[0][1]}: run eval again"
        )
    records = {cell: _read(directory, cell) for cell in cells if _record_path(directory, cell).exists()}
    _check_agree(config, list(records.values()))
    result = _tabulate(config, records)
    report.write_json(directory / "report.json", result)
    report.write_text(directory / "report.md", _markdown(result))
    report.write_figure(directory / "report.png", _figure(result))
    return result


def adopt_records(config: EvalConfig, output, earlier: list[Path]) -> list[tuple[str, str]]:
    """Copies cells from earlier runs where they are the same cell: same variant at the same budget. Returns those
    copied.

    The earlier runs must differ from `config` in k, block, tail and variants only.
    """
    directory = report.open_run(output, {"stage": "eval", **config.to_dict()})
    copied = []
    for other in map(Path, earlier):
        theirs = _read_config(other)
        ours = replace(config, k=theirs.k, block=theirs.block, tail=theirs.tail, variants=theirs.variants)
        if ours.to_dict() != theirs.to_dict():
            raise RunError(f"{other} must differ from {directory} in k, block, tail and variants only")
        for task in config.tasks:
            source = _prompts_path(other, task)
            if source.exists() and not _prompts_path(directory, task).exists():
                _prompts_path(directory, task).parent.mkdir(exist_ok=True)
                report.write_bytes(_prompts_path(directory, task), source.read_bytes())
        for cell in _cells(config):
            if _record_path(directory, cell).exists() or not _record_path(other, cell).exists():
                continue
            record = _read(other, cell)
            if record["budget"] == _budget_dict(config, cell[1]):
                _write_record(directory, record)
                copied.append(cell)
    return copied


def _cells(config: EvalConfig) -> list[tuple[str, str]]:
    """All (task, variant), dense first, so that what dense attention does not solve can be skipped."""
    names = ["dense", *(name for name in config.variants if name != "dense")]
    return [(task, name) for name in names for task in config.tasks]


def _missing(config: EvalConfig, directory: Path, cell: tuple[str, str]) -> bool:
    return not _record_path(directory, cell).exists() and not _skipped(config, directory, cell)


def _skipped(config: EvalConfig, directory: Path, cell: tuple[str, str]) -> bool:
    dense = (cell[0], "dense")
    if not config.only_solved or cell == dense or not _record_path(directory, dense).exists():
        return False
    return _mean_score(_read(directory, dense)) < config.min_dense_score


def _compute(config, directory, cells, model, tokenizer, indexer) -> None:
    names = [name for name in config.variants if any(cell[1] == name for cell in cells)]
    subject = with_tokenizer(load_subject(config, names, model, tokenizer, indexer), config)
    check_context(subject.model, config.length)
    attachable(subject, names, config.budget, config.impl)
    prompts = {task: _prompts(config, directory, task, subject.tokenizer) for task in {cell[0]: None for cell in cells}}
    common = {
        "base": subject.base(),
        "adapter": None if subject.indexer is None else adapter_fingerprint(subject.indexer),
        "machine": report.machine(str(subject.model.device)),
    }
    existing = [_read(directory, cell) for cell in _cells(config) if _record_path(directory, cell).exists()]
    _check_agree(config, [*existing, *({**common, "prompts": p.digest, "task": task} for task, p in prompts.items())])

    # Whether a task is solved may be for another shard to say: such cells wait until this shard's others are done.
    order = [*cells, *cells] if config.only_solved else cells
    for place, cell in enumerate(order):
        task, name = cell
        dense = (task, "dense")
        if not _missing(config, directory, cell):
            continue
        if config.only_solved and name != "dense" and not _record_path(directory, dense).exists():
            if place < len(cells):
                continue
            _compute_cell(config, directory, dense, subject, prompts[task], common)
            if _skipped(config, directory, cell):
                continue
        _compute_cell(config, directory, cell, subject, prompts[task], common)


def _compute_cell(config, directory, cell, subject: Subject, prompts: Prompts, common: dict) -> None:
    task, name = cell
    budget = budget_of(name, config.budget)
    if budget is None:
        prefill = nullcontext()
    else:
        from ..prefill import SparsePrefill

        selector = selector_of(name, subject.indexer, config.seed)
        prefill = SparsePrefill.attach(
            subject.model, selector, budget, impl=config.impl, workspace_mib=config.workspace_mib
        )
    started = time.perf_counter()
    with prefill:
        outputs = generate_texts(subject.model, subject.tokenizer, prompts.examples, prompts.ids, config.batch)
    record = {
        "task": task,
        "variant": name,
        "evidence": evidence_of(name, subject.indexer),
        "budget": _budget_dict(config, name),
        "prompts": prompts.digest,
        **common,
        "adapter": common["adapter"] if needs_indexer([name]) else None,
        "seconds": round(time.perf_counter() - started, 3),
        "samples": [
            {"index": example.index, "length": example.length, "score": score(example, output), "output": output}
            for example, output in zip(prompts.examples, outputs)
        ],
    }
    _write_record(directory, record)
    report.say(f"{task} / {name}: {100 * _mean_score(record):.1f} ({record['seconds']:.1f} s)")


def generate_texts(model, tokenizer, examples, ids, batch: int) -> list[str]:
    """The greedy output of every example, in their order, from batches of prompts of similar length, padded on the
    left.

    A row stops at its end-of-sequence token, at `max_new_tokens`, or as soon as its score is 1: scores look for answers
    anywhere in the output and more output never lowers them, so that stopping there changes no score.
    """
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, *ends) if i is not None), 0)
    outputs: dict[int, str] = {}
    order = sorted(range(len(ids)), key=lambda n: (len(ids[n]), n))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        width = max(len(ids[n]) for n in rows)
        tokens = torch.tensor([[pad] * (width - len(ids[n])) + list(ids[n]) for n in rows])  # [B, width]
        mask = torch.tensor([[0] * (width - len(ids[n])) + [1] * len(ids[n]) for n in rows])
        reading = _reading(tokenizer, [examples[n] for n in rows], width, ends)
        greedy = GenerationConfig(
            max_new_tokens=max(examples[n].max_new_tokens for n in rows), do_sample=False, num_beams=1, use_cache=True,
            repetition_penalty=1.0, eos_token_id=ends or None, pad_token_id=pad, disable_compile=True,
        )  # fmt: skip
        with torch.inference_mode():
            model.generate(
                input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), generation_config=greedy,
                stopping_criteria=StoppingCriteriaList([reading]),
            )  # fmt: skip
        outputs.update(zip(rows, reading.texts))
    return [outputs[n] for n in range(len(ids))]


def _reading(tokenizer, examples, prompt_tokens: int, ends: list[int]):
    """A stopping criterion that reads each row's output as it grows, in `texts`, and stops the rows whose score is
    1."""
    import torch
    from transformers import StoppingCriteria

    class Reading(StoppingCriteria):
        def __init__(self):
            self.texts = [""] * len(examples)
            self.done = [False] * len(examples)

        def __call__(self, input_ids, scores, **kwargs):
            for row, tokens in enumerate(input_ids[:, prompt_tokens:].tolist()):
                if self.done[row]:
                    continue
                if ended := tokens[-1] in ends:
                    tokens = tokens[:-1]
                self.texts[row] = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                full = score(examples[row], self.texts[row]) == 1 or len(tokens) >= examples[row].max_new_tokens
                self.done[row] = ended or full
            return torch.tensor(self.done, device=input_ids.device)

    return Reading()


def _prompts(config: EvalConfig, directory: Path, task: str, tokenizer) -> Prompts:
    """The prompts of one task, read from the run directory or generated and written there."""
    path = _prompts_path(directory, task)
    if path.exists():
        examples = [Example(**{**entry, "answers": tuple(entry["answers"])}) for entry in _read_json(path)]
    else:
        known = task_named(task)
        examples = generate(
            task, tokenizer, length=config.length, count=config.count, seed=config.seed, chat=config.chat,
            haystack=texts.documents(config.texts) if known.needs == "haystack" else None,
            qa_file=config.qa_files.get(task), max_new_tokens=config.max_new_tokens,
        )  # fmt: skip
        path.parent.mkdir(exist_ok=True)
        report.write_json(path, [asdict(example) for example in examples])
    if len(examples) != config.count:
        raise RunError(f"{path} must hold {config.count} examples, got {len(examples)}: delete it to make it again")
    ids = tuple(tuple(encode(tokenizer, example)) for example in examples)
    for example, tokens in zip(examples, ids):
        if len(tokens) != example.length:
            raise RunError(f"{path} was made with another tokenizer: example {example.index} must have "
                           f"{example.length} tokens, got {len(tokens)}")  # fmt: skip
    content = json.dumps([[asdict(example) for example in examples], ids])
    return Prompts(tuple(examples), ids, hashlib.sha256(content.encode()).hexdigest()[:16])


def _prompts_path(directory: Path, task: str) -> Path:
    return directory / "prompts" / f"{task}.json"


def _record_path(directory: Path, cell: tuple[str, str]) -> Path:
    return directory / "records" / f"{cell[0]}-{cell[1]}.json"


def _write_record(directory: Path, record: dict) -> None:
    path = _record_path(directory, (record["task"], record["variant"]))
    path.parent.mkdir(exist_ok=True)
    report.write_json(path, record)


def _read(directory: Path, cell: tuple[str, str]) -> dict:
    return _read_json(_record_path(directory, cell))


def _read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}): delete it to make it again") from error


def _read_config(directory: Path) -> EvalConfig:
    found = _read_json(directory / "config.json")
    if found.pop("stage", None) != "eval":
        raise RunError(f"{directory} must be the directory of an eval run")
    return EvalConfig.from_dict(found)


def _budget_dict(config: EvalConfig, name: str) -> dict | None:
    budget = budget_of(name, config.budget)
    return None if budget is None else budget.to_dict()


def _mean_score(record: dict) -> float:
    return sum(sample["score"] for sample in record["samples"]) / len(record["samples"])


def _check_agree(config: EvalConfig, records: list[dict]) -> None:
    """Raises RunError unless records are of one model and one adapter, and those of a task of the same prompts."""
    seen: dict[str, object] = {}
    for record in records:
        found = {"base model": record["base"], f"prompts of {record['task']}": record["prompts"]}
        if record["adapter"] is not None:
            found["adapter weights"] = record["adapter"]
        for name, value in found.items():
            if seen.setdefault(name, value) != value:
                raise RunError(
                    f"all cells must have the same {name}, got {seen[name]} and {value}: use another directory"
                )


def _scores(record: dict) -> list[float]:
    return [sample["score"] for sample in record["samples"]]


def _tabulate(config: EvalConfig, records: dict) -> dict:
    names = in_order(config.variants)
    dense = {task: _mean_score(records[task, "dense"]) for task in config.tasks}
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
            rows.append({
                "task": task, "variant": name, "label": variant_named(name).label, "evidence": evidence[0],
                "options": dict(variant_named(name).options), "k": budget and budget.k,
                "block": budget and budget.block, "prompts": config.count * len(tasks), "score": estimate.to_dict(),
            })  # fmt: skip

    def changes(before: str, after: str) -> list[dict]:
        """The paired difference of two variants on every task, and on those that dense attention solves."""
        found = []
        for task in (MACRO, *config.tasks):
            tasks = solved if task == MACRO else [task]
            if not tasks or any((task, name) not in records for task in tasks for name in (before, after)):
                continue
            first, second = ([_scores(records[task, name]) for task in tasks] for name in (before, after))
            estimate = stats.macro_difference(first, second, seed=config.seed)
            found.append({"from": before, "to": after, "task": task, "change": estimate.to_dict()})
        return found

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
            task: {"dense": dense[task], "solved": task in solved, "label": TASKS[task].label} for task in config.tasks
        },
        "rows": rows,
        "gaps": gaps,
        "options": options,
    }


def _distinct(machines: list[dict]) -> list[dict]:
    keys = Counter(json.dumps(machine, sort_keys=True) for machine in machines)
    return [json.loads(key) for key in sorted(keys)]


def machine_lines(*results: dict) -> list[str]:
    """`report.machine_line` of everything that reports were measured on, none twice."""
    return list(dict.fromkeys(report.machine_line(machine) for result in results for machine in result["machines"]))


def points(estimate: dict) -> str:
    """A score or a change as points of 100, with its interval."""
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _markdown(result: dict) -> str:
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
        if any(found["gap"] == gap for found in result["gaps"])
    }
    unsolved = "" if len(solved) == len(tasks) else (
        f"\\* Dense attention scores less than {100 * config['min_dense_score']:.0f} here: "
        "the task says nothing about sparsity and is not in the macro average.\n\n"
    )  # fmt: skip
    columns = {"label": "prefill", "evidence": "evidence", "k": "k", "block": "b_sel", **{t: heading[t] for t in shown}}
    text = (
        f"# How much quality does sparse prefill lose?\n\n{config['model']}, {config['length']} tokens, "
        f"{config['count']} prompts per task, greedy, {config['dtype']}; scores of 100 with 95% bootstrap intervals "
        f"over prompts, all variants on the same prompts.{tail_note(config)}{budget_words(config)}\n\n## Scores\n\n"
        f"{report.markdown_table(list(by_variant.values()), columns)}\n{unsolved}"
    )
    if gap_columns:
        text += (
            "## Gaps\n\nPaired differences on the same prompts, in points; negative = lost.\n\n"
            f"{report.markdown_table(list(by_task.values()), {'task': 'task', **gap_columns})}\n"
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
            f"{report.markdown_table(list(lines.values()), columns)}\n"
        )
    if any(row["evidence"] == "untrained" for row in result["rows"]):
        text += "The indexer is untrained: its scores say nothing about quality.\n\n"
    text += "".join(f"Measured on {line}.\n" for line in machine_lines(result))
    return (
        text
        + f"\n```json\n{json.dumps({'config': config, 'base': result['base'], 'adapter': result['adapter']})}\n```\n"
    )


EVIDENCE_COLOURS = {
    "dense": "#222222", "oracle": "#0072b2", "distilled": "#d55e00", "untrained": "#cc79a7", "control": "#8a8a8a",
}  # fmt: skip


def _figure(result: dict):
    tasks = result["tasks"]
    solved = [task for task in tasks if tasks[task]["solved"]]
    shown = [MACRO, *tasks] if solved else list(tasks)
    columns = {row["variant"]: row for row in result["rows"]}
    gaps = [gap for gap in (*GAPS, *TOTAL) if any(found["gap"] == gap for found in result["gaps"])]
    height = 1.8 + 0.17 * len(shown) * max(len(columns), len(gaps))
    figure, axes = report.new_figure(columns=2 if gaps else 1, width=6.0, height=height)

    def panel(ax, series, key, scale_label, question):
        place = {task: n for n, task in enumerate(shown)}
        for n, (name, style) in enumerate(series.items()):
            offset = (n - (len(series) - 1) / 2) * 0.8 / len(series)
            found = [entry for entry in key(name)]
            y = [place[entry["task"]] + offset for entry in found]
            values = [entry["score"] if "score" in entry else entry["change"] for entry in found]
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
            ax.axhline(edge - 0.5, color="#bbbbbb", linewidth=0.6)
        ax.grid(False, axis="y")
        ax.set_xlabel(scale_label)
        ax.set_title(question, fontsize=10, loc="left")
        ax.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.55 / height - 0.06), ncols=2)

    markers = dict(zip(VARIANTS, "DososXx"))
    with_options = [name for name in columns if "+" in name]
    markers.update(zip(with_options, itertools.cycle("^v<>Pph*")))
    styles = {
        name: {
            "label": row["label"] if name == "dense" else f"{row['label']} ({row['evidence']})",
            "marker": markers[name],
            "color": EVIDENCE_COLOURS[row["evidence"]], "markerfacecolor": "white" if variant_named(name).shared else None,
        }
        for name, row in columns.items()
    }  # fmt: skip
    panel(
        axes[0, 0], styles, lambda name: [row for row in result["rows"] if row["variant"] == name],
        "score (points of 100)", "What does each prefill score?",
    )  # fmt: skip
    if gaps:
        colours = dict(zip((*GAPS, *TOTAL), ("#0072b2", "#d55e00", "#009e73", "#222222")))
        label = {**GAPS, **TOTAL}
        panel(
            axes[0, 1],
            {gap: {"label": f"{gap}: {' → '.join(label[gap])}", "marker": "o", "color": colours[gap]} for gap in gaps},
            lambda gap: [found for found in result["gaps"] if found["gap"] == gap],
            "change of score (points; negative = lost)", "Where is quality lost?",
        )  # fmt: skip
        axes[0, 1].axvline(0, color="#222222", linewidth=0.8)
        axes[0, 1].tick_params(labelleft=False)
    config = result["config"]
    figure.suptitle(
        f"{Path(config['model']).name}, {config['length']} tokens, k = {config['k']}, b_sel = {config['block']}, "
        f"{config['count']} prompts per task, 95% intervals\n"
        + "\n".join(f"measured: {line}" for line in machine_lines(result)),
        fontsize=8, x=0.01, ha="left",
    )  # fmt: skip
    return figure
