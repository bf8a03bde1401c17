#!/usr/bin/env python3
"""Which weights make the model of npu_sparse.schedule.candidates rank what was fast in a report of bench_polybench.py first?

    python scripts/fit_candidates.py docs/results/polybench/report.json

Fits the logarithm of each candidate's speedup over the mean of its kernel's candidates by ridge regression, in CPU time of the
first measurement. What is slower than the best by more than a factor of 4.5 counts as by that: how bad a bad choice is does not
matter. Prints, for the first n choices of a ranking, the geometric mean over the kernels of the best speedup among them and the
original, each kernel ranked by a model fitted without it; then writes weights.yaml, fitted with all kernels.
"""

import argparse
from pathlib import Path
from statistics import geometric_mean

import numpy as np
import yaml

from npu_sparse.runs.store import read_json, write_text
from npu_sparse.schedule import kernels
from npu_sparse.schedule.candidates import FEATURES, WEIGHTS, Choice, features
from npu_sparse.schedule.dependences import dependences
from npu_sparse.schedule.frontend.c import parse_c

WORST, RIDGE = 1.5, 1.0
REPORT = {"kernels": [{"kernel": str, "tuning": {"original": {"cpu_s": [float]}, str: {"cpu_s": [float]}}}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    report = read_json(arguments.report, REPORT)
    speedups = {record["kernel"]: _speedups(record) for record in report["kernels"]}
    choices = list(dict.fromkeys(choice for ratios in speedups.values() for choice in ratios))
    described, distinct = {}, {}
    for name in speedups:
        described[name], distinct[name] = _describe(name, choices)
        print(f"{name}: {len(distinct[name])} of {len(described[name])} choices differ", flush=True)
    reached = {}
    for name in speedups:
        weights = _fit(choices, described, speedups, without=name)
        reached[name] = _reached(name, weights, choices, described, distinct, speedups)
    for n in (1, 2, 4, 6, 8):
        print(f"best of the first {n}: {geometric_mean(ratios[:n][-1] for ratios in reached.values()):.3g}x")
    print(f"best of all: {geometric_mean(max(1, *ratios.values()) for ratios in speedups.values()):.3g}x")
    weights = _fit(choices, described, speedups, without="").round(3).tolist()
    values = {"features": dict(zip(FEATURES, weights)), "choices": dict(zip(choices, weights[len(FEATURES) :]))}
    head = "# Made by scripts/fit_candidates.py from a report of scripts/bench_polybench.py: logarithms of speedups.\n"
    write_text(arguments.output, head + yaml.safe_dump(values, sort_keys=False, width=120))


def _speedups(record: dict) -> dict[str, float]:
    times = {key: min(timing["cpu_s"]) for key, timing in record["tuning"].items()}
    base = times.pop("original")
    return {key: base / seconds for key, seconds in times.items() if not key.startswith(("polycc", "Polly", "clang"))}


def _describe(name: str, choices: list[str]) -> tuple[dict[str, list[float]], list[str]]:
    """Features of each choice, and the choices that schedule a kernel as no earlier one does."""
    scop = parse_c(Path(next(iter(kernels.__path__))) / f"{name}.c")
    known, seen, described = dependences(scop), {}, {}
    for choice in choices:
        try:
            tree = Choice.parse(choice).tree(scop, known)
        except ValueError:
            continue
        seen.setdefault(str(tree), choice)
        described[choice] = features(scop, tree)
    return described, list(seen.values())


def _vector(choice: str, choices: list[str], described: dict) -> np.ndarray:
    return np.array([*described[choice], *(choice == other for other in choices)], dtype=float)


def _fit(choices: list[str], described: dict, speedups: dict, without: str) -> np.ndarray:
    rows, targets = [], []
    for name, ratios in speedups.items():
        if name != without:
            known = [choice for choice in ratios if choice in described[name]]
            x = np.array([_vector(choice, choices, described[name]) for choice in known])
            y = np.log([ratios[choice] for choice in known])
            y = np.maximum(y, y.max() - WORST)
            rows.append(x - x.mean(0))
            targets.append(y - y.mean())
    x, y = np.concatenate(rows), np.concatenate(targets)
    return np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y)


def _reached(name: str, weights, choices, described, distinct, speedups) -> list[float]:
    """The best speedup, or 1, among the first n choices of a ranking, for n = 1, 2, ..."""
    order = sorted(distinct[name], key=lambda choice: -float(_vector(choice, choices, described[name]) @ weights))
    best, reached = 1.0, []
    for choice in order:
        best = max(best, speedups[name].get(choice, 0))
        reached.append(best)
    return reached


if __name__ == "__main__":
    main()
