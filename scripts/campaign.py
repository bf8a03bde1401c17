#!/usr/bin/env python3
"""All that is to be measured of quality and time on one GPU, in order of value, in one command that goes on where it stopped.

    python scripts/campaign.py --prepare                     # without a GPU: the prompts
    python scripts/campaign.py --list                        # what there is, and about how long the rest takes
    python scripts/campaign.py --seconds 560                 # with the GPU, until it says that all is done
    python scripts/campaign.py --pack runs/campaign.tar.xz   # reports, and what is needed to go on elsewhere

A step is one run of this project, into a folder of its name, with the command that --list shows. Nothing finished is done again:
steps are runs of cells, or resume from their last checkpoint. --seconds starts no step and no cell after that time, and stops a
step that has no cells. All runs are made in one process, which loads a checkpoint once for the steps in a row that are of it. A
step that fails is noted, and tried again after all others. --only names steps, or groups of them by how their names begin.

--model NAME=PATH takes a local copy of a demo's checkpoint. --tiny rehearses every step on a CPU, on random weights and short
prompts: it says that the steps run, and no figure of it means anything.
"""

import argparse
import gc
import importlib.util
import json
import re
import shlex
import signal
import sys
import tarfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

from npu_sparse import cann

with cann.required():
    import torch  # noqa: F401

from npu_sparse import checkpoints, cli
from npu_sparse.errors import UNFINISHED
from npu_sparse.measure.quality import EvalConfig, prepare_prompts
from npu_sparse.measure.variants import split_names
from npu_sparse.runs.page import markdown_table, say
from npu_sparse.runs.store import read_json, write_json, write_text

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
SMALL, LARGE, GEMMA, SMOL = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "gemma3-270m", "smollm2-135m"
SHORT = {SMALL: "0.5b", LARGE: "1.5b", GEMMA: "gemma3", SMOL: "smollm2"}

HARD = "niah_multikey_2,niah_multikey_1,niah_multivalue"
SIX = f"{HARD},niah_multiquery,niah_single_3,fwe"
OTHERS = (
    "graph_search,graph_parents,facts_1,facts_2,facts_3,rounds_2,rounds_8,code_holder,code_body,tally_count,tally_most,tally_user,"
    "vt,cwe"
)
SHARED = "block=64,reduce=softmax_max,exact_last=128"
DEFAULT = f"indexer:k=2048,{SHARED}"
PER_QUERY = "indexer:k=1024,block=1,exact_last=128"
RAW = "indexer:k=1024,block=64"
LOCAL = "local:k=1024,block=64,exact_last=128"


