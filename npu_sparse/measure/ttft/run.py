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
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from ...budget import Budget
from ...runs import machine as machines
from ...runs import stats
from ...runs.figures import write_figure
from ...runs.page import say
from ...runs.store import Cells, RunError, open_stage, write_json, write_text
from ..clocks import (
    StageTimer,
    dense_attention_timed,
    peak_memory_bytes,
    reset_peak_memory,
    synchronize,
)
from ..decode import cache_argument
from ..prompts import prompt_ids
from ..variants import (
    EVIDENCE,
    Subject,
    adapter_fingerprint,
    attachable,
    budget_of,
    check_context,
    evidence_of,
    load_subject,
    needs_indexer,
    selector_of,
    with_tokenizer,
)
from .config import ATTACHED, TtftConfig
from .page import figure, markdown, tabulate


def run_ttft(config: TtftConfig, output, *, model=None, tokenizer=None, indexer=None) -> dict:
    """The report of a timing run. Lengths that have a record already are not measured again.

    Args:
        output: run directory; an earlier run of the same config is resumed, any other refused (RunError).
        model, tokenizer, indexer: used in place of loading `config.model` and `config.adapter`.

    Raises before anything is measured: ValueError (config, lengths), AdapterError, CheckpointError,
    KernelUnavailableError.
    """
    directory = open_stage(output, "ttft", config)
    cells = _cells(config, directory)
    if todo := [length for length in config.lengths if not cells.done(str(length))]:
        subject = _subject(config, model, tokenizer, indexer)
        check_context(subject.model, max(todo))
        attachable(subject, config.variants, config.budget, config.impl)
        _check_agree(directory, [*cells.records().values(), _inputs(subject)])
        prompts = {length: prompt_ids(config, subject, length) for length in todo}
        cells.compute(lambda name: _measure(config, subject, int(name), prompts[int(name)]))
    records = list(cells.records().values())
    _check_agree(directory, records)
    result = tabulate(config, records)
    write_json(directory / "report.json", result)
    write_text(directory / "report.md", markdown(result))
    write_figure(directory / "report.png", figure(result))
    return result


def _cells(config: TtftConfig, directory: Path) -> Cells:
    """A record each of the lengths, which is that of its own length and Budgets."""
    names = [*config.variants, *((ATTACHED,) if config.overhead else ())]
    budgets = {name: _budget_dict(config, name) for name in config.variants}
    stages = {"total": float, str: float}
    form = {
        "base": dict, "adapter": (str, None), "evidence": {name: EVIDENCE for name in names}, "machine": machines.FORM,
        "setting": {
            "device": str, "dtype": str, "threads": int, "load_average": [float, 3], "dense_attention": (str, None),
        },
        "seconds": {name: [float, config.runs] for name in names},
        "peak_bytes": {name: [(int, None), config.runs] for name in names},
        "stages": {name: [stages, config.stage_runs] for name in config.variants},
    }  # fmt: skip

    def upgrade(name: str, record: dict) -> dict:
        """Version 0.1 wrote no Budgets, and later ones have fields that those did not have."""
        told = record.get("budgets", budgets)
        own = {key: None if value is None else Budget.from_dict(value).to_dict() for key, value in told.items()}
        return {**record, "budgets": own}

    identities = {str(length): {"length": length, "budgets": budgets} for length in config.lengths}
    return Cells(directory / "records", identities, form, upgrade)


def _budget_dict(config: TtftConfig, name: str) -> dict | None:
    budget = budget_of(name, config.budget)
    return None if budget is None else budget.to_dict()


def _inputs(subject: Subject) -> dict:
    return {"base": subject.base(), "adapter": None if subject.indexer is None else adapter_fingerprint(subject.indexer)}


def _check_agree(directory: Path, records: list[dict]) -> None:
    for name in ("base", "adapter"):
        if any(record[name] != records[0][name] for record in records):
            raise RunError(
                f"all lengths of {directory} must have been measured with the same {name}: use another directory"
            )


def time_to_first_token(model, ids, chunk: int = 0) -> tuple[float, int]:
    """`(seconds, first token id)` of one greedy prefill of token ids `[1, T]` on the host, `chunk` tokens at a time (0 = all)."""
    import torch
    from transformers import DynamicCache

    name = cache_argument(model)
    with torch.inference_mode():
        synchronize(model.device)
        started = time.perf_counter()
        prompt, cache = ids.to(model.device), DynamicCache(config=model.config)
        for part in prompt.split(chunk or ids.shape[1], 1):
            logits = model(input_ids=part, use_cache=True, logits_to_keep=1, **{name: cache}).logits
        token = int(logits[0, -1].argmax())  # waits for the device
        return time.perf_counter() - started, token


def _subject(config: TtftConfig, model, tokenizer, indexer) -> Subject:
    subject = load_subject(config, config.variants, model, tokenizer, indexer)
    if config.prompt == "text":
        subject = with_tokenizer(subject, config)
    if subject.indexer is None and (needs_indexer(config.variants) or config.overhead):
        from ...indexer import Indexer

        subject = replace(subject, indexer=Indexer.for_model(subject.model, seed=config.seed))
    return subject


@contextmanager
def _prefill(config: TtftConfig, subject: Subject, name: str, length: int, stage=None):
    """The model with one variant attached, or its attention timed where dense has a `stage`."""
    from ...prefill import SparsePrefill

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

    from ...models.architectures import text_config

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
    say(
        f"{length} tokens: " + ", ".join(f"{name} {stats.summary(seconds[name])['median']:.3g} s" for name in names)
    )
    return {
        **_inputs(subject),
        "evidence": {name: _evidence(name, subject) for name in names},
        "machine": machines.machine(str(device)),
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


def _record_path(directory: Path, length: int) -> Path:
    return directory / "records" / f"{length}.json"


def _read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}): run ttft again") from error
