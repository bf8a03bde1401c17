#!/usr/bin/env python3
"""How much faster do the thirty PolyBench problems run under each strategy, against gcc -O3 and against the schedulers of others?

    python scripts/bench_polybench.py --output runs/polybench --threads 2
    python scripts/bench_polybench.py --pluto ~/pluto/polycc --polly clang-14
    python scripts/bench_polybench.py --polybench PolyBenchC-4.2.1 --size large --short --pluto ~/pluto/polycc

Every scheduler gets the same tile sizes to choose from (--tiles; "0" is untiled): each candidate runs --tuning times beside the
original, the fastest is measured again, interleaved with the original and with the other schedulers' choices, --repeats times;
only that second measurement is reported. "tuned" is the best of the original and of the six candidates that the model of
npu_sparse.schedule.candidates names for the kernel, chosen in the first measurement too. The strategies of --presets are measured
as they are shipped, too. The baseline is the sequential original under gcc -O3 -march=native -fopenmp -ffp-contract=off. isl's
own scheduler goes through the same code generator.

--pluto takes an installed polycc, whose choice is among --pluto-variants: its default; untiled without unrolling; maxfuse;
innerpar; lastwriter; and tiles of 32, 32, 256. gcc compiles what it makes, with its `ivdep` in gcc's spelling. --polly takes a
clang that has Polly, and measures clang -O3 without it, too. Both run interleaved with everything else.

Every run's live-out arrays are compared bit by bit with the original's; a candidate that differs, cannot be generated or does not
end is listed under failures and wins nothing. --short leaves out everything but the original, the presets and Pluto's default,
and the choices: one measurement, for large sizes.

--polybench DIR takes the kernels from PolyBench/C 4.2 sources instead of those of the package. Kernels that are finished are in
records/ and are not measured again. Prints tables; writes report.json, report.md and report.png to --output.
"""

import argparse
import json
import re
import subprocess
import time
from dataclasses import dataclass
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
from npu_sparse.schedule.c.others import PLUTO, check_pluto, check_polly, schedule_by_pluto
from npu_sparse.schedule.c.print import generate_file
from npu_sparse.schedule.c.run import FLAGS, run_right
from npu_sparse.schedule.candidates import ISL, PARALLEL, Choice, ranked
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.frontend.preprocess import run_cpp

POLYCC, POLLY, CLANG = "polycc", "Polly", "clang"
STRATEGIES = ("pluto", "pluto-plus", "feautrier", "isl", "tensor-scheduler", "cpu-vector")
TUNED = 6  # candidates that the model names
SCALARS = {"alpha": 1.5, "beta": 1.2, "float_n": 1000.0}
CLOCKS = {  # one table of the report each: the measurement and its clock
    "wall": ("times", "wall"),
    "CPU time of the busiest thread": ("times", "cpu"),
    "one thread, CPU time": ("times_one", "cpu"),
}
RATIOS = (("tuned", ISL), ("tuned", POLYCC), ("tuned", f"{POLYCC} default"), ("cpu-vector preset", POLYCC),
          ("cpu-vector preset", f"{POLYCC} default"), ("tuned", POLLY))  # fmt: skip

# The parts of PolyBench's utilities that kernels use. Every source of a program has a copy, and the linker keeps one.
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
    _report(directory, settings, records)


