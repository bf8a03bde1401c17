"""How long until the first token, dense against sparse, and where the time goes: `npu-sparse ttft`.

TTFT (s) runs from a prompt's token ids on the host to the id of the first token on the host, selection included, batch
1. All variants run interleaved in one process, every round in a new (seeded) order. Stages and dense attention are
timed in separate runs, because their clocks disturb.

A run directory holds config.json, records/<length>.json (one finished length each, not measured again), report.json,
report.md and report.png.
"""

import gc
import importlib.util
import os
import random
import re
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from ...budget import Budget
from ...errors import ActionableError
from ...ops.workspace import is_exhausted
from ...runs import machine as machines
from ...runs import stats
from ...runs.figures import write_figure
from ...runs.page import say
from ...runs.store import Cells, RunError, check, open_stage, write_json, write_text
from ..clocks import (
    collected_often,
    dense_attention_timed,
    modules_timed,
    peak_memory_bytes,
    release_memory,
    reset_peak_memory,
    stage_timer,
    synchronize,
)
from ..decode import cache_argument
from ..prompts import prompt_ids
from ..variants import (
    EVIDENCE,
    Subject,
    attachable,
    budget_of,
    check_context,
    device_ready,
    evidence_of,
    load_subject,
    needs_indexer,
    selector_of,
    with_tokenizer,
)
from .baselines import running
from .config import ATTACHED, PARTS, TtftConfig, Way
from .page import figure, markdown, tabulate

GROWTH = 1.7  # a length's time goes with its power of this, as the budget of seconds reckons
GEOMETRY = {"geometry": {"query_heads": int, "kv_heads": int, "head_dim": int}, "took_s": float}  # of a record, since 0.1


class LeftOutError(ActionableError, RuntimeError):
    """A finished run of which variants did not run, for another reason than memory; its report is written."""


def run_ttft(
    config: TtftConfig,
    output,
    *,
    budget_s: float | None = None,
    profile: Path | None = None,
    crossover: Path | None = None,
    model=None,
    tokenizer=None,
    indexer=None,
) -> dict:
    """The report of a timing run. Lengths that have a record already are not measured again.

    A variant that runs out of memory is left out of its length, by name, and the others go on. So is one that fails otherwise,
    but then this raises LeftOutError in the end (or at once, with NPU_SPARSE_TRACEBACK set, the error itself).

    Args:
        output: run directory; an earlier run of the same config is resumed, any other refused (RunError).
        budget_s: seconds; stops after a length where the next one would end later. The lengths that are left are the report's
            "missing", and the same call goes on with them. The first of a run is always measured.
        profile: directory for a chrome trace of one prefill of every variant and length.
        crossover: file of measured lengths for Budget(dense_below="auto") to add to.
        model, tokenizer, indexer: used in place of loading `config.model` and `config.adapter`.

    Raises before anything is measured: ValueError (config, lengths), AdapterError, CheckpointError,
    KernelUnavailableError (of the layers around attention, too); ImportError where a baseline is not installed.
    """
    started = time.monotonic()
    directory = open_stage(output, "ttft", config)
    cells = _cells(config, directory)
    if todo := [length for length in config.lengths if not cells.done(str(length))]:
        subject = _subject(config, model, tokenizer, indexer)
        check_context(subject.model, max(todo))
        for name in config.baselines:
            with running(subject.model, name):
                pass
        if "fast" in config.layers:
            from ...models.hybrid import FastHybrid

            FastHybrid.attach(subject.model).detach()
        attachable(subject, config.variants, config.budget, config.impl)
        _check_agree(directory, [*cells.records().values(), subject.inputs()])
        prompts = {length: prompt_ids(config, subject, length) for length in todo}
        for length in todo:
            if budget_s is not None and not _fits(config, cells, length, budget_s - (time.monotonic() - started)):
                break
            with collected_often():
                cells.write(str(length), _measure(config, subject, length, prompts[length], profile))
    records = list(cells.records().values())
    _check_agree(directory, records)
    result = tabulate(config, records, directory.name)
    write_json(directory / "report.json", result)
    write_text(directory / "report.md", markdown(result))
    if result["rows"]:
        write_figure(directory / "report.png", figure(result))
    if crossover is not None:
        from ...models.crossover import merge

        merge(Path(crossover), result["crossovers"])
    if result["missing"]:
        say(f"stopped for --budget-s before {', '.join(map(str, result['missing']))} tokens: the same command goes on")
    failed = [f"{name} ({reason})" for name, reason in result["refused"] if not reason.startswith("out of memory")]
    if failed:
        raise LeftOutError(f"every variant must run, these did not: {'; '.join(failed)}")
    return result


