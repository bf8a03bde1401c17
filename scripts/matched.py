#!/usr/bin/env python3
"""What does each way of sparse prefill lose, and what does it save? Quality and TTFT of the same path, on one GPU, resumable.

    python scripts/matched.py qwen2.5-coder-0.5b --adapter runs/adapter --texts bible-kjv-text --output runs/matched

Variants are `SELECTOR:BUDGET`, such as `indexer:k=2048,block=16,reduce=softmax_max,exact_last=128`, spelled as `Budget.parse`
reads it; SELECTOR is oracle, indexer, local (4 sinks + recent), random, or a training-free peer: pooled, antidiagonal,
vertical-slash. `--variants` are scored and timed, `--scored` are scored alone (an oracle has no runtime).

Quality is teacher-forced (`measure.teacher_forced`): a prompt counts where every token of its answer is the most likely one after
a sparse prefill and a dense continuation; KL(dense || variant) stands beside it, and the paired difference to dense. A task is
left out of the means where dense attention solves less than `--solved` of it. TTFT is `npu-sparse ttft`'s clock: batch 1, all
variants and dense implementations interleaved in one process.

A cell is one task of one variant, or all timings of one length; a finished cell is not done again. `--seconds` starts no cell
after that time: the same command goes on. The report is written whenever the command ends, of the cells that are there.

`--prompts FOLDER` keeps the prompts as token ids, which other runs on the same tokenizer, texts, length and seed read: fitting
prompts to a length takes a processor longer than a GPU takes to answer them. `--prepare` makes them and ends, without a model.
"""

import argparse
import gc
import hashlib
import json
import random
import sys
import time
from functools import cache, cached_property
from pathlib import Path

from npu_sparse import cann

with cann.required():
    import torch  # noqa: F401

from npu_sparse import Budget, SparsePrefill, tasks
from npu_sparse.measure import variants
from npu_sparse.measure.clocks import release_memory
from npu_sparse.measure.prompts import text_prompts
from npu_sparse.measure.quality import GAPS
from npu_sparse.measure.teacher_forced import (
    Forced,
    forced,
    read_questions,
    read_states,
    score_forced,
    write_questions,
    write_states,
)
from npu_sparse.measure.ttft import time_to_first_token
from npu_sparse.measure.ttft.baselines import running
from npu_sparse.measure.variants import evidence_of, load_subject, needs_indexer, selector_of, spelled
from npu_sparse.runs import stats
from npu_sparse.runs.figures import PALETTE, new_figure, write_figure
from npu_sparse.runs.machine import machine, machine_line
from npu_sparse.runs.page import markdown_table, say
from npu_sparse.runs.store import Cells, open_run, read_json, write_json, write_text
from npu_sparse.tasks.catalogue import task_named
from npu_sparse.tasks.generate import QUESTIONS

STARTED = time.monotonic()
SAMPLE = "The quick brown fox, 12345 times:\n\tdef jump(over): return 'the lazy dog'."
SELECTORS = tuple(name for name, known in variants.VARIANTS.items() if known.chooser == name != "dense")