def measure(kernel: Kernel, arguments) -> dict:
    """Times, speedups and failures of one kernel; where it cannot be read or run, failures only."""
    sources, seconds, failures, chosen = {"original": kernel.text}, {}, [], {}
    try:
        scop = parse_c(kernel.text)
        tuned = [] if arguments.short else [str(choice) for choice, _ in ranked(scop)[:TUNED]]
        named = [(choice.rpartition(" ")[0], choice.rpartition(" ")[2]) for choice in tuned]
        for scheduler, tile in dict.fromkeys([*candidates(arguments), *named]):
            start, key = time.perf_counter(), f"{scheduler} {tile}"
            try:
                if scheduler == POLYCC:
                    sources[key] = schedule_by_pluto(arguments.pluto, kernel.text, tile)
                elif scheduler in (POLLY, CLANG):
                    sources[key] = kernel.text
                    continue
                else:
                    sources[key] = candidate(scop, kernel.text, scheduler, tile)
                seconds[key] = time.perf_counter() - start
            except ValueError as error:
                failures.append(f"{key}: {error}")
        first, failed = {}, []
        if arguments.tuning:
            first, failed = _timed(scop, sources, kernel.values, arguments, arguments.tuning)
        failures += failed
        chosen = _choices(list(sources), first, tuned, arguments)
        measured = {key: sources[key] for key in dict.fromkeys(["original", *filter(None, chosen.values())])}
        final, failed = _timed(scop, measured, kernel.values, arguments, arguments.repeats)
        failures += failed
        alone = {}
        if arguments.one_thread and arguments.threads > 1:
            right = {key: text for key, text in measured.items() if key in final}
            alone, failed = _timed(scop, right, kernel.values, arguments, arguments.repeats, threads=1)
            failures += [f"{failure} (one thread)" for failure in failed]
    except ValueError as error:  # the kernel itself
        none = {"original_s": None, "chosen": {}, "speedup": {}, "times": {}, "times_one": {}, "tuning": {}, "generation_s": {}}
        return {"kernel": kernel.name, **none, "failures": [*failures, str(error)]}
    speedup = {}
    for scheduler, key in chosen.items():
        speedup[scheduler] = final["original"]["wall"] / final[key]["wall"] if key in final else None
    return {
        "kernel": kernel.name, "original_s": final["original"]["wall"], "chosen": chosen, "speedup": speedup, "times": final,
        "times_one": alone, "tuning": first, "generation_s": seconds, "failures": sorted(set(failures)),
    }  # fmt: skip


def candidates(arguments) -> list[tuple[str, str]]:
    """Scheduler and tiles, or variant, of everything that runs beside the original."""
    listed = [(strategy, "preset") for strategy in arguments.presets]
    if not arguments.short:
        listed += [(scheduler, tile) for scheduler in (*arguments.strategies, ISL) for tile in arguments.tiles]
        listed.append((PARALLEL, "0"))
    if arguments.pluto:
        listed += [(POLYCC, variant) for variant in (("default",) if arguments.short else arguments.pluto_variants)]
    if arguments.polly and not arguments.short:
        listed += [(CLANG, "0"), (POLLY, "0")]
    return list(dict.fromkeys(listed))


def _choices(keys: list[str], first: dict, tuned: list[str], arguments) -> dict[str, str | None]:
    """What each column of the report measures: the fastest of a scheduler's candidates in the first measurement."""
    best = {}
    chosen = [scheduler for scheduler, tile in candidates(arguments) if tile != "preset"]
    for scheduler in () if arguments.short else dict.fromkeys(chosen):
        tiles = arguments.tiles if scheduler in (*arguments.strategies, ISL) else ("0", *PLUTO)
        tried = [key for key in first if key.rpartition(" ")[0] == scheduler and key.rpartition(" ")[2] in tiles]
        best[scheduler] = min(tried, key=lambda key: min(first[key]["wall_s"])) if tried else None
    for fixed in [*(f"{strategy} preset" for strategy in arguments.presets), f"{POLYCC} default"]:
        if fixed in keys and (fixed in first or not first):
            best[fixed] = fixed
    if not arguments.short:
        best["tuned"] = min((key for key in ("original", *tuned) if key in first), key=lambda key: min(first[key]["wall_s"]))
    return best


def candidate(scop, text: str, scheduler: str, tile: str) -> str:
    """C of one scheduler with tiles "0" (untiled), "32", "32,32,256/4" with an unroll-and-jam factor, or "preset": as shipped."""
    return generate_file(scop, text, Choice.parse(f"{scheduler} {tile}").tree(scop))


