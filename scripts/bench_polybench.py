#!/usr/bin/env python3
"""How much faster do the thirty PolyBench problems run under each strategy, against gcc -O3 and against isl's own scheduler?

    python scripts/bench_polybench.py --output runs/polybench --threads 2

Every scheduler gets the same tile sizes to choose from (--tiles; "0" is untiled): each candidate runs --tuning times beside the
original, the fastest is measured again, interleaved with the original and with the other schedulers' choices, --repeats times;
only that second measurement is reported. "tuned" is the best of the original and of the five candidates in TUNED, chosen in the
first measurement too. The baseline is the sequential original under gcc -O3 -march=native -fopenmp -ffp-contract=off. isl's own
scheduler goes through the same code generator. Every run's live-out arrays are compared bit by bit with the original's; a
candidate that differs, cannot be generated or does not end is listed under failures and wins nothing.

--polybench DIR takes the kernels from PolyBench/C 4.2 sources instead of those of the package. Kernels that are finished are in
records/ and are not measured again. Prints a table; writes report.json, report.md and report.png to --output.
"""

import argparse
import json
import math
import re
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, geometric_mean

import yaml

from npu_sparse.runs.figures import new_figure, write_figure
from npu_sparse.runs.machine import machine as this_machine
from npu_sparse.runs.machine import machine_line
from npu_sparse.runs.page import markdown_table, say
from npu_sparse.runs.store import open_run, write_json, write_text
from npu_sparse.schedule import config
from npu_sparse.schedule import kernels as shipped_kernels
from npu_sparse.schedule.c.print import generate_file
from npu_sparse.schedule.c.run import FLAGS, run
from npu_sparse.schedule.config import Tiling
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.frontend.preprocess import run_cpp
from npu_sparse.schedule.isl_baseline import isl_tree, mark_parallel
from npu_sparse.schedule.plan import original
from npu_sparse.schedule.scheduler import schedule

ISL, PARALLEL = "isl's scheduler", "original, parallel"
STRATEGIES = ("pluto", "pluto-plus", "feautrier", "isl", "tensor-scheduler", "cpu-vector")
TUNED = (("pluto", "32"), ("pluto", "32,32,256/4"), ("cpu-vector", "0"), ("cpu-vector", "32,32,256/4"), (PARALLEL, "0"))
SCALARS = {"alpha": 1.5, "beta": 1.2, "float_n": 1000.0}

# What kernels take from the utilities of PolyBench; each program is made of copies, of which the linker keeps one.
ALLOCATE = """void *polybench_alloc_data(unsigned long long int n, int size) { return malloc(n * size); }
void polybench_free_data(void *data) { free(data); }
"""


@dataclass(frozen=True)
class Kernel:
    """A C file with `init_<name>` and `kernel_<name>`, and values for the scalar arguments."""

    name: str
    text: str
    values: dict


def main() -> None:
    arguments = _arguments()
    kernels = polybench(arguments.polybench, arguments.size) if arguments.polybench else shipped(arguments.size)
    wanted = arguments.kernels or list(kernels)
    unknown = sorted(set(wanted) - set(kernels))
    if unknown:
        raise SystemExit(f"error: --kernels must be of {', '.join(kernels)}, got {', '.join(unknown)}")
    settings = {key: str(value) for key, value in vars(arguments).items() if key != "output"}
    settings |= {"flags": " ".join(FLAGS), "gcc": _gcc("-dumpfullversion").strip()}
    directory = open_run(arguments.output, settings)
    (directory / "records").mkdir(exist_ok=True)
    records = []
    for name in wanted:
        path = directory / "records" / f"{name}.json"
        if not path.exists():
            say(f"{name} ...")
            write_json(path, measure(kernels[name], arguments))
        records.append(json.loads(path.read_text()))
    _report(directory, settings, records, (*arguments.strategies, PARALLEL, ISL))


