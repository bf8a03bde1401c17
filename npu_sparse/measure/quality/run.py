"""Quality of dense and sparse prefill on the same prompts, and the three gaps between them: `npu-sparse eval`.

A run directory holds
    config.json                     the EvalConfig
    prompts/<task>.json             the examples, the same for every variant
    records/<task>-<variant>.json   one finished cell: scores and output of every prompt
    forced/<task>.safetensors       what dense attention makes of the reference answers, for all variants
    report.json report.md report.png forced.png
A cell is finished when its record is there, and is not computed again. Cells may be computed by several processes
(`shard`), one per GPU, into one directory.

Generation is greedy; the prefill runs as the variant says and decoding is dense. Dense prompts are generated in left-padded
batches, sparse ones by themselves: blocks of queries and of keys begin at the padding, so that a score would depend on what
else is in the batch. Teacher-forced answers go through one prompt at a time (`measure.teacher_forced`).
"""

import hashlib
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from ...budget import Budget
from ...runs import machine as machines
from ...runs.figures import write_figure
from ...runs.page import say
from ...runs.store import Cells, RunError, check_shard, open_stage, read_json, read_stage, write_bytes, write_json, write_text
from ...tasks import Example, encode, generate, score, texts
from ...tasks.catalogue import task_named
from .. import teacher_forced
from ..decode import generate_texts
from ..variants import (
    EVIDENCE,
    Subject,
    attachable,
    budget_of,
    check_context,
    evidence_of,
    load_subject,
    needs_indexer,
    selector_of,
    with_tokenizer,
)
from .config import EvalConfig
from .page import figure, forced_figure, is_solved, markdown, mean_score, tabulate

SPARSE_BATCH = 1  # prompts of sparse prefills that are generated together
EXAMPLE = {
    "task": str, "index": int, "prompt": str, "answers": [str], "length": int, "max_new_tokens": int, "seed": int,
    "comparable": bool,
}  # fmt: skip


@dataclass(frozen=True)
class Prompts:
    """The examples of one task, their token ids, a digest of both, and the answers to force (none where nobody asks)."""

    examples: tuple[Example, ...]
    ids: tuple[tuple[int, ...], ...]
    digest: str
    asked: tuple[teacher_forced.Forced, ...] = ()


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
    check_shard(shard)
    if needs_indexer(config.variants) and config.adapter is None and indexer is None:
        raise ValueError("adapter must name an indexer's directory for variants that select by an indexer, got none")
    directory = open_stage(output, "eval", config)
    mine = [cell for cell in _cells(config)[shard[0] :: shard[1]] if _missing(config, directory, cell)]
    if mine:
        _compute(config, directory, mine, model, tokenizer, indexer)
    missing = [cell for cell in _cells(config) if _missing(config, directory, cell)]
    if missing:
        return {"complete": False, "missing": [list(cell) for cell in missing]}
    return report_eval(directory)


def prepare_prompts(config: EvalConfig, output, *, tokenizer=None) -> Path:
    """Writes the prompts of every task into a run directory and returns it; needs the tokenizer only.

    It runs on a machine that has the texts, when the models run on another one without them.
    """
    directory = open_stage(output, "eval", config)
    if tokenizer is None:
        from ...checkpoints import load_tokenizer

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
    records = _records(config, directory)
    _check_agree(config, list(records.values()))
    result = tabulate(config, records)
    write_json(directory / "report.json", result)
    write_text(directory / "report.md", markdown(result))
    write_figure(directory / "report.png", figure(result))
    if result["forced"] is not None:
        write_figure(directory / "forced.png", forced_figure(result))
    return result


def adopt_records(config: EvalConfig, output, earlier: list[Path]) -> list[tuple[str, str]]:
    """Copies cells with the same variant and budget from earlier runs, and returns them.

    The earlier runs must differ from `config` in k, block, tail and variants only.
    """
    directory = open_stage(output, "eval", config)
    copied = []
    for other in map(Path, earlier):
        theirs = _read_config(other)
        common = {name: getattr(theirs.budget, name) for name in ("k", "block", "tail")}
        ours = replace(config, budget=config.budget.replace(**common), variants=theirs.variants)
        if ours.to_dict() != theirs.to_dict():
            raise RunError(f"{other} must differ from {directory} in k, block, tail and variants only")
        for task in config.tasks:
            for path in (_prompts_path, _rows_path):
                source, ours = path(other, task), path(directory, task)
                if source.exists() and not ours.exists():
                    ours.parent.mkdir(exist_ok=True)
                    write_bytes(ours, source.read_bytes())
        for cell in _cells(config):
            if cell[1] not in theirs.variants or _done(directory, cell) or not _done(other, cell):
                continue
            record = _read(theirs, other, cell)
            if record["budget"] == _budget_dict(config, cell[1]):
                _stored(config, directory).write(_name(cell), record)
                copied.append(cell)
    return copied