@dataclass(frozen=True)
class Step:
    """One run: what it answers, and its command, `{out}` being the campaign's folder. `seconds`: of a GPU, where no cell says."""

    name: str
    answers: str
    kind: str  # "matched" for scripts/matched.py, a command of npu-sparse, or "shape" for `draw`
    model: str
    options: Mapping[str, str]
    seconds: float = 0.0
    after: str = ""

    def words(self, out: Path) -> list[str]:
        """What follows the program's name, with the step's own folder."""
        given = [part for name, value in self.options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        return [part.replace("{out}", str(out)) for part in (self.model, *given, "--output", f"{{out}}/{self.name}")]

    def shown(self, out: Path) -> str:
        program = {"matched": "python scripts/matched.py", "shape": "(drawn)"}.get(self.kind, f"npu-sparse {self.kind}")
        return f"{program} {shlex.join(self.words(out))}"


# What is measured


CARD = {"device": "cuda", "dtype": "bfloat16"}
TRAINING = {
    "tasks": "niah_single_1,niah_single_2,niah_multikey_1,niah_multikey_2,niah_multivalue,vt", "rows": 512, "segment": 256,
    "partition_steps": 16, "workers": 6, **CARD,
}  # fmt: skip


def matched(name: str, answers: str, model: str, *scored: str, clocked: tuple[str, ...] = (), after: str = "", **options) -> Step:
    """A step of scripts/matched.py; the variants of `clocked` are scored and timed."""
    usual = {
        "adapter": model, "length": 16384, "count": 30, "tasks": HARD, "texts": "bible-kjv-text", "scored": ";".join(scored),
        "variants": ";".join(clocked), "timed": "", "dense": "sdpa,fa3", "rounds": 8, "prompts": "{out}/prompts", **CARD,
    }  # fmt: skip
    return Step(name, answers, "matched", model, {**usual, **options}, after=after)


def distilled(name: str, answers: str, model: str, seconds: float, after: str = "", **options) -> Step:
    return Step(name, answers, "distill", model, {**TRAINING, **options}, seconds, after)


def ablations(seeds: tuple[int, ...]) -> Iterator[Step]:
    """Short distillations of the 0.5B that differ from the first in one thing, each judged by the instrument."""
    base = {
        "texts": "anarchism", "lengths": "2048,8192,16384", "tokens": 32768, "micro_batch": 16, "warmup": 20, "steps": 150,
        "validation_length": 8192, "validation_prompts": 4, "budgets": "256,512,1024,2048", "validate_every": 150,
        "save_every": 50,
    }  # fmt: skip
    changes = {
        "base": {}, "heads4": {"heads": 4}, "dim64": {"dim": 64}, "dim256": {"dim": 256},
        "sparse": {"loss": "sparse", "micro_batch": 2}, "shared": {"loss": "shared", "micro_batch": 2},
        "windows2k": {"lengths": "2048"}, "windows32k": {"lengths": "32768"}, "nopartition": {"partition_steps": 0},
        "language": {"lm_steps": 20},
    }  # fmt: skip
    for seed in seeds:
        for what, change in changes.items():
            name = f"ablation-{what}-{seed}"
            words = ", ".join(f"{key} {value}" for key, value in change.items() if key != "micro_batch") or "unchanged"
            yield distilled(f"{name}-distill", f"Ablation: {words}; seed {seed}.", SMALL, 110, **{**base, **change, "seed": seed})
            yield matched(
                f"{name}-judged", "The same, judged.", SMALL, DEFAULT, PER_QUERY, tasks="niah_multikey_2,niah_multikey_1",
                adapter=f"{{out}}/{name}-distill/adapter", after=f"{name}-distill",
            )  # fmt: skip


def fitted() -> str:
    """The default budget with the k by layer that `npu-sparse fit` found on the 0.5B at 16384 tokens."""
    return f"indexer:{read_json(ROOT / 'docs' / 'results' / 'fit-qwen2.5-coder-0.5b-16384' / 'report.json')['budget']}"


def steps(seeds: tuple[int, ...] = (0, 1)) -> list[Step]:
    """All steps in order of value: what a session that is cut should have done comes first."""
    pair = ((SMALL, "0.5b"), (LARGE, "1.5b"))
    wide, widest = (f"indexer:k={k},{SHARED}" for k in (4096, 8192))
    fine = "indexer:k=4096,block=16,reduce=softmax_max,exact_last=128"
    found = [matched(
        "fitted-0.5b-16k", "Is k by layer worth answers over the same keys everywhere?", SMALL, DEFAULT, fitted(), count=100,
        tasks=f"{HARD},niah_multiquery",
    )]  # fmt: skip
    found += [matched(
        f"tiers-{size}-32k", "How many keys do 32768 tokens take, and what do they cost?", model, PER_QUERY,
        clocked=(DEFAULT, wide, fine, widest), length=32768, timed="8192,16384,32768",
    ) for model, size in pair]  # fmt: skip
    found += [matched(
        f"bar-{size}-{length // 1024}k", "Is the default within a point of dense, and every query's own within half of one?",
        model, PER_QUERY, DEFAULT if length < 32768 else wide, tasks=SIX, length=length, count=count, unsolved="skip",
    ) for length, count in ((16384, 200), (32768, 100)) for model, size in pair]  # fmt: skip
    others = ("pooled", "antidiagonal", "vertical-slash", "local", "random")
    peers = tuple(f"{name}:k=2048,block=64,exact_last=128" for name in others)
    found += [
        matched(
            "peers-0.5b-16k", "Is a distilled indexer worth it at the same retained pairs?", SMALL, DEFAULT, *peers, RAW,
            PER_QUERY, "oracle:k=2048,block=64,exact_last=128", "oracle:k=1024,block=1,exact_last=128",
        ),
        Step("peers-0.5b-32k-stages", "What does each peer's attention stage take here?", "ttft", SMALL, {
            "adapter": SMALL, "lengths": "32768", "budget": f"k=2048,{SHARED}", "runs": 5, "stage_runs": 3, "baselines": "fa3",
            "texts": "bible-kjv-text", "variants": "dense,indexer-shared,pooled,antidiagonal,vertical-slash,local:block=64",
            **CARD,
        }, 60),
    ]  # fmt: skip
    found += [matched(
        f"question-0.5b-{place}", f"What is an exact end worth with the question at the {place}?", SMALL, DEFAULT,
        "indexer:k=2048,block=64,reduce=softmax_max", PER_QUERY, "indexer:k=1024,block=1", question=place, count=50,
    ) for place in ("end", "front", "middle")]  # fmt: skip
    found += [matched(
        f"others-{size}-16k", "What do tasks lose that are not needles? Aggregation is the worst case.", model, PER_QUERY,
        DEFAULT, LOCAL, tasks=OTHERS,
    ) for model, size in pair]  # fmt: skip
    found += [
        matched(f"options-0.5b-{name}", f"Is {words} worth it?", SMALL, DEFAULT, f"{DEFAULT},{words}")
        for name, words in (("layers", "share_layers=2"), ("candidates", "candidates=8192,key_block=32"), ("tail", "tail"))
    ]
    found += [Step(f"generated-{size}-16k", "The same prefills, generated and decoded densely.", "eval", model, {
        "adapter": model, "length": 16384, "count": 30, "tasks": HARD, "texts": "bible-kjv-text", "instruments": "generated",
        "batch": 5, "max_new_tokens": 48, "budget": "k=1024,block=64,exact_last=128", "impl": "auto",
        "variants": f"dense,indexer,indexer-shared:k=2048,{SHARED},indexer-shared:exact_last=0,local:block=64", **CARD,
    }, seconds) for (model, size), seconds in zip(pair, (240, 330))]  # fmt: skip
    small = {
        "texts": "anarchism,python3.11-doc", "lengths": "1024,2048,4096", "tokens": 16384, "micro_batch": 16, "warmup": 100,
        "validation_length": 2048, "validation_prompts": 12, "budgets": "64,128,256,512", "validate_every": 250,
        "save_every": 100,
    }  # fmt: skip
    lengths = {GEMMA: "4096,8192,16384,32768", SMOL: "4096,8192"}
    for model, options in ((GEMMA, {"heads": 4, "steps": 1000}), (SMOL, {"heads": 1, "steps": 900})):
        name = f"adapter-{SHORT[model]}"
        found += [
            distilled(name, "The shipped adapter's training, with partition heads.", model, 330, **small, **options),
            matched(
                f"{SHORT[model]}-4k", "What does the default lose on a small checkpoint, and from which length on is it faster?",
                model, "indexer:k=512,block=1,exact_last=128", f"indexer:k=1024,{SHARED}", after=name,
                adapter=f"{{out}}/{name}/adapter",
                clocked=(f"indexer:k=512,{SHARED}", "indexer:k=512,block=64", "local:k=512,block=64,exact_last=128"),
                length=4096, count=100, tasks=SIX, unsolved="skip", timed=lengths[model],
            ),
        ]  # fmt: skip
    found += ablations(seeds)
    speed = {
        "texts": "anarchism", "tokens": 32768, "micro_batch": 1, "warmup": 2, "steps": 8, "validation_length": 8192,
        "validation_prompts": 1, "budgets": "1024", "validate_every": 8, "save_every": 8,
    }  # fmt: skip
    found.append(Step("shape-0.8b", "Random weights of Qwen3.5-0.8B's shape, to be distilled.", "shape", SMALL, CARD, 20))
    found += [distilled(
        f"speed-{size}-{window // 1024}k", f"Tokens a second of distillation at windows of {window}.", model, 60, after,
        **{**speed, "lengths": str(window), "partition_steps": 0},
    ) for model, size, after in ((SMALL, "0.5b", ""), ("{out}/shape-0.8b/checkpoint", "0.8b", "shape-0.8b"))
      for window in (16384, 32768)]  # fmt: skip
    return found


# The rehearsal

LENGTHS = {"1024": "1000", "2048": "1024", "4096": "1100", "8192": "1152", "16384": "1280", "32768": "1536"}
TINY = {
    "device": "cpu", "dtype": "float32", "impl": "reference", "count": 1, "rounds": 1, "runs": 1, "stage_runs": 1,
    "dense": "sdpa", "baselines": "sdpa", "texts": "{out}/tiny/texts", "steps": 2, "lm_steps": 1, "warmup": 1, "workers": 0,
    "tokens": 1600, "rows": 128, "segment": 64, "validation_prompts": 2, "validation_length": 1024, "validate_every": 2,
    "save_every": 1, "budgets": "8,16", "batch": 1, "max_new_tokens": 48, "micro_batch": 1,
}  # fmt: skip
EVERY_TASK = ("bar-0.5b-16k", "others-0.5b-16k")  # two tasks of the other steps, which have the same ones
KINDS = {SMALL: "qwen2", LARGE: "qwen2", GEMMA: "gemma3", SMOL: "llama"}


def rehearsed(step: Step) -> Step:
    """The same step on random weights: an eighth of the length or less, k and the exact end divided by 32, one prompt a task."""
    options = {}
    for name, value in step.options.items():
        value = str(TINY.get(name, value))
        if name in ("length", "lengths", "timed"):
            value = ",".join(LENGTHS[part] for part in value.split(",") if part)
        if name in ("scored", "variants", "budget"):
            value = re.sub(r"per_layer=[^,;]+", "per_layer=1:32", value)
            value = re.sub(r"\b(k|candidates|exact_last)=([1-9]\d*)", lambda m: f"{m[1]}={max(8, int(m[2]) // 32)}", value)
        if name == "adapter" and value in KINDS:
            value = f"{{out}}/tiny/{value}/adapter"
        if name == "partition_steps":
            value = str(min(1, int(value)))
        if name == "tasks" and step.kind != "distill" and step.name not in EVERY_TASK:
            value = ",".join(value.split(",")[:2])
        options[name] = value
    return replace(step, options=options | ({"size": "tiny"} if step.kind == "shape" else {}))


def make_tiny(out: Path) -> dict[str, str]:
    """Checkpoints of random weights for all names, with untrained adapters; returns where they are."""
    from npu_sparse import Indexer, tasks
    from npu_sparse.tasks.words import ADJECTIVES, NOUNS
    from npu_sparse.testing import tiny_model, tiny_tokenizer

    paths = {name: out / "tiny" / name for name in KINDS}
    if not all((path / "adapter" / "config.json").exists() for path in paths.values()):
        texts = [document.text[:40_000] for document in tasks.documents(("builtin",))[:12]]
        (out / "tiny" / "texts").mkdir(parents=True, exist_ok=True)
        for n, text in enumerate(texts):
            write_text(out / "tiny" / "texts" / f"{n}.txt", text)
        lines = "".join(texts)[:100_000].splitlines() + [" ".join((*ADJECTIVES, *NOUNS))] * 9
        tokenizer = tiny_tokenizer(lines, size=3000, special=("<eos>",), begins=False, eos_token="<eos>", pad_token="<eos>")
        for name, path in paths.items():
            model = tiny_model(KINDS[name], vocab_size=len(tokenizer), max_position_embeddings=2048, eos_token_id=0)
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
            model, _ = checkpoints.load(path, dtype="float32", device="cpu", progress=False)
            Indexer.for_model(model, dim=64, partition=True).save_pretrained(path / "adapter")
    return {name: str(path) for name, path in paths.items()}


# How far it is


def load_matched():
    """scripts/matched.py as a module: scripts are no package."""
    if "matched" not in sys.modules:
        found = importlib.util.spec_from_file_location("matched", ROOT / "scripts" / "matched.py")
        module = sys.modules["matched"] = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    return sys.modules["matched"]


def left_of(step: Step, out: Path) -> tuple[object, list[tuple[str, str]]]:
    """The arguments of a step of matched.py, and its cells that are left."""
    args = load_matched().arguments(step.words(out))
    return args, load_matched().left(args)


def cells(step: Step, out: Path) -> tuple[int, int]:
    """How many cells of a step are finished, and how many it has; of a distillation, steps of training."""
    folder, options = out / step.name, step.options
    if step.kind == "matched":
        args, left = left_of(step, out)
        total = sum(len(part.identities) for part in load_matched().cells_of(args))
        return total - len(left), total
    records = len(list((folder / "records").glob("*.json")))
    if step.kind == "distill":
        total, lines = int(options["steps"]) + int(options.get("lm_steps", 0)), folder / "metrics.jsonl"
        records = len(lines.read_text().splitlines()) if lines.exists() else 0
    elif step.kind == "eval":
        total = len(options["tasks"].split(",")) * len(split_names(options["variants"]))
    else:
        total = len(options.get("lengths", "").split(","))
    return (total if is_done(step, out) else min(records, total - 1)), total


def is_done(step: Step, out: Path) -> bool:
    """Whether a step has all of its cells, and the report that says so."""
    return (out / step.name / "report.json").exists() and (step.kind != "matched" or not left_of(step, out)[1])


# Seconds of a prompt through each kind of prefill on an H200 (docs/results/matched-*: TTFT; what is not there is a guess), and of
# the dense continuation and the judging after it.
PREFILL_S = {
    (SMALL, 16384): (0.061, 0.065, 0.115), (SMALL, 32768): (0.159, 0.121, 0.249), (LARGE, 16384): (0.137, 0.134, 0.23),
    (LARGE, 32768): (0.334, 0.259, 0.5), (SMALL, 8192): (0.04, 0.06, 0.08), (LARGE, 8192): (0.061, 0.072, 0.12),
}  # fmt: skip
ANSWER_S, SMALLEST, START_S = 0.06, (0.02, 0.04, 0.05), 10
SLOWER = {"oracle": 6, "pooled": 3, "antidiagonal": 6, "vertical-slash": 4}  # eager, over the shared kernel


def prompt_s(model: str, length: int, spec: str) -> float:
    dense, shared, own = PREFILL_S.get((model, length), SMALLEST)
    if spec.startswith("dense"):
        return dense
    return (own if "block=1," in spec else shared) * SLOWER.get(spec.partition(":")[0], 1)


def expected_s(step: Step, out: Path) -> float:
    """About how many seconds of a GPU a step still takes."""
    done, total = cells(step, out)
    if done == total:
        return 0.0
    if step.kind != "matched":
        return step.seconds * (1 - done / total)
    (args, left), seconds = left_of(step, out), START_S
    variants = load_matched().cells_of(args)[0].identities
    for kind, name in left:
        if kind == "timings":
            timed = [*(f"dense {dense}" for dense in args.dense), *args.variants]
            seconds += (args.rounds + 2) * sum(prompt_s(step.model, int(name), spec) for spec in timed)
        else:
            seconds += args.count * (prompt_s(step.model, args.length, variants[name]["variant"]) + ANSWER_S)
    return seconds


def table(chosen: list[Step], out: Path, failed: dict[str, str]) -> str:
    lines = []
    for step in chosen:
        done, total = cells(step, out)
        left = expected_s(step, out)
        state = "done" if is_done(step, out) else f"failed: {failed[step.name]}" if step.name in failed else ""
        lines.append({
            "step": step.name, "cells": f"{done} / {total}", "left (s)": round(left), "state": state, "answers": step.answers,
            "command": f"`{step.shown(out)}`",
        })  # fmt: skip
    lines.append({"step": "all", "left (s)": sum(line["left (s)"] for line in lines)})
    return markdown_table(lines, {name: name for name in ("step", "cells", "left (s)", "state", "answers", "command")})


# Running


class TimeUp(BaseException):
    """Ends a step that has no cells to stop between; it goes on from its last checkpoint."""


@contextmanager
def ends_at(deadline: float) -> Iterator[None]:
    def stop(*_):
        raise TimeUp

    if deadline == float("inf"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, deadline - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def loads_once(paths: dict[str, str]) -> Iterator[None]:
    """Within it a checkpoint that the step before had is not loaded again, and demos are read from `paths`."""
    load, tokenizer_of, kept = checkpoints.load, checkpoints.load_tokenizer, {}

    def again(name, **options):
        key = json.dumps([str(name), {option: str(value) for option, value in options.items() if option != "progress"}])
        if key not in kept:
            kept.clear()
            gc.collect()
            kept[key] = load(paths.get(str(name), name), **options)
        return kept[key]

    checkpoints.load = again
    checkpoints.load_tokenizer = lambda name, **options: tokenizer_of(paths.get(str(name), name), **options)
    try:
        yield
    finally:
        checkpoints.load, checkpoints.load_tokenizer = load, tokenizer_of


def run(step: Step, out: Path, deadline: float) -> None:
    """Does what is left of a step until time is up. Whatever its run raises passes through."""
    words = step.words(out)
    (out / step.name).mkdir(parents=True, exist_ok=True)
    if step.kind == "matched":
        left = max(0.0, deadline - time.monotonic())
        load_matched().main([*words, "--seconds", str(left)], started=time.monotonic())
    elif step.kind == "shape":
        draw(step, out / step.name)
    else:
        with ends_at(deadline):
            status = cli.main([step.kind, *words])
        if status not in (0, UNFINISHED):
            raise RuntimeError(f"npu-sparse {step.kind} ended with status {status}: what it said stands above")


def draw(step: Step, folder: Path) -> None:
    """A checkpoint of Qwen3.5-0.8B's shape with random weights and a tokenizer of another model, for times of training."""
    import torch

    from npu_sparse.measure.ttft.shapes import COMMON, qwen35

    options, tokenizer = step.options, checkpoints.load_tokenizer(step.model)
    size = options.get("size", "0.8b")
    vocabulary = len(tokenizer) if size == "tiny" else COMMON["vocab_size"]
    model = qwen35(size, dtype=getattr(torch, options["dtype"]), device=options["device"], vocab_size=vocabulary)
    model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    write_json(folder / "report.json", {"stage": "shape", "parameters": sum(p.numel() for p in model.parameters())})


def run_all(every: list[Step], chosen: list[Step], out: Path, deadline: float) -> dict[str, str]:
    """Runs what is not done until time is up; returns the steps that failed, with their errors."""
    by_name = {step.name: step for step in every}
    failed = failures(out)
    for step in sorted(chosen, key=lambda step: step.name in failed):  # stable
        if time.monotonic() >= deadline:
            break
        if is_done(step, out) or (step.after and not is_done(by_name[step.after], out)):
            continue
        began = time.monotonic()
        say(f"{step.name}: {step.answers}")
        try:
            with open(out / "log", "a") as log, redirect_stdout(log):
                run(step, out, deadline)
            failed.pop(step.name, None)
        except TimeUp:
            say(f"{step.name}: stopped, time is up")
        except Exception as error:
            traceback.print_exc()
            failed[step.name] = " ".join(str(error).split())[:300] or type(error).__name__
        write_json(out / "failed.json", failed)
        if "CUDA error" in failed.get(step.name, ""):  # nothing of this process works on that device any more
            raise RuntimeError(f"{step.name}: {failed[step.name]}: run the same command again")
        say(f"{step.name}: {' of '.join(map(str, cells(step, out)))} cells, {time.monotonic() - began:.0f} s")
    return failed


def failures(out: Path) -> dict[str, str]:
    """The steps that failed when they were last tried, with what they said."""
    return read_json(out / "failed.json", {str: str}) if (out / "failed.json").exists() else {}


def prepare(chosen: list[Step], out: Path) -> None:
    """The prompts of all steps, for which a GPU need not wait."""
    for step in sorted(chosen, key=lambda step: -int(step.options.get("count", 0))):  # others read the first of the most
        if step.kind == "matched":
            load_matched().main([*step.words(out), "--prepare"])
        elif step.kind == "eval":
            options = {name: str(value).replace("{out}", str(out)) for name, value in step.options.items()}
            options |= {name: int(options[name]) for name in ("length", "count", "batch", "max_new_tokens")}
            options |= {name: options[name].split(",") for name in ("tasks", "texts", "instruments")}
            config = EvalConfig(model=step.model, **{**options, "variants": split_names(options["variants"])})
            prepare_prompts(config, out / step.name)


# Carrying

CHECKPOINT = "checkpoint.safetensors"


def travels(path: Path, out: Path) -> bool:
    """Whether a file is needed elsewhere: not what is made again in less time than it takes to carry."""
    folder, name = path.relative_to(out).parts[0], path.name
    if folder in ("tiny", "shape-0.8b") or path.parent.name in ("dense", "forced") or name.endswith(".tmp"):
        return False
    return name != CHECKPOINT or not (path.parent / "report.json").exists()


def pack(out: Path, archive: Path) -> int:
    """Writes all that travels as `archive`, to be unpacked in another campaign's folder; returns its bytes."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(f".{archive.name}.partial")
    with tarfile.open(partial, "w:xz") as tar:
        for path in sorted(out.rglob("*")):
            if path.is_file() and path not in (archive, partial) and travels(path, out):
                tar.add(path, str(path.relative_to(out)))
    partial.replace(archive)
    return archive.stat().st_size


def arguments(words=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/campaign"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no step and no cell after this")
    parser.add_argument("--only", default="", help="steps, or what their names begin with, separated by commas")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH", help="a local copy of a demo's checkpoint")
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU, on random weights")
    parser.add_argument("--list", action="store_true", help="show the steps and end")
    parser.add_argument("--prepare", action="store_true", help="make the prompts and end")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write what is there as one .tar.xz and end")
    return parser.parse_args(words)


def main(words=None, *, started: float = STARTED) -> int:
    """Exit status: 0 all is done, 1 a step failed, 3 time was up."""
    args = arguments(words)
    every = [rehearsed(step) for step in steps((0,))] if args.tiny else steps()
    begins = tuple(filter(None, args.only.split(",")))
    if unknown := [name for name in begins if not any(step.name.startswith(name) for step in every)]:
        raise ValueError(f"only must begin the name of a step, got {unknown[0]!r}: --list names them")
    chosen = [step for step in every if not begins or step.name.startswith(begins)]
    paths = dict(item.split("=", 1) for item in args.model if "=" in item)
    if unknown := [item for item in args.model if item.partition("=")[0] not in SHORT or "=" not in item]:
        raise ValueError(f"model must be NAME=PATH with a name among {', '.join(SHORT)}, got {unknown[0]!r}")
    if args.pack:
        print(f"{args.pack}: {pack(args.output, args.pack)} bytes")
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.list:
        with loads_once(make_tiny(args.output) if args.tiny else paths):
            if args.prepare:
                prepare(chosen, args.output)
                return 0
            run_all(every, chosen, args.output, started + args.seconds)
    failed = failures(args.output)
    print(table(chosen, args.output, failed))
    left = [step.name for step in chosen if not is_done(step, args.output)]
    print(f"not done: {', '.join(left)}" if left else "all is done")
    return 1 if failed.keys() & set(left) else 3 if left and not args.list else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