def arguments(words=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter", help="an adapter's directory or name")
    parser.add_argument("--variants", default="indexer:k=1024,block=64", help="scored and timed, separated by semicolons")
    parser.add_argument("--scored", default="", help="scored alone, separated by semicolons")
    parser.add_argument("--tasks", default="niah_multikey_2,niah_multikey_1")
    parser.add_argument("--texts", default="builtin", help="haystacks: files, folders, packages")
    parser.add_argument("--length", type=int, default=16384, help="of the scored prompts, in tokens")
    parser.add_argument("--count", type=int, default=30, help="prompts a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--question", default="end", choices=QUESTIONS, help="where in a prompt the question stands")
    parser.add_argument("--prompts", type=Path, help="folder of prompts that runs share")
    parser.add_argument("--prepare", action="store_true", help="make the prompts and end")
    parser.add_argument("--solved", type=float, default=0.5, help="share that dense must solve for a task to count in the means")
    parser.add_argument("--unsolved", default="score", choices=("score", "skip"), help="tasks that dense does not solve")
    parser.add_argument("--timed", default="", help="lengths of the timings, in tokens; none = no timing")
    parser.add_argument("--dense", default="sdpa", help="dense implementations to time: sdpa, fa2, cudnn, fa3")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no cell after this")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(words)
    split = lambda text, by=",": [part.strip() for part in text.split(by) if part.strip()]  # noqa: E731
    args.variants, args.scored = split(args.variants, ";"), split(args.scored, ";")
    args.tasks, args.texts, args.dense = split(args.tasks), split(args.texts), split(args.dense)
    args.timed = [int(length) for length in split(args.timed)]
    for spec in (*args.variants, *args.scored):
        variants.variant_named(variant(spec))
    if args.prepare and args.prompts is None:
        raise ValueError("prompts must name a folder to prepare, got none")
    return args


def parsed(spec: str) -> tuple[str, Budget]:
    name, _, budget = spec.partition(":")
    if name not in SELECTORS:
        raise ValueError(f"a variant must begin with one of {', '.join(SELECTORS)}, got {spec!r}")
    return name, Budget.parse(budget)


def variant(spec: str) -> str:
    """What `measure.variants` calls it: every field that it leaves out is the default of Budget, b_sel as well."""
    name, budget = parsed(spec)
    return f"{name}:{spelled(budget)}"


class Subject:
    """Model, tokenizer and indexer, loaded when the first cell needs them."""

    def __init__(self, args):
        self.args, self.asked = args, {}

    @cached_property
    def loaded(self) -> variants.Subject:
        names = [variant(spec) for spec in (*self.args.variants, *self.args.scored)]
        if needs_indexer(names) and self.args.adapter is None:
            raise ValueError("adapter must be named for variants of the indexer")
        return load_subject(self.args, names)

    def attach(self, spec: str):
        budget, selector = parsed(spec)[1], selector_of(variant(spec), self.loaded.indexer, self.args.seed)
        return SparsePrefill.attach(self.loaded.model, selector, budget, impl=self.args.impl)

    def questions(self, task: str) -> list[Forced]:
        if task not in self.asked:
            self.asked = {task: prompts_of(self.args, task, self.loaded.tokenizer)}
        return self.asked[task]


@cache
def documents(texts: tuple[str, ...]) -> list[tasks.Document]:
    return tasks.documents(texts)


def prompts_of(args, task: str, tokenizer) -> list[Forced]:
    """The prompts of a task with their answers: those in `args.prompts`, where they are kept, or made, and kept there."""
    haystack = {"haystack": documents(tuple(args.texts))} if task_named(task).needs == "haystack" else {}
    read = hashlib.sha256(json.dumps([len(tokenizer), tokenizer(SAMPLE)["input_ids"]]).encode())
    for document in haystack.get("haystack", ()):
        read.update(document.text.encode("utf-8", "surrogatepass"))
    identity = {"task": task, "length": args.length, "seed": args.seed, "question": args.question, "made of": read.hexdigest()}
    path = args.prompts and args.prompts / f"{task}-{args.length}-{args.question}-{args.seed}-{read.hexdigest()[:8]}.safetensors"
    kept = read_questions(path, identity) if path and path.exists() else []
    if len(kept) < args.count:
        options = dict(length=args.length, count=args.count, seed=args.seed, question=args.question)
        kept = [forced(tokenizer, example) for example in tasks.generate(task, tokenizer, **options, **haystack)]
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_questions(path, kept, identity)
    return kept[: args.count]


def prepare(args) -> int:
    from npu_sparse.checkpoints import load_tokenizer

    tokenizer = load_tokenizer(args.model)
    for task in args.tasks:
        say(f"{task}, {args.length} tokens: {len(prompts_of(args, task, tokenizer))} prompts")
    return 0


def score(subject: Subject, directory: Path, task: str, spec: str) -> dict:
    """One cell of quality: the samples of one task under one variant."""
    rows, asked = directory / "dense" / f"{task}.safetensors", subject.questions(task)
    rows.parent.mkdir(exist_ok=True)
    began = time.perf_counter()
    if spec == "dense" or not rows.exists():  # rows do not travel with a run: they are made again in less time
        samples, states = score_forced(subject.loaded.model, asked)
        write_states(rows, states)
    if spec != "dense":
        samples, _ = score_forced(subject.loaded.model, asked, lambda: subject.attach(spec), read_states(rows))
    mean = {name: sum(sample[name] for sample in samples) / len(samples) for name in ("right", "kl")}
    say(f"{task} {spec}: {100 * mean['right']:.1f} right, KL {mean['kl']:.4f}, {time.perf_counter() - began:.0f} s")
    evidence = evidence_of("dense" if spec == "dense" else variant(spec), subject.loaded.indexer)
    return {"samples": samples, **subject.loaded.inputs(), "evidence": evidence, "machine": machine(subject.args.device),
            "seconds": time.perf_counter() - began}  # fmt: skip


def timing(subject: Subject, length: int) -> dict:
    """One cell of timing: seconds of every variant and dense implementation, by round, at one length."""
    args, model = subject.args, subject.loaded.model
    texts = documents(tuple(args.texts))
    ((_, ids),) = text_prompts(subject.loaded.tokenizer, texts, length=length, count=1, seed=args.seed)
    names = [*(f"dense {name}" for name in args.dense), *args.variants]
    seconds, shuffled = {name: [] for name in names}, random.Random(args.seed)
    for turn in range(-2, args.rounds):
        gc.collect()
        for name in shuffled.sample(names, len(names)):
            dense = name.partition(" ")[2] if name.startswith("dense ") else None
            with running(model, dense) if dense else subject.attach(name):
                elapsed, _ = time_to_first_token(model, ids[None])
            if turn >= 0:
                seconds[name].append(elapsed)
    medians = {name: stats.summary(values)["median"] for name, values in seconds.items()}
    say(f"{length} tokens: " + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in medians.items()))
    release_memory(model.device)
    return {"seconds": seconds, **subject.loaded.inputs(), "machine": machine(args.device)}