def _timed(scop, sources: dict[str, str], values: dict, arguments, repeats: int, threads: int = 0) -> tuple[dict, list[str]]:
    """`(times of the variants that computed the right thing, failures)`; see `run_right`."""
    compilers = {f"{name} 0": command for name, command in (arguments.polly or {}).items()}
    results, failures = run_right(
        scop, sources, values, threads=(threads or arguments.threads,), repeats=repeats, compilers=compilers,
        timeout_s=arguments.timeout * repeats * len(sources), limit_s=arguments.timeout,
        suspects=[name for name in sources if name.startswith(POLYCC)],
    )  # fmt: skip
    timings = {r.variant: {"wall": r.wall, "cpu": r.cpu, "wall_s": r.wall_s, "cpu_s": r.cpu_s} for r in results}
    return timings, [f"{name}: {why[:300]}" for name, why in failures.items()]


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
    kernels = {}
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
        kernels[name] = Kernel(name, source, values)
    if not kernels:
        raise SystemExit(f"error: --polybench must be a directory of PolyBench/C sources, got {directory}")
    return kernels


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
    matches = re.finditer(r"^#define (\w+) (\d+)$", _gcc("-E", "-dM", *options, str(path)), re.M)
    return {m[1]: int(m[2]) for m in matches}


def _gcc(*options: str) -> str:
    return subprocess.run(["gcc", *options], capture_output=True, text=True, check=True).stdout


def _report(directory: Path, settings: dict, records: list[dict]) -> None:
    machine, columns = this_machine(), list(dict.fromkeys(column for r in records for column in r["chosen"]))
    columns = [*(c for c in columns if c != "tuned"), *(c for c in columns if c == "tuned")]
    means, tables = {column: {} for column in columns}, []
    for clock, place in CLOCKS.items():
        rows = []
        for r in records:
            rows.append({"kernel": r["kernel"], **{column: _speedup(r, column, *place) for column in columns}})
        if not any(row[column] for row in rows for column in columns):
            continue
        columns_of = {column: list(filter(None, (row[column] for row in rows))) for column in columns}
        for column, values in columns_of.items():
            name = {"wall": "geomean", "cpu": "cpu_geomean"}[place[1]] if place[0] == "times" else "one_thread_geomean"
            means[column] |= {name: geometric_mean(values) if values else None}
            means[column].setdefault("kernels", len(values))
        title = f"## {clock[0].upper()}{clock[1:]}"
        rows.append({"kernel": "geomean", **{c: geometric_mean(v) if v else None for c, v in columns_of.items()}})
        rows.append({"kernel": "kernels", **{c: str(len(v)) for c, v in columns_of.items()}})
        tables += [title, "", markdown_table(rows, {name: name for name in ("kernel", *columns)}), ""]
    ratios = {f"{ours} over {theirs}": _ratio(records, ours, theirs) for ours, theirs in RATIOS}
    ratios = {name: ratio for name, ratio in ratios.items() if ratio}
    failures = [f"{r['kernel']}: {failure}" for r in records for failure in r["failures"]]
    text = [
        "# PolyBench: speedup over the sequential original", "", *tables,
        "The CPU time of the busiest thread leaves out what waking threads costs and what other programs took.",
        *(f"{name}: {r['cpu_geomean']:.3g}x in CPU time, {r['geomean']:.3g}x in wall time, {r['kernels']} kernels; least "
          f"{r['least']:.3g}x, {r['least_kernel']}." for name, r in ratios.items()),
        *_least(records, [column for column in columns if column == "tuned" or column.endswith(" preset")]),
        *_generation(records), "",
        f"Failures: {len(failures)}", *(f"- {failure}" for failure in failures), "",
        "Seconds of the original: " + ", ".join(f"{r['kernel']} {r['original_s']:.4g}" for r in records if r["original_s"]), "",
        "Settings: " + ", ".join(f"{key} = {value}" for key, value in settings.items()), "", machine_line(machine), "",
    ]  # fmt: skip
    write_json(
        directory / "report.json",
        {"config": settings, "machine": machine, "means": means | ratios, "failures": failures, "kernels": records},
    )
    write_text(directory / "report.md", "\n".join(text))
    _figure(directory / "report.png", records, columns)
    print("\n".join(text))


def _least(records: list[dict], columns: list[str]) -> list[str]:
    lines = []
    for column in columns:
        speedups = [(value, r["kernel"]) for r in records if (value := _speedup(r, column, "times", "cpu"))]
        lines += [f"Least speedup of {column}, CPU time: {min(speedups)[0]:.3g}x, {min(speedups)[1]}."] if speedups else []
    return lines


