#!/usr/bin/env python3
"""Runs everything that needs an Ascend card - build, tests, time to first token, profiler - and packs a report to send back.

    python scripts/npu_suite.py --output runs/npu

Each step is a process of its own; its log and its results are in a folder of its name. A step that has succeeded is not run
again: the same command goes on after an interruption or a failure, and steps that cannot run do not keep the others from it.
--only names steps; --list shows them with the commands and their time limits.

At the end runs/npu.tar.gz holds all logs, reports and profiles except files over 32 MiB, which manifest.json names. It contains
nothing of your models or prompts. Look through it, and attach it to an issue.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 32 << 20  # the largest file that the report takes
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rfEs")


@dataclass(frozen=True)
class Step:
    """One command; `{out}` in it is the step's folder. `limit_s`: after which it is stopped."""

    name: str
    command: tuple[str, ...]
    limit_s: int


def ttft(*options: str) -> tuple[str, ...]:
    script = str(ROOT / "scripts" / "ttft_qwen35.py")
    return (sys.executable, script, "--device", "npu", "--sparse", "1024:64", *options, "--output", "{out}/run")


STEPS = (
    Step("machine", (sys.executable, "-m", "npu_sparse.doctor", "--json"), 60),
    Step("card", ("npu-smi", "info"), 60),
    Step("build", (sys.executable, "-m", "npu_sparse", "build", "npu"), 1800),
    Step("tests", (*PYTEST, "tests/ops", "--backend", "npu"), 3600),
    Step("tests-prefill", (*PYTEST, "tests/prefill/test_backends.py", "--backend", "npu"), 1800),
    Step("ttft", ttft("--lengths", "32768,65536,131072", "--runs", "10"), 3600),
    Step("ttft-chunks", ttft("--lengths", "131072", "--chunk", "4096", "--runs", "5"), 3600),
    Step("profile", ttft("--lengths", "32768", "--runs", "1", "--warmup", "1", "--profile", "{out}/profile"), 1800),
)


def run(step: Step, directory: Path) -> dict:
    """`{"rc": exit status or a word, "seconds": ..}` of one step, which is kept in the step's folder."""
    out = directory / step.name
    out.mkdir(parents=True, exist_ok=True)
    command = [part.replace("{out}", str(out)) for part in step.command]
    environment = {**os.environ, "NPU_SPARSE_REQUIRE": "npu", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    began = time.time()
    try:
        with open(out / "log", "w") as log:
            ran = subprocess.run(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                timeout=step.limit_s,
            )  # fmt: skip
        rc = ran.returncode
    except subprocess.TimeoutExpired:
        rc = f"stopped after {step.limit_s} s"
    except FileNotFoundError:
        rc = f"needs {command[0]}"
    status = {"rc": rc, "seconds": round(time.time() - began, 1)}
    (out / "status.json").write_text(json.dumps(status) + "\n")
    return status


def is_done(step: Step, directory: Path) -> bool:
    path = directory / step.name / "status.json"
    return path.exists() and json.loads(path.read_text())["rc"] == 0


def pack(directory: Path, steps: list[Step]) -> Path:
    """The report: every file of the steps that is not too large, and a manifest of how the steps ended."""
    files = sorted(path for step in steps for path in (directory / step.name).rglob("*") if path.is_file())
    large = {str(path.relative_to(directory)): path.stat().st_size for path in files if path.stat().st_size > MOST_BYTES}
    status = {step.name: directory / step.name / "status.json" for step in steps}
    manifest = {
        "steps": {name: json.loads(path.read_text()) if path.exists() else None for name, path in status.items()},
        "commands": {step.name: " ".join(step.command).replace(str(ROOT), ".") for step in steps},
        "left_out_bytes": large,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    packed = directory.with_name(f"{directory.name}.tar.gz")
    unfinished = packed.with_name(f".{packed.name}.{os.getpid()}")
    with tarfile.open(unfinished, "w:gz") as archive:
        for path in (directory / "manifest.json", *files):
            if str(path.relative_to(directory)) not in large:
                archive.add(path, arcname=f"{directory.name}/{path.relative_to(directory)}", recursive=False)
    unfinished.replace(packed)
    return packed


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/npu"))
    parser.add_argument("--only", help="steps, separated by commas")
    parser.add_argument("--list", action="store_true", help="show the steps and end")
    args = parser.parse_args(arguments)
    names = args.only.split(",") if args.only else [step.name for step in STEPS]
    if unknown := sorted(set(names) - {step.name for step in STEPS}):
        raise ValueError(f"only must name steps among {', '.join(step.name for step in STEPS)}, got {unknown[0]!r}")
    chosen = [step for step in STEPS if step.name in names]
    if args.list:
        for step in chosen:
            print(f"{step.name}: {' '.join(step.command)} (at most {step.limit_s} s)")
        return 0
    for step in chosen:
        if not is_done(step, args.output):
            status = run(step, args.output)
            print(f"{step.name}: {status['rc']} in {status['seconds']} s", flush=True)
    failed = [step.name for step in chosen if not is_done(step, args.output)]
    print(f"{len(chosen) - len(failed)} of {len(chosen)} steps done" + (f"; not done: {', '.join(failed)}" if failed else ""))
    print(f"the report to send back is {pack(args.output, list(STEPS))}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