def gaps_of(spec: str, scored: list[str]) -> dict[str, tuple[str, str]]:
    """Between which variants the gaps of a shared indexer lie: dense, the oracle and the indexer per query, and itself.

    The two per query are the first that were scored with the same exact end; their k is in their names.
    """
    if spec == "dense" or parsed(spec)[0] != "indexer" or parsed(spec)[1].block == 1:
        return {}
    alone = {}
    for other in scored:
        name, budget = parsed(other)
        if budget.block == 1 and budget.exact_last == parsed(spec)[1].exact_last:
            alone.setdefault(name, other)
    ends = {"dense": "dense", "indexer-shared": spec, **alone}
    return {gap: (ends[a], ends[b]) for gap, (a, b) in GAPS.items() if a in ends and b in ends}


def report(args, quality: Cells, timings: Cells) -> dict:
    """report.json of the cells that are there: a row a variant, means over the tasks that dense solves."""
    cells, timed = quality.records(), timings.records()
    by = {(cell["task"], cell["variant"]): cell["samples"] for cell in cells.values()}
    column = lambda task, spec, name: [sample[name] for sample in by[task, spec]]  # noqa: E731
    right = {task: sum(column(task, "dense", "right")) / args.count for task in args.tasks if (task, "dense") in by}
    solved = [task for task, share in right.items() if share > args.solved]
    rows = []
    for spec in ["dense", *args.scored, *args.variants]:
        done = [task for task in right if (task, spec) in by]
        row = {"variant": spec, "evidence": next((c["evidence"] for c in cells.values() if c["variant"] == spec), None)}
        row["tasks"] = {
            task: {name: stats.macro_mean([column(task, spec, name)]).to_dict() for name in ("right", "kl")} for task in done
        }
        if solved and set(solved) <= set(done):
            pick = lambda which, name: [column(task, which, name) for task in solved]  # noqa: E731
            row["right"] = stats.macro_mean(pick(spec, "right")).to_dict()
            row["kl"] = stats.macro_mean(pick(spec, "kl")).to_dict()
            row["over_dense"] = stats.macro_difference(pick("dense", "right"), pick(spec, "right")).to_dict()
            worst = min(solved, key=lambda task: row["tasks"][task]["right"]["value"] - right[task])
            row["worst"] = {"task": worst, "difference": row["tasks"][worst]["right"]["value"] - right[worst]}
            whole = [which for which in [*args.scored, *args.variants] if all((task, which) in by for task in solved)]
            row["gaps"] = {
                gap: stats.macro_difference(pick(before, "right"), pick(after, "right")).to_dict()
                for gap, (before, after) in gaps_of(spec, whole).items()
            }
        rows.append(row)
    clock = []
    for cell in timed.values():
        seconds = cell["seconds"]
        best = min((name for name in seconds if name.startswith("dense ")), key=lambda n: stats.summary(seconds[n])["median"])
        for name, values in seconds.items():
            clock.append({
                "length": cell["length"], "variant": name, "ttft_s": stats.summary(values), "best_dense": best,
                "speed_up": stats.ratio_of_medians(seconds[best], values).to_dict(),
            })  # fmt: skip
    everything = [*cells.values(), *timed.values()]
    for name in ("base", "adapter"):
        if any(cell[name] != everything[0][name] for cell in everything):
            raise ValueError(f"all cells of {quality.directory.parent} must have the same {name}: use another directory")
    return {
        "config": read_json(quality.directory.parent / "config.json"),
        "solved": solved,
        "rows": rows,
        "timings": clock,
        "machines": [json.loads(line) for line in dict.fromkeys(json.dumps(cell["machine"]) for cell in everything)],
        **{name: everything[0][name] if everything else None for name in ("base", "adapter")},
    }