def _fits(config: TtftConfig, cells: Cells, length: int, left_s: float) -> bool:
    """Whether a length is likely to take `left_s` at most, judged by the nearest that is finished; True where none is."""
    done = [record for record in cells.records().values() if "took_s" in record]
    if not done:
        return True
    last = min(done, key=lambda record: abs(record["length"] - length))
    prefills = [sum(config.rounds(n)) + config.stage_runs for n in (length, last["length"])]
    return last["took_s"] * (length / last["length"]) ** GROWTH * prefills[0] / prefills[1] <= left_s


def _cells(config: TtftConfig, directory: Path) -> Cells:
    """A record each of the lengths, which is that of its own length and Budgets."""
    ways = config.ways()
    budgets = {name: _budget_dict(config, name) for name in config.variants}

    def upgrade(name: str, record: dict) -> dict:
        """Version 0.1 wrote no Budgets, and later ones have fields that those did not have; nothing was left out then."""
        told = record.get("budgets", budgets)
        own = {key: None if value is None else Budget.from_dict(value).to_dict() for key, value in told.items()}
        record = {"refused": {}, **record, "budgets": own}
        check(record["refused"], {str: str}, "it.refused")
        later = GEOMETRY if "geometry" in record else {}
        ran, runs = [way for way in ways.values() if way.name not in record["refused"]], config.rounds(int(name))[1]
        check(record, {
            "base": dict, "adapter": (str, None), "evidence": {name: EVIDENCE for name in ways}, "machine": machines.FORM,
            "setting": {
                "device": str, "dtype": str, "threads": int, "load_average": [float, 3], "dense_attention": (str, None),
                **({"device_name": str, "linear_attention": (str, None)} if later else {}),
            },
            **later,
            "seconds": {way.name: [float, runs] for way in ran},
            "peak_bytes": {way.name: [(int, None), runs] for way in ran},
            "stages": {way.name: [{"total": float, str: float}, config.stage_runs] for way in ran if way.variant != ATTACHED},
        })  # fmt: skip
        return record

    identities = {str(length): {"length": length, "budgets": budgets} for length in config.lengths}
    return Cells(directory / "records", identities, upgrade=upgrade)


def _budget_dict(config: TtftConfig, name: str) -> dict | None:
    budget = budget_of(name, config.budget)
    return None if budget is None else budget.to_dict()


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
    if model is None and config.shape is not None:
        import torch

        from .shapes import drawn

        device_ready(config.device)
        model = drawn(config.shape, dtype=getattr(torch, config.dtype), device=config.device, seed=config.seed)
    subject = load_subject(config, config.variants, model, tokenizer, indexer)
    if config.prompt == "text":
        subject = with_tokenizer(subject, config)
    if subject.indexer is None and (needs_indexer(config.variants) or config.overhead):
        from ...indexer import Indexer

        untrained = Indexer.for_model(subject.model, heads=config.heads, dim=config.dim, seed=config.seed)
        subject = replace(subject, indexer=untrained)
    return subject


@contextmanager
def _prefill(config: TtftConfig, subject: Subject, way: Way, length: int, stage=None):
    """The model running one way, or its attention timed where dense has a `stage`."""
    from ...models.architectures import delta_net_modules, gated_mlp_modules, norm_modules
    from ...models.hybrid import FastHybrid
    from ...prefill import SparsePrefill

    model, options = subject.model, dict(impl=config.impl, stage=stage, workspace_mib=config.workspace_mib)
    with ExitStack() as stack:
        if way.baseline is not None:
            stack.enter_context(running(model, way.baseline))
        if way.layers == "fast":
            stack.enter_context(FastHybrid.attach(model))
        if stage is not None and config.parts:
            replaced = (delta_net_modules(model).values(), gated_mlp_modules(model), norm_modules(model))
            stack.enter_context(modules_timed(dict(zip(PARTS, replaced)), stage))
        if way.variant == ATTACHED:
            budget = config.budget.replace(dense_below=length + 1)
            stack.enter_context(SparsePrefill.attach(model, subject.indexer, budget, **options))
        elif (budget := budget_of(way.variant, config.budget)) is not None:
            selector = selector_of(way.variant, subject.indexer, config.seed)
            stack.enter_context(SparsePrefill.attach(model, selector, budget, **options))
        elif stage is not None:
            stack.enter_context(dense_attention_timed(model, stage))
        yield


