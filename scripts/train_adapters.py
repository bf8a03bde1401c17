#!/usr/bin/env python3
"""Distils the adapters that ship with npu-sparse, side by side where there are several GPUs.

    python scripts/train_adapters.py --out runs/adapters --only qwen2.5-coder-0.5b

Each run is one `npu-sparse distill` with the options below: called again, it resumes. The texts are the Debian packages
`anarchism` and `python3.11-doc`. Each run takes about five minutes on one H200; the reports are in docs/results/distill-*.
scripts/matched.py chose the budgets that the adapters of the two Qwens recommend.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

COMMON = {
    "texts": "anarchism,python3.11-doc",
    "tasks": "niah_single_1,niah_single_2,niah_multikey_1,niah_multikey_2,niah_multivalue,vt",
    "lengths": "1024,2048,4096",
    "tokens": 16384,
    "micro_batch": 16,
    "rows": 512,
    "segment": 256,
    "warmup": 100,
    "validation_prompts": 12,
    "validate_every": 250,
    "save_every": 100,
    "loss": "kl",
    "dim": 128,
}
RUNS = {
    "smollm2-135m": {"heads": 1, "steps": 900, "partition_steps": 0},
    "gemma3-270m": {"heads": 4, "steps": 1000, "partition_steps": 0},
    "qwen2.5-coder-0.5b": {
        "heads": 1, "steps": 500, "texts": "anarchism", "tasks": f"{COMMON['tasks']},niah_multiquery,fwe",
        "lengths": "2048,8192,16384", "tokens": 32768, "warmup": 50, "validation_length": 8192, "validation_prompts": 8,
        "budgets": "256,512,1024", "validate_every": 500, "save_every": 250,
    },
    "qwen2.5-coder-1.5b": {
        "heads": 1, "steps": 450, "texts": "anarchism", "tasks": f"{COMMON['tasks']},niah_multiquery,fwe",
        "lengths": "2048,8192,16384,32768", "tokens": 32768, "warmup": 50, "validation_length": 8192, "validation_prompts": 8,
        "budgets": "256,512,1024,2048", "validate_every": 450, "save_every": 150,
    },
}  # fmt: skip


def command(name: str, device: str, out: Path) -> list[str]:
    options = {**COMMON, **RUNS[name], "device": device, "output": out / name, "workers": 6}
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "npu_sparse", "distill", name, *flags]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/adapters"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", choices=RUNS, action="append", help="an adapter to distil; repeat it for several; default: all")
    args = parser.parse_args()
    running = []
    for place, name in enumerate(args.only or RUNS):
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        if args.device == "cuda":
            import torch

            environment["CUDA_VISIBLE_DEVICES"] = str(place % torch.cuda.device_count())
        running.append(subprocess.Popen(command(name, args.device, args.out), env=environment))
    return max(process.wait() for process in running)


if __name__ == "__main__":
    sys.exit(main())