def measure(kernel: Kernel, arguments) -> dict:
    """Times, speedups and failures of one kernel."""
    scop = parse_c(kernel.text)
    sources, seconds, failures = {"original": kernel.text}, {}, []
    tiles = list(dict.fromkeys([*arguments.tiles, *(tile for _, tile in TUNED)]))
    for scheduler in (*arguments.strategies, PARALLEL, ISL):
        for tile in tiles if scheduler != PARALLEL else ["0"]:
            if tile not in arguments.tiles and (scheduler, tile) not in TUNED:
                continue
            start = time.perf_counter()
            try:
                sources[f"{scheduler} {tile}"] = candidate(scop, kernel.text, scheduler, tile)
                seconds[f"{scheduler} {tile}"] = time.perf_counter() - start
            except ValueError as error:
                failures.append(f"{scheduler} {tile}: {error}")
    first, failed = _timed(scop, sources, kernel.values, arguments, arguments.tuning)
    failures += failed
    best = {}
    for scheduler in (*arguments.strategies, PARALLEL, ISL):
        found = [key for key in first if key.rpartition(" ")[0] == scheduler and key.rpartition(" ")[2] in arguments.tiles]
        best[scheduler] = min(found, key=lambda key: min(first[key]["wall_s"])) if found else None
    allowed = ["original", *(f"{scheduler} {tile}" for scheduler, tile in TUNED)]
    best["tuned"] = min((key for key in allowed if key in first), key=lambda key: min(first[key]["wall_s"]))
    chosen = {key: sources[key] for key in dict.fromkeys(["original", *filter(None, best.values())])}
    final, failed = _timed(scop, chosen, kernel.values, arguments, arguments.repeats)
    failures += failed
    speedup = {}
    for scheduler, key in best.items():
        speedup[scheduler] = final["original"]["wall"] / final[key]["wall"] if key in final else None
    return {
        "kernel": kernel.name, "original_s": final["original"]["wall"], "chosen": best, "speedup": speedup, "times": final,
        "tuning": first, "generation_s": seconds, "failures": sorted(set(failures)),
    }  # fmt: skip


def candidate(scop, text: str, scheduler: str, tile: str) -> str:
    """C of one scheduler with tiles "0" (untiled), "32", or "32,32,256/4" with an unroll-and-jam factor."""
    sizes, _, jam = tile.partition("/")
    sizes = tuple(int(size) for size in sizes.split(",") if int(size))
    if scheduler == PARALLEL:
        return generate_file(scop, text, mark_parallel(scop, original(scop).tree()))
    if scheduler == ISL:
        return generate_file(scop, text, isl_tree(scop, sizes))
    settings = config.load(scheduler)
    return generate_file(scop, text, schedule(scop, replace(settings, tiling=Tiling(sizes, 2, True, int(jam or 0)))).tree())


def _timed(scop, sources: dict[str, str], values: dict, arguments, repeats: int) -> tuple[dict, list[str]]:
    """`(times of the variants that computed the right thing, failures)`; a variant that breaks the program runs alone."""
    failures, groups = [], [sources]
    found = {}
    while groups:
        group = groups.pop()
        try:
            results = run(scop, group, values, threads=(arguments.threads,), repeats=repeats, timeout_s=arguments.timeout)
        except ValueError as error:
            if len(group) == 2 or len(sources) == 1:
                failures.append(f"{list(group)[-1]}: {str(error)[:300]}")
            else:
                groups += [{"original": sources["original"], key: text} for key, text in group.items() if key != "original"]
            continue
        for result in results:
            if result.difference:
                failures.append(f"{result.variant}: {result.difference}")
            else:
                found[result.variant] = {"wall": result.wall, "cpu": result.cpu, "wall_s": result.wall_s, "cpu_s": result.cpu_s}
    if "original" not in found:
        raise SystemExit(f"error: {scop.name}: the original must run, got {failures}")
    return found, failures


def shipped(size: str) -> dict[str, Kernel]:
    """The kernels of the package."""
    directory = Path(next(iter(shipped_kernels.__path__)))
    if size not in ("small", "large"):
        raise SystemExit(f"error: --size must be small or large without --polybench, got {size}")
    manifest = yaml.safe_load((directory / "manifest.yaml").read_text())
    return {
        name: Kernel(name, (directory / f"{name}.c").read_text(), {**entry[size], **entry.get("scalars", {})})
        for name, entry in manifest.items()
    }


