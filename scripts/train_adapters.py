#!/usr/bin/env python3
"""Distils the adapters that ship with npu-sparse, one run per GPU, several at once; and says how long a step takes first.

    python scripts/train_adapters.py --out runs/adapters --seconds 360

Every run is `npu-sparse distill` with the options below, resumes when called again, and keeps its config and report. The
number of steps is what fits into --seconds on this machine, from a probe; it is part of the run's config.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMON = {
    "texts": "anarchism,python3.11-doc",
    "tasks": "niah_single_1,niah_single_2,niah_multikey_1,niah_multikey_2,niah_multivalue,vt",
    "lengths": "1024,2048,4096",
    "tokens": 16384,
    "micro_batch": 16,
    "rows": 512,
    "segment": 256,
    "validation_prompts": 12,
    "validate_every": 250,
    "save_every": 50,
    "device": "cuda",
}
RUNS = {
    "smollm2-h4d64-both": {"model": "smollm2-135m", "heads": 4, "dim": 64, "loss": "both"},
    "smollm2-h4d64-kl": {"model": "smollm2-135m", "heads": 4, "dim": 64, "loss": "kl"},
    "gemma3-h4d128-kl": {"model": "gemma3-270m", "heads": 4, "dim": 128, "loss": "kl"},
    "smollm2-h1d128-kl": {"model": "smollm2-135m", "heads": 1, "dim": 128, "loss": "kl"},
}


def command(options: dict, output: Path) -> list[str]:
    options = {**COMMON, **options}
    arguments = [sys.executable, "-m", "npu_sparse", "distill", options.pop("model"), "--output", str(output), "--workers", "6"]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments


def start(gpu: int, options: dict, output: Path, log: Path) -> subprocess.Popen:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(command(options, output), env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)


def step_seconds(gpu: int, options: dict, out: Path) -> subprocess.Popen:
    probe = {**options, "steps": 40, "warmup": 5, "validate_every": 1000, "validation_prompts": 1, "save_every": 10}
    return start(gpu, probe, out, out.with_suffix(".log"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/adapters"))
    parser.add_argument("--seconds", type=float, default=360.0)
    parser.add_argument("--steps", type=int, default=None, help="for every run; no probe then")
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--gpus", type=int, default=None)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    import torch

    gpus = args.gpus or torch.cuda.device_count()
    steps_file = args.out / "steps.json"
    steps = json.loads(steps_file.read_text()) if steps_file.exists() else {}
    for first in range(0, len(args.runs), gpus):
        wave = args.runs[first : first + gpus]
        steps.update({name: args.steps for name in wave if args.steps})
        unknown = [name for name in wave if name not in steps]
        probes = {name: step_seconds(wave.index(name), RUNS[name], args.out / f"probe-{name}") for name in unknown}
        for name, process in probes.items():
            process.wait()
            records = (args.out / f"probe-{name}" / "metrics.jsonl").read_text().splitlines()
            per_step = statistics.mean(json.loads(record)["seconds"] for record in records[10:])
            steps[name] = max(50, int(args.seconds / per_step) // 50 * 50)
            print(f"{name}: {per_step:.3f} s a step -> {steps[name]} steps", flush=True)
        steps_file.write_text(json.dumps(steps))
        started = time.time()
        running = {
            name: start(gpu, {**RUNS[name], "steps": steps[name], "warmup": min(100, steps[name] // 10)},
                        args.out / name, args.out / f"{name}.log")
            for gpu, name in enumerate(wave)
        }  # fmt: skip
        for name, process in running.items():
            print(f"{name}: exit {process.wait()} after {time.time() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