def _cells(config: EvalConfig) -> list[tuple[str, str]]:
    """All (task, variant), dense first, so that what dense attention does not solve can be skipped."""
    names = ["dense", *(name for name in config.variants if name != "dense")]
    return [(task, name) for name in names for task in config.tasks]


def _missing(config: EvalConfig, directory: Path, cell: tuple[str, str]) -> bool:
    return not _done(directory, cell) and not _skipped(config, directory, cell)


def _skipped(config: EvalConfig, directory: Path, cell: tuple[str, str]) -> bool:
    dense = (cell[0], "dense")
    if not config.only_solved or cell == dense or not _done(directory, dense):
        return False
    return not is_solved(config, _read(config, directory, dense))


def _compute(config, directory, cells, model, tokenizer, indexer) -> None:
    names = [name for name in config.variants if any(cell[1] == name for cell in cells)]
    subject = with_tokenizer(load_subject(config, names, model, tokenizer, indexer), config)
    check_context(subject.model, config.length)
    attachable(subject, names, config.budget, config.impl)
    prompts = {task: _prompts(config, directory, task, subject.tokenizer) for task in {cell[0]: None for cell in cells}}
    common = {**subject.inputs(), "machine": machines.machine(str(subject.model.device))}
    existing = _records(config, directory).values()
    ours = ({**common, "prompts": p.digest, "task": task, "batch": SPARSE_BATCH} for task, p in prompts.items())
    _check_agree(config, [*existing, *ours])

    # Whether a task is solved may be for another shard to say: such cells wait until this shard's others are done.
    order = [*cells, *cells] if config.only_solved else cells
    for place, cell in enumerate(order):
        task, name = cell
        dense = (task, "dense")
        if not _missing(config, directory, cell):
            continue
        if config.only_solved and name != "dense" and not _done(directory, dense):
            if place < len(cells):
                continue
            _compute_cell(config, directory, dense, subject, prompts[task], common)
            if _skipped(config, directory, cell):
                continue
        _compute_cell(config, directory, cell, subject, prompts[task], common)


def _compute_cell(config, directory, cell, subject: Subject, prompts: Prompts, common: dict) -> None:
    task, name = cell
    dense = budget_of(name, config.budget) is None
    started = time.perf_counter()
    samples = [{"index": example.index, "length": example.length} for example in prompts.examples]
    if "forced" in config.instruments:
        for sample, judged in zip(samples, _forced(config, directory, cell, subject, prompts)):
            sample |= judged
    if "generated" in config.instruments:
        batch = config.batch if dense else SPARSE_BATCH
        with _prefill(config, name, subject):
            outputs = generate_texts(subject.model, subject.tokenizer, prompts.examples, prompts.ids, batch)
        for sample, example, output in zip(samples, prompts.examples, outputs):
            sample |= {"score": score(example, output), "output": output}
    record = {
        "evidence": evidence_of(name, subject.indexer),
        "prompts": prompts.digest,
        **common,
        "adapter": common["adapter"] if needs_indexer([name]) else None,
        **({} if dense else {"batch": SPARSE_BATCH}),
        "seconds": round(time.perf_counter() - started, 3),
        "samples": samples,
    }
    _stored(config, directory).write(_name(cell), record)
    say(f"{task} / {name}: {100 * mean_score(record):.1f} ({record['seconds']:.1f} s)")


def _prefill(config: EvalConfig, name: str, subject: Subject):
    """The context in which a variant's prompts are prefilled."""
    budget = budget_of(name, config.budget)
    if budget is None:
        return nullcontext()
    from ...prefill import SparsePrefill

    selector = selector_of(name, subject.indexer, config.seed)
    return SparsePrefill.attach(subject.model, selector, budget, impl=config.impl, workspace_mib=config.workspace_mib)


def _forced(config: EvalConfig, directory: Path, cell, subject: Subject, prompts: Prompts) -> list[dict]:
    """The teacher-forced scores of a cell; what dense attention makes of the answers is computed once for all variants."""
    task, name = cell
    path = _rows_path(directory, task)
    if name == "dense" or not path.exists():
        samples, rows = teacher_forced.score_forced(subject.model, prompts.asked, stress=config.stress and name == "dense")
        path.parent.mkdir(exist_ok=True)
        teacher_forced.write_states(path, rows)
        if name == "dense":
            return samples
    dense = teacher_forced.read_states(path)
    attach = partial(_prefill, config, name, subject)
    return teacher_forced.score_forced(subject.model, prompts.asked, attach, dense, stress=config.stress)[0]


