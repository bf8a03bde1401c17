#!/usr/bin/env python3
"""Runs everything that needs an NVIDIA GPU - tests, race and memory checks, benchmarks - in one command that can be interrupted.

    python scripts/gpu_suite.py --output runs/gpu

Each step is a process of its own on one GPU, as many at a time as there are GPUs; its log and its results are in a folder of its
name. A step that has succeeded is not run again: the same command goes on after an interruption or a failure. --only names
steps; --list shows them with the commands and their time limits.

It needs this package with pytest and hypothesis, flash-linear-attention and fa3-fwd beside a CUDA build of torch; the checks need
compute-sanitizer. On one H100 the whole takes about 20 minutes.
"""

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short")
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all", "--tool")
# small sizes that use every kernel
CHECKED = "deterministic or (unlucky and 1) or (reads_no_key and not deterministic)"


@dataclass(frozen=True)
class Step:
    """One command; `{out}` in it is the step's folder. `limit_s`: after which it is stopped."""

    name: str
    command: tuple[str, ...]
    limit_s: int
    needs: str = ""  # a program on the PATH


def scripts(name: str, *options: str) -> tuple[str, ...]:
    return (sys.executable, str(ROOT / "scripts" / f"{name}.py"), *options, "--output", "{out}/run")


def parallel(*options: str) -> tuple[str, ...]:
    """pytest over several processes where pytest-xdist is installed: most of the time goes into compiling kernels."""
    try:
        import xdist  # noqa: F401
    except ImportError:
        return (*PYTEST, *options)
    return (*PYTEST, "-n", str(min(12, os.cpu_count() or 1)), *options)


SHORT = "4096,8192,16384,32768"


def ttft(size: str, sparse: str, runs: str, budget_s: int, *options: str, lengths="32768,65536,131072,262144") -> tuple[str, ...]:
    return scripts(
        "ttft_qwen35", "--device", "cuda", "--size", size, "--sparse", sparse, "--runs", runs, "--warmup", "1",
        "--budget-s", str(budget_s), "--lengths", lengths, *options,
    )  # fmt: skip


STEPS = (
    Step("tests", parallel("tests/ops", "tests/models/hybrid", "-k", "cuda or test_hopper"), 420),
    Step("tests-models", parallel("tests/prefill/test_backends.py", "tests/test_selectors.py", "-k", "cuda"), 300),
    Step("memcheck", (*SANITIZER, "memcheck", *PYTEST, "tests/ops/test_hopper.py", "-k", CHECKED), 300, "compute-sanitizer"),
    Step("racecheck", (sys.executable, str(ROOT / "scripts" / "racecheck.py")), 620, "compute-sanitizer"),
    Step("ops", scripts("bench_ops", "--dense", "fa2,cudnn,fa3,flex", "--oracle"), 240),
    Step("ops-9b", scripts("bench_ops", "--shape", "qwen3.5-9b", "--sparse", "2048:64,2048:16"), 180),
    Step("ops-distilled", scripts("bench_ops", "--adapter", "smollm2-135m", "--checkpoint", "smollm2-135m"), 180),
    Step("hybrid", scripts("profile_hybrid", "--sizes", "0.8b", "--lengths", "32768,131072"), 240),
    Step("ttft-0.8b", ttft("0.8b", "2048:64,2048:16", "4096=10,131072=5,262144=3", 540), 580),
    Step("ttft-9b", ttft("9b", "2048:64", "4096=5,131072=3", 560), 590),
    Step("ttft-0.8b-chunks", ttft("0.8b", "2048:64", "5", 200, "--chunk", "4096", "--dense", "fa2,fa3", lengths="131072"), 240),
    Step("ttft-0.8b-stock", ttft("0.8b", "2048:64", "3", 200, "--hybrid", "stock", lengths="131072"), 240),
    Step("crossover", ttft("0.8b", "2048:64", "10", 200, "--crossover", "{out}/crossover.json", lengths=SHORT), 240),
)


def run(step: Step, directory: Path, gpu: str) -> dict:
    """`{"rc": exit status or a word, "seconds": ..}` of one step, which is kept in the step's folder."""
    out = directory / step.name
    out.mkdir(parents=True, exist_ok=True)
    if step.needs and shutil.which(step.needs) is None:
        status = {"rc": f"needs {step.needs}", "seconds": 0.0}
    else:
        command = [part.replace("{out}", str(out)) for part in step.command]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        began = time.time()
        with open(out / "log", "w") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            try:
                rc = process.wait(step.limit_s)
            except subprocess.TimeoutExpired:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                rc = f"stopped after {step.limit_s} s"
        status = {"rc": rc, "seconds": round(time.time() - began, 1)}
    (out / "status.json").write_text(json.dumps(status) + "\n")
    return status


def is_done(step: Step, directory: Path) -> bool:
    path = directory / step.name / "status.json"
    return path.exists() and json.loads(path.read_text())["rc"] == 0


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name, one GPU each."""
    if stated := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return stated.split(",")
    import torch

    return [str(n) for n in range(torch.cuda.device_count())]


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--only", help="steps, separated by commas")
    parser.add_argument("--list", action="store_true", help="show the steps and end")
    args = parser.parse_args(arguments)
    names = args.only.split(",") if args.only else [step.name for step in STEPS]
    unknown = sorted(set(names) - {step.name for step in STEPS})
    if unknown:
        raise ValueError(f"only must name steps among {', '.join(step.name for step in STEPS)}, got {unknown[0]!r}")
    chosen = [step for step in STEPS if step.name in names]
    if args.list:
        for step in chosen:
            print(f"{step.name}: {' '.join(step.command)} (at most {step.limit_s} s)")
        return 0
    free: queue.Queue[str] = queue.Queue()
    for gpu in gpus():
        free.put(gpu)
    if free.empty():
        raise RuntimeError("no CUDA device is visible")
    todo = [step for step in chosen if not is_done(step, args.output)]

    def work(step: Step) -> None:
        gpu = free.get()
        try:
            status = run(step, args.output, gpu)
            print(f"{step.name}: {status['rc']} in {status['seconds']} s on GPU {gpu}", flush=True)
        finally:
            free.put(gpu)

    threads = [threading.Thread(target=work, args=(step,)) for step in todo]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [step.name for step in chosen if not is_done(step, args.output)]
    print(f"{len(chosen) - len(failed)} of {len(chosen)} steps done" + (f"; not done: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
