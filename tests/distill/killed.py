"""Distils once without trouble and several times with kills, for test_killed.py: `killed.py config.json RUNS`.

    RUNS/whole          a run that nothing disturbed
    RUNS/random         killed with SIGKILL after some record of metrics.jsonl, again and again, and then left alone
    RUNS/write-N        killed just before its N-th file is put in place, and then left alone
Every attempt is a process of its own, forked from one that has loaded the model on a single thread.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401, once for all attempts
import torch

from npu_sparse import checkpoints
from npu_sparse.distill import DistillConfig, run_distill

ATTEMPTS, WRITES = 5, (2, 3, 4, 6, 8)
LONGEST_STEP_S = 0.05


def begin(config: DistillConfig, loaded: tuple, output: Path, kill_at_write: int = 0) -> int:
    """The id of a new process that distils, and exits with 0 when it is done."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if kill_at_write:
            kill_before_replacing(kill_at_write)
        model, tokenizer = loaded
        run_distill(config, output, model=model, tokenizer=tokenizer, progress=False)
        status = 0
    finally:
        os._exit(status)


def kill_before_replacing(count: int) -> None:
    replace, seen = os.replace, []

    def counting(source, target):
        seen.append(target)
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = counting


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def records(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def kill_somewhere(child: int, output: Path, rng: random.Random) -> int:
    """Kills after one to four more records and a moment; the child's exit status."""
    goal = records(output) + rng.randint(1, 4)
    while records(output) < goal:
        if ended := os.waitpid(child, os.WNOHANG)[0]:
            return ended
        time.sleep(0.002)
    time.sleep(rng.uniform(0, LONGEST_STEP_S))
    os.kill(child, signal.SIGKILL)
    return end(child)


def main(config_file: str, runs: str) -> None:
    config = DistillConfig(**json.loads(Path(config_file).read_text()))
    rng, folder = random.Random(0), Path(runs)
    torch.set_num_threads(1)
    loaded = checkpoints.load(config.model, dtype=config.dtype, progress=False)
    deaths = {"whole": [end(begin(config, loaded, folder / "whole"))]}
    output = folder / "random"
    deaths["random"] = [kill_somewhere(begin(config, loaded, output), output, rng) for _ in range(ATTEMPTS)]
    deaths["random"].append(end(begin(config, loaded, output)))
    for count in WRITES:
        output = folder / f"write-{count}"
        deaths[output.name] = [
            end(begin(config, loaded, output, kill_at_write=count)), end(begin(config, loaded, output))
        ]  # fmt: skip
    (folder / "deaths.json").write_text(json.dumps(deaths))


if __name__ == "__main__":
    main(*sys.argv[1:])