def _prompts(config: EvalConfig, directory: Path, task: str, tokenizer) -> Prompts:
    """The prompts of one task, read from the run directory or generated and written there."""
    path = _prompts_path(directory, task)
    if path.exists():
        entries = read_json(path, [EXAMPLE])
        told = [{name: entry[name] for name in entry if name in Example.__dataclass_fields__} for entry in entries]
        examples = [Example(**{**entry, "answers": tuple(entry["answers"])}) for entry in told]
    else:
        known = task_named(task)
        examples = generate(
            task, tokenizer, length=config.length, count=config.count, seed=config.seed, chat=config.chat,
            haystack=texts.documents(config.texts) if known.needs == "haystack" else None,
            qa_file=config.qa_files.get(task), max_new_tokens=config.max_new_tokens, question=config.question,
        )  # fmt: skip
        path.parent.mkdir(exist_ok=True)
        write_json(path, [asdict(example) for example in examples])
    if len(examples) != config.count:
        raise RunError(f"{path} must hold {config.count} examples, got {len(examples)}: delete it to make it again")
    ids = tuple(tuple(encode(tokenizer, example)) for example in examples)
    for example, tokens in zip(examples, ids):
        if len(tokens) != example.length:
            raise RunError(f"{path} was made with another tokenizer: example {example.index} must have "
                           f"{example.length} tokens, got {len(tokens)}")  # fmt: skip
    content = json.dumps([[asdict(example) for example in examples], ids])
    asked = (teacher_forced.forced(tokenizer, example) for example in examples if "forced" in config.instruments)
    return Prompts(tuple(examples), ids, hashlib.sha256(content.encode()).hexdigest()[:16], tuple(asked))


def _prompts_path(directory: Path, task: str) -> Path:
    return directory / "prompts" / f"{task}.json"


def _rows_path(directory: Path, task: str) -> Path:
    return directory / "forced" / f"{task}.safetensors"


def _name(cell: tuple[str, str]) -> str:
    return f"{cell[0]}-{cell[1]}"


def _done(directory: Path, cell: tuple[str, str]) -> bool:
    return (directory / "records" / f"{_name(cell)}.json").exists()


def _stored(config: EvalConfig, directory: Path) -> Cells:
    """The cells of a run: their records are those of their own task, variant and Budget."""
    identities = {
        _name(cell): {"task": cell[0], "variant": cell[1], "budget": _budget_dict(config, cell[1])} for cell in _cells(config)
    }
    scores = {"right": float, "tokens": float, "kl": float} if "forced" in config.instruments else {}
    if scores and config.stress:
        scores |= {"stress_right": float, "stress_kl": float}
    if "generated" in config.instruments:
        scores |= {"score": float, "output": str}
    form = {
        "evidence": EVIDENCE, "prompts": str, "base": dict, "adapter": (str, None), "seconds": float, "machine": machines.FORM,
        "samples": [{"index": int, "length": int, **scores}, config.count],
    }  # fmt: skip

    def upgrade(name: str, record: dict) -> dict:
        """Adds the fields that the Budget did not have yet, with their defaults."""
        budget = record["budget"]
        return {**record, "budget": None if budget is None else Budget.from_dict(budget).to_dict()}

    return Cells(directory / "records", identities, form, upgrade)


def _read(config: EvalConfig, directory: Path, cell: tuple[str, str]) -> dict:
    return _stored(config, directory).read(_name(cell))


def _records(config: EvalConfig, directory: Path) -> dict[tuple[str, str], dict]:
    """The records of all finished cells."""
    stored = _stored(config, directory)
    return {cell: stored.read(_name(cell)) for cell in _cells(config) if _done(directory, cell)}


def _read_config(directory: Path) -> EvalConfig:
    return read_stage(directory, "eval", EvalConfig)


def _budget_dict(config: EvalConfig, name: str) -> dict | None:
    budget = budget_of(name, config.budget)
    return None if budget is None else budget.to_dict()


def _check_agree(config: EvalConfig, records: list[dict]) -> None:
    """Raises RunError unless records are of one model and one adapter, and those of a task of the same prompts.

    Earlier versions put sparse prompts into batches, too, and their records do not say "batch".
    """
    seen: dict[str, object] = {}
    for record in records:
        inputs = {"base model": record["base"], f"prompts of {record['task']}": record["prompts"]}
        if record["adapter"] is not None:
            inputs["adapter weights"] = record["adapter"]
        if "generated" in config.instruments and ("batch" in record or record["budget"] is not None):
            inputs["number of sparse prompts generated together"] = record.get("batch", config.batch)
        for name, value in inputs.items():
            if seen.setdefault(name, value) != value:
                raise RunError(
                    f"all cells must have the same {name}, got {seen[name]} and {value}: use another directory"
                )