def interval(estimate: dict | None, scale: float = 100, digits: int = 1) -> str:
    if estimate is None:
        return ""
    value, low, high = (scale * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def markdown(report: dict) -> str:
    config, lengths = report["config"], sorted({row["length"] for row in report["timings"]})
    clock = {(row["variant"], row["length"]): row for row in report["timings"]}
    lines = []
    for row in report["rows"]:
        line = {
            "prefill": row["variant"], "evidence": row["evidence"], "right (of 100)": interval(row.get("right")),
            "over dense": "" if row["variant"] == "dense" else interval(row.get("over_dense")),
            "KL (nats)": interval(row.get("kl"), 1, 4),
            "worst task": f"{row['worst']['task']} {100 * row['worst']['difference']:+.1f}" if "worst" in row else "",
        }  # fmt: skip
        for length in lengths:
            name = row["variant"]
            if name == "dense":
                name = next(r["best_dense"] for r in report["timings"] if r["length"] == length)
            timed = clock.get((name, length))
            line[f"TTFT {length} (ms)"] = f"{1e3 * timed['ttft_s']['median']:.1f}" if timed else ""
            line[f"over dense {length}"] = f"{timed['speed_up']['value']:.2f}x" if timed else ""
        lines.append(line)
    single = [
        {"prefill": row["variant"], **{
            task: f"{100 * value['right']['value']:.1f}, {value['kl']['value']:.4f}" for task, value in row["tasks"].items()
        }} for row in report["rows"]
    ]  # fmt: skip
    implementations = [
        {"length": row["length"], "dense": row["variant"], "TTFT (ms)": f"{1e3 * row['ttft_s']['median']:.1f}"}
        for row in report["timings"] if row["variant"].startswith("dense ")
    ]  # fmt: skip
    place = config.get("question", "end")  # runs of before had no other
    where = "" if place == "end" else f", the question {'in' if place == 'middle' else 'at'} the {place}"
    text = (
        f"# Quality and TTFT of the same path\n\n{config['model']}, {config['dtype']}. Quality: teacher-forced, "
        f"{config['length']} tokens, {config['count']} prompts a task{where}, means over "
        f"{', '.join(report['solved']) or 'no task that dense solves'}; 95% "
        f"bootstrap intervals, differences paired. TTFT: batch 1, {config['rounds']} interleaved rounds, medians; dense is the "
        f"fastest of {', '.join(config['dense'])}.\n\n{markdown_table(lines)}\n## Single tasks (right of 100, KL in nats)\n\n"
        f"{markdown_table(single)}\n"
    )
    if implementations:
        text += f"## Dense implementations\n\n{markdown_table(implementations)}\n"
    return text + "".join(f"Measured on {machine_line(line)}.\n" for line in report["machines"])


MARKERS = "osv^DPX*h"


def figure(report: dict):
    """Quality against TTFT at the length that was scored, a point a variant, and speed-ups over the fastest dense by length."""
    length = report["config"]["length"]
    shown, axes = new_figure(columns=2, width=4.6, height=4.4)
    quality, speed = axes[0]
    clock = {(row["variant"], row["length"]): row for row in report["timings"]}
    best = next((row["best_dense"] for row in report["timings"] if row["length"] == length), None)
    for number, row in enumerate(report["rows"]):
        if "right" not in row:
            continue
        score = {name: 100 * value for name, value in row["right"].items()}
        dense = row["variant"] == "dense"
        timed = clock.get((best if dense else row["variant"], length))
        marker, shade = MARKERS[number % len(MARKERS)], 1 - 0.12 * number
        style = dict(color=PALETTE[row["evidence"]], alpha=1.0 if dense else max(0.4, shade))
        label = f"{row['variant']} ({row['evidence']})" if not dense else f"{best or 'dense'}"
        if timed is None:
            quality.axhline(score["value"], linewidth=1, linestyle="--", label=label, **style)
        else:
            spread = [[score["value"] - score["low"]], [score["high"] - score["value"]]]
            place = ([1e3 * timed["ttft_s"]["median"]], [score["value"]])
            quality.errorbar(*place, yerr=spread, fmt=marker, capsize=2, label=label, **style)
        line = sorted((key[1], timing["speed_up"]["value"]) for key, timing in clock.items() if key[0] == row["variant"])
        if line:
            speed.plot(*zip(*line), marker=marker, linewidth=1, **style)
    quality.set_xlabel(f"TTFT at {length} tokens (ms)")
    quality.set_ylabel(f"answers right, teacher-forced, {length} tokens (of 100)")
    speed.axhline(1.0, color=PALETTE["dense"], linewidth=1)
    speed.set_xscale("log", base=2)
    speed.set_xlabel("prompt (tokens)")
    speed.set_ylabel("TTFT of the fastest dense / TTFT")
    shown.legend(loc="outside lower center", fontsize=7, frameon=False)
    return shown


def config_of(args) -> dict:
    """What decides a run's figures: its config.json."""
    changes_none = ("output", "seconds", "prompts", "prepare")
    return {"stage": "matched", **{name: value for name, value in vars(args).items() if name not in changes_none}}


def cells_of(args) -> tuple[Cells, Cells]:
    """The cells of quality and of timing that a run consists of, in the order in which they are done."""
    specs = ["dense", *args.scored, *args.variants]
    quality = Cells(args.output / "quality", {
        f"{task}-{number}": {"task": task, "variant": spec} for task in args.tasks for number, spec in enumerate(specs)
    })  # fmt: skip
    return quality, Cells(args.output / "timings", {str(length): {"length": length} for length in args.timed})


def left(args) -> list[tuple[str, str]]:
    """The cells that are to be done, `("timings" or "quality", name)`: `--unsolved skip` leaves out what dense does not solve."""
    quality, timings = cells_of(args)
    unsolved = set()
    for name, cell in quality.identities.items():
        if args.unsolved == "skip" and cell["variant"] == "dense" and quality.done(name):
            samples = quality.read(name)["samples"]
            if sum(sample["right"] for sample in samples) <= args.solved * len(samples):
                unsolved.add(cell["task"])
    scored = [name for name in quality.missing() if quality.identities[name]["task"] not in unsolved]
    return [("timings", name) for name in timings.missing()] + [("quality", name) for name in scored]


def main(words=None, *, started: float = STARTED) -> int:
    """Exit status of a run, 3 where cells are left."""
    args = arguments(words)
    if args.prepare:
        return prepare(args)
    upgrade = lambda stored: {"question": "end", "unsolved": "score", **stored}  # noqa: E731  # runs of before had no other
    directory = open_run(args.output, config_of(args), upgrade=upgrade)
    quality, timings = cells_of(args)
    subject = Subject(args)
    while time.monotonic() - started < args.seconds and (todo := left(args)):
        kind, name = todo[0]
        if kind == "timings":
            timings.write(name, timing(subject, int(name)))
        else:
            quality.write(name, score(subject, directory, *quality.identities[name].values()))
    result = report(args, quality, timings)
    write_json(directory / "report.json", result)
    write_text(directory / "report.md", markdown(result))
    write_figure(directory / "report.png", figure(result))
    waiting = len(left(args))
    print((directory / "report.md").read_text() + (f"{waiting} cells are left: run the same command again\n" if waiting else ""))
    return 3 if waiting else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