def polybench(directory: Path, size: str) -> dict[str, Kernel]:
    """The kernels of a PolyBench/C tree, with its sizes (such as "small" or "large") and its initialisation."""
    found = {}
    options = (f"-I{directory / 'utilities'}", "-DPOLYBENCH_USE_C99_PROTO", f"-D{size.upper()}_DATASET")
    for path in sorted(directory.rglob("*.c")):
        text = path.read_text(errors="replace")
        if "#pragma scop" not in text or "init_array" not in text or not path.with_suffix(".h").exists():
            continue  # the template of new kernels, and the original of nussinov
        cpp = (*options, f"-I{path.parent}")
        whole = run_cpp(path, cpp)
        name = re.sub(r"\W", "_", path.stem)
        kernel_name = re.search(r"\bkernel_\w+", whole)[0]
        functions = [_function(whole, "init_array"), _function(whole, kernel_name)]
        parameters = re.search(r"\((.*?)\)\s*\{", functions[1], re.S)[1]
        call = ", ".join(_argument(p) for p in _split(re.search(r"\((.*?)\)\s*\{", functions[0], re.S)[1]))
        wrapper = f"void init_{name}({parameters})\n{{\n  init_array({call});\n}}\n"
        functions[1] = re.sub(rf"^(static\s+)?void\s+{kernel_name}", f"void kernel_{name}", functions[1])
        types = "".join(f"{line}\n" for line in re.findall(r"^typedef [^{};]*;", whole, re.M))
        source = "#include <math.h>\n#include <stdlib.h>\n" + ALLOCATE + types + functions[0] + wrapper + functions[1]
        macros = _macros(path, cpp)
        scalars = [p for p in _split(parameters) if "[" not in p]
        values = {p.split()[-1]: macros.get(p.split()[-1].upper(), SCALARS.get(p.split()[-1], 1.5)) for p in scalars}
        found[name] = Kernel(name, source, values)
    if not found:
        raise SystemExit(f"error: --polybench must be a directory of PolyBench/C sources, got {directory}")
    return found


def _function(text: str, name: str) -> str:
    """The definition of a function, its linkage and type included."""
    start = re.search(rf"^(static\s+)?void\s+{name}\s*\(", text, re.M)
    depth = 0
    for place in range(text.index("{", start.end()), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start.start() : place + 1] + "\n"
    raise SystemExit(f"error: {name} must end with a brace")


def _split(parameters: str) -> list[str]:
    return [" ".join(part.split()) for part in parameters.split(",")]


def _argument(parameter: str) -> str:
    name = re.search(r"(\w+)\s*(\[|$)", parameter)[1]
    return f"&{name}" if "*" in parameter else name


def _macros(path: Path, options: tuple[str, ...]) -> dict[str, int]:
    """Sizes that the kernel's header defines."""
    found = re.finditer(r"^#define (\w+) (\d+)$", _gcc("-E", "-dM", *options, str(path)), re.M)
    return {m[1]: int(m[2]) for m in found}


def _gcc(*options: str) -> str:
    return subprocess.run(["gcc", *options], capture_output=True, text=True, check=True).stdout