def _first_token(config: TtftConfig, subject: Subject, way: Way, ids, stage=None) -> tuple[float, int, int | None]:
    """`(seconds, first token id, peak bytes)` of one prefill.

    Where memory runs out it is tried again with the allocator's blocks returned.
    """
    device = subject.model.device

    def once():
        gc.collect()  # caches of earlier prefills hold each other
        with _prefill(config, subject, way, ids.shape[1], stage):
            reset_peak_memory(device)
            return *time_to_first_token(subject.model, ids, config.chunk), peak_memory_bytes(device)

    try:
        return once()
    except RuntimeError as error:
        if not is_exhausted(error):
            raise
    release_memory(device)
    once()  # allocates anew, which is no time to report
    return once()


def _measure(config: TtftConfig, subject: Subject, length: int, ids, profile: Path | None = None) -> dict:
    import torch

    from ...models.architectures import delta_net_modules, describe, text_config
    from ...models.crossover import device_name

    began, device = time.monotonic(), subject.model.device
    load_average = list(os.getloadavg())
    ways, (warmup, runs) = config.ways(), config.rounds(length)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[int | None]] = {name: [] for name in ways}
    stages: dict[str, list[dict]] = {name: [] for name, way in ways.items() if way.variant != ATTACHED}
    tokens: dict[str, int] = {}
    refused: dict[str, str] = {}
    orders = []
    shuffled = random.Random(config.seed)

    def attempt(name: str, stage=None):
        """`_first_token`, or None where this way is left out from now on."""
        try:
            return _first_token(config, subject, ways[name], ids, stage)
        except (RuntimeError, ValueError, TypeError) as error:
            full = is_exhausted(error)
            if not full and os.environ.get("NPU_SPARSE_TRACEBACK"):
                raise
            reason = str(error).strip().partition("\n")[0]
            refused[name] = f"{'out of memory' if full else type(error).__name__} at {length} tokens: {reason}"
        say(f"{name} is left out: {refused[name]}")
        for samples in (seconds, peaks, stages, tokens):
            samples.pop(name, None)
        release_memory(device)
        return None

    for round_ in range(-warmup, runs):
        order = shuffled.sample(list(seconds), len(seconds))
        for name in order:
            if (outcome := attempt(name)) is None:
                continue
            elapsed, tokens[name], peak = outcome
            if round_ >= 0:
                seconds[name].append(elapsed)
                peaks[name].append(peak)
        if round_ >= 0:
            orders.append(order)
    for _ in range(config.stage_runs):
        for name in shuffled.sample(list(stages), len(stages)):
            timer = stage_timer(device)
            if (outcome := attempt(name, timer)) is not None:
                stages[name].append({"total": outcome[0], **timer.seconds})
    for name in stages if profile is not None else ():
        trace = re.sub(r"[^\w.-]+", "-", f"{length}-{name}.json")
        _profile(config, subject, ways[name], ids, Path(profile) / trace)
    medians = {name: stats.summary(times)["median"] for name, times in seconds.items()}
    say(f"{length} tokens: " + ", ".join(f"{name} {took:.3g} s" for name, took in medians.items()))
    hybrid = "flash-linear-attention" if importlib.util.find_spec("fla") else "transformers' torch fallback"
    return {
        **subject.inputs(),
        "evidence": {name: _evidence(way.variant, subject) for name, way in ways.items()},
        "machine": machines.machine(str(device)),
        "setting": {
            "device": str(device),
            "device_name": device_name(device),
            "dtype": str(subject.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "load_average": load_average,
            "dense_attention": ", ".join(config.baselines) or text_config(subject.model)._attn_implementation,
            "linear_attention": hybrid if delta_net_modules(subject.model) else None,
        },
        "geometry": describe(subject.model.config).to_dict(),
        "orders": orders,
        "seconds": seconds,
        "peak_bytes": peaks,
        "first_tokens": tokens,
        "stages": stages,
        "refused": refused,
        "took_s": time.monotonic() - began,
    }


def _profile(config: TtftConfig, subject: Subject, way: Way, ids, path: Path) -> None:
    """One prefill under the device's profiler, as a chrome trace."""
    if subject.model.device.type == "npu":
        import torch_npu.profiler as profiler
    else:
        import torch.profiler as profiler
    path.parent.mkdir(parents=True, exist_ok=True)
    with _prefill(config, subject, way, ids.shape[1]), profiler.profile() as trace:
        time_to_first_token(subject.model, ids, config.chunk)
    trace.export_chrome_trace(str(path))


def _evidence(name: str, subject: Subject) -> str:
    return "dense" if name == ATTACHED else evidence_of(name, subject.indexer)