def _generation(records: list[dict]) -> list[str]:
    """How long the project's schedulers took, and Pluto."""
    lines = []
    for name, foreign in (("Scheduling and generation", False), ("Pluto", True)):
        seconds = [({k: s for k, s in r["generation_s"].items() if k.startswith(f"{POLYCC} ") == foreign}, r) for r in records]
        seconds = [(by_stage, r["kernel"]) for by_stage, r in seconds if by_stage]
        if seconds:
            slowest = sorted(((max(by_stage.values()), kernel) for by_stage, kernel in seconds), reverse=True)
            mean = sum(fmean(by_stage.values()) for by_stage, _ in seconds)
            lines.append(
                f"{name}: {mean:.3g} s for all kernels, mean of the candidates; the slowest candidate takes at most 1 s in "
                f"{sum(s <= 1 for s, _ in slowest)} of {len(slowest)} kernels, and {slowest[0][0]:.3g} s in {slowest[0][1]}."
            )
    return lines


def _speedup(record: dict, column: str, times: str, clock: str) -> float | None:
    """The speed-up of a column's choice over the original, by one of the measurements and clocks."""
    chosen = record[times].get(record["chosen"].get(column))
    return record[times]["original"][clock] / chosen[clock] if chosen else None


def _ratio(records: list[dict], ours: str, theirs: str) -> dict | None:
    """How much faster one column is than another where both have a choice, and where least so."""
    pairs = {"cpu_geomean": {}, "geomean": {}}
    for r in records:
        for key, clock in (("cpu_geomean", "cpu"), ("geomean", "wall")):
            a, b = _speedup(r, ours, "times", clock), _speedup(r, theirs, "times", clock)
            if a and b:
                pairs[key][r["kernel"]] = a / b
    if not pairs["cpu_geomean"]:
        return None
    least = min(pairs["cpu_geomean"], key=pairs["cpu_geomean"].get)
    means = {key: geometric_mean(ratios.values()) for key, ratios in pairs.items()}
    return {**means, "kernels": len(pairs["geomean"]), "least": pairs["cpu_geomean"][least], "least_kernel": least}


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
    add("--strategies", type=_list, default=STRATEGIES)
    add("--presets", type=_list, help="strategies to measure as they are shipped, too; default: with --short cpu-vector, or none")
    add("--tiles", type=lambda text: tuple(text.split()), default=("0", "32", "32,32,256/4", "64,16,256/2"))
    add("--threads", type=int, default=2)
    add("--tuning", type=int, default=2, help="runs of every candidate before the choice")
    add("--repeats", type=int, default=5, help="runs of every choice")
    add("--timeout", type=int, default=120, help="seconds for one run of a candidate")
    add("--one-thread", action=argparse.BooleanOptionalAction, default=True, help="measure the choices with one thread, too")
    add("--short", action="store_true", help="only the original, the presets and Pluto's default, measured once: for large sizes")
    add("--pluto", help="an installed polycc, path or name, to measure beside")
    add("--pluto-variants", type=lambda text: tuple(text.split()), default=tuple(PLUTO),
        help=f"between blanks, of {' '.join(PLUTO)}")
    add("--polly", help="an installed clang that has Polly, path or name, to measure beside")
    arguments = parser.parse_args()
    if arguments.presets is None:
        arguments.presets = ("cpu-vector",) if arguments.short else ()
    arguments.tuning = 0 if arguments.short else arguments.tuning
    if arguments.tuning < 1 and not arguments.short:
        parser.error(f"--tuning must be at least 1, got {arguments.tuning}")
    for variant in arguments.pluto_variants:
        if variant not in PLUTO:
            parser.error(f"--pluto-variants must be of {' '.join(PLUTO)}, got {variant}")
    try:
        for strategy in (*arguments.strategies, *arguments.presets):
            config.load(strategy)
        arguments.pluto = check_pluto(arguments.pluto) if arguments.pluto else None
        arguments.polly = check_polly(arguments.polly) if arguments.polly else None
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _list(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


if __name__ == "__main__":
    main()