def _report(directory: Path, settings: dict, records: list[dict], schedulers: tuple[str, ...]) -> None:
    machine, columns = this_machine(), (*schedulers, "tuned")
    means = {}
    for scheduler in columns:
        wall, cpu = [r["speedup"].get(scheduler) for r in records], [_of_cpu(r, scheduler) for r in records]
        values = {"geomean": list(filter(None, wall)), "cpu_geomean": list(filter(None, cpu))}
        means[scheduler] = {key: geometric_mean(each) if each else None for key, each in values.items()}
        means[scheduler]["kernels"] = len(values["geomean"])
    over_isl = [r["speedup"]["tuned"] / r["speedup"][ISL] for r in records if r["speedup"].get("tuned") and r["speedup"].get(ISL)]
    means["tuned over isl"] = {"geomean": geometric_mean(over_isl) if over_isl else None, "kernels": len(over_isl)}
    failures = [f"{r['kernel']}: {failure}" for r in records for failure in r["failures"]]
    rows = [{"kernel": r["kernel"], "original_s": r["original_s"], **r["speedup"]} for r in records]
    rows.append({"kernel": "geomean", **{key: means[key]["geomean"] for key in columns}})
    rows.append({"kernel": "geomean of CPU time", **{key: means[key]["cpu_geomean"] for key in columns}})
    table = markdown_table(rows, {"kernel": "kernel", "original_s": "original, s", **{key: key for key in columns}})
    generated = [r for r in records if r["generation_s"]]
    slowest = sorted(((max(r["generation_s"].values()), r["kernel"]) for r in generated), reverse=True)
    least = min((r["speedup"]["tuned"], r["kernel"]) for r in records if r["speedup"]["tuned"])
    text = [
        "# PolyBench: speedup over the sequential original", "", table,
        "Wall time; the last row counts the CPU time of the busiest thread, which leaves out what waking threads costs.",
        f"Tuned over isl's scheduler: {means['tuned over isl']['geomean'] or math.nan:.3g}x in {len(over_isl)} kernels. "
        f"Least tuned speedup: {least[0]:.3g}x, {least[1]}.",
        f"Scheduling and generation: {sum(fmean(r['generation_s'].values()) for r in generated):.3g} s for all kernels, mean of "
        f"the candidates; the slowest candidate takes at most 1 s in {sum(s <= 1 for s, _ in slowest)} of {len(slowest)} "
        f"kernels, and {slowest[0][0]:.3g} s in {slowest[0][1]}.", "",
        f"Failures: {len(failures)}", *(f"- {failure}" for failure in failures), "",
        "Settings: " + ", ".join(f"{key} = {value}" for key, value in settings.items()), "", machine_line(machine), "",
    ]  # fmt: skip
    write_json(
        directory / "report.json",
        {"config": settings, "machine": machine, "means": means, "failures": failures, "kernels": records},
    )
    write_text(directory / "report.md", "\n".join(text))
    _figure(directory / "report.png", records, columns)
    print("\n".join(text))


def _of_cpu(record: dict, scheduler: str) -> float | None:
    """Speedup of a scheduler's choice in CPU seconds of the busiest thread."""
    times = record["times"].get(record["chosen"].get(scheduler))
    return record["times"]["original"]["cpu"] / times["cpu"] if times else None


def _figure(path: Path, records: list[dict], columns: tuple[str, ...]) -> None:
    figure, axes = new_figure(width=14, height=4)
    ax, width = axes[0, 0], 0.8 / len(columns)
    for n, scheduler in enumerate(columns):
        heights = [r["speedup"].get(scheduler) or 0 for r in records]
        ax.bar([k + n * width for k in range(len(records))], heights, width, label=scheduler)
    ax.axhline(1, color="0.3", linewidth=0.8)
    ax.set_yscale("log")
    ax.set_xticks([k + 0.4 for k in range(len(records))], [r["kernel"] for r in records], rotation=60, ha="right", fontsize=8)
    ax.set_ylabel("speedup over the sequential original")
    ax.legend(fontsize=7, ncols=len(columns), loc="upper center", bbox_to_anchor=(0.5, 1.15))
    write_figure(path, figure)


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/polybench"), help="directory of the report; finished kernels are kept")
    add("--polybench", type=Path, help="directory of PolyBench/C 4.2 sources; default: the package's kernels")
    add("--size", choices=("mini", "small", "medium", "large", "extralarge"), default="large",
        help="a data set of PolyBench/C; the package's kernels have small and large")
    add("--kernels", type=lambda text: text.split(","), help="default: all")
    add("--strategies", type=lambda text: tuple(text.split(",")), default=STRATEGIES)
    add("--tiles", type=lambda text: tuple(text.split()), default=("0", "32", "32,32,256/4", "64,16,256/2"))
    add("--threads", type=int, default=2)
    add("--tuning", type=int, default=2, help="runs of every candidate before the choice")
    add("--repeats", type=int, default=5, help="runs of every choice")
    add("--timeout", type=float, default=600, help="seconds for all runs of one kernel")
    arguments = parser.parse_args()
    for strategy in arguments.strategies:
        try:
            config.load(strategy)
        except ValueError as error:
            parser.error(str(error))
    return arguments


if __name__ == "__main__":
    main()
