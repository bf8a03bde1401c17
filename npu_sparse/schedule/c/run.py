"""Compiles an original kernel and generated ones into one program, runs them in turn, compares every live-out array bitwise."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from npu_sparse.schedule.c.print import identifiers
from npu_sparse.schedule.scop import Array, Scop

MERGE = ("-Wl,--allow-multiple-definition",)  # the variants are copies of one file: its other functions are the same
FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-std=gnu11")


class RunError(ValueError):
    """A program that could not be compiled or did not end well; the compiler's or the program's own words are in it."""


@dataclass(frozen=True)
class Result:
    """One variant with one number of threads.

    Attributes:
        difference: "" where every live-out array is bitwise that of the first variant, otherwise the first difference.
        wall_s: seconds of each run.
        cpu_s: of each run, the CPU seconds of the busiest thread; it leaves out what other processes of the machine took.
    """

    variant: str
    threads: int
    difference: str
    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]

    @property
    def wall(self) -> float:
        return median(self.wall_s)

    @property
    def cpu(self) -> float:
        return median(self.cpu_s)


def run(
    scop: Scop,
    variants: dict[str, str],
    sizes: dict[str, int],
    *,
    scalars: dict[str, float] | None = None,
    threads: tuple[int, ...] = (1,),
    repeats: int = 5,
    flags: tuple[str, ...] = FLAGS,
    timeout_s: float = 300,
) -> list[Result]:
    """Runs `variants` (name -> C source with the kernel's function), the first being the reference.

    The arrays of every run start from the source's own `init_<name>` where it has one for `kernel_<name>`, and otherwise from
    fixed values. Runs of the variants are interleaved: all variants once, `repeats` times, for each number of threads.
    Compilers and programs that fail raise RunError.
    """
    if not scop.function:
        raise RunError(f"{scop.source} must define the SCoP inside of a function to be run")
    values = {**sizes, **(scalars or {})}
    missing = [a.name for a in scop.arguments if not a.shape and a.name not in values]
    if missing:
        raise RunError(f"sizes must give a value for {', '.join(missing)}")
    passed = {a.name for a in scop.arguments if a.shape}
    hidden = [a.name for a in scop.arrays.values() if a.live_out and a.name not in passed]
    if hidden:
        raise RunError(f"results must be array arguments of {scop.function} to be compared, got {', '.join(hidden)}")
    with tempfile.TemporaryDirectory(prefix="schedule-") as directory:
        program = _compile(Path(directory), scop, variants, values, flags)
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_DYNAMIC": "false", "OMP_PROC_BIND": "false"}
        command = [str(program), str(repeats), *map(str, threads)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
        except subprocess.TimeoutExpired as error:
            raise RunError(f"{scop.name} must end within {timeout_s:g} s, and did not") from error
    if done.returncode:
        raise RunError(f"{scop.name} must exit with 0, got {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}")
    return _results([json.loads(line) for line in done.stdout.splitlines()], list(variants))


def _results(records: list[dict], names: list[str]) -> list[Result]:
    grouped: dict[tuple[int, int], list[dict]] = {}
    for record in records:
        grouped.setdefault((record["threads"], record["variant"]), []).append(record)
    return [
        Result(
            names[variant], threads, next((r["difference"] for r in found if r["difference"]), ""),
            tuple(r["wall_s"] for r in found), tuple(r["cpu_s"] for r in found),
        )
        for (threads, variant), found in grouped.items()
    ]  # fmt: skip


def _compile(directory: Path, scop: Scop, variants: dict[str, str], values: dict, flags) -> Path:
    if shutil.which("gcc") is None:
        raise RunError("gcc must be installed to compile what was generated")
    init = _init_function(scop, next(iter(variants.values())))
    objects = []
    for n, (name, source) in enumerate(variants.items()):
        path = directory / f"v{n}.c"
        path.write_text(source if "malloc" not in source else "#include <stdlib.h>\n" + source)
        renames = [f"-D{scop.function}=variant_{n}"] + ([f"-D{init}=init_{n}"] if init else [])
        _gcc([*flags, *renames, "-c", path, "-o", path.with_suffix(".o")], name)
        objects.append(path.with_suffix(".o"))
    driver = directory / "driver.c"
    driver.write_text(_driver(scop, len(variants), values, bool(init)))
    _gcc(["-O1", "-fopenmp", "-std=gnu11", driver, *objects, "-lm", *MERGE, "-o", directory / "program"], "the driver")
    return directory / "program"


def _init_function(scop: Scop, source: str) -> str:
    name = re.sub("^kernel", "init", scop.function)
    return name if name != scop.function and name in identifiers(source) else ""


def _gcc(arguments: list, name: str) -> None:
    done = subprocess.run(["gcc", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{name} must compile, got: {done.stderr.strip()[:2000]}")


def _parameter(a: Array) -> str:
    return f"{a.ctype} {a.name}" + "".join(f"[{extent}]" for extent in a.shape)


def _driver(scop: Scop, variants: int, values: dict, init: bool) -> str:
    """A C program: its arguments are the repetitions and the numbers of threads; it prints one JSON record per run."""
    arrays = [a for a in scop.arguments if a.shape]
    compared = [a for a in arrays if a.name in scop.arrays and scop.arrays[a.name].live_out]
    parameters = ", ".join(_parameter(a) for a in scop.arguments)
    call = ", ".join(a.name for a in scop.arguments)
    count = {a.name: " * ".join(f"(size_t)({extent})" for extent in a.shape) for a in arrays}
    lines = [
        "#define _GNU_SOURCE", "#include <omp.h>", "#include <stdio.h>", "#include <stdlib.h>", "#include <string.h>",
        "#include <time.h>",
        *(f"void variant_{n}({parameters});" for n in range(variants)),
        *([f"void init_0({parameters});"] if init else []),
        "static double seconds_(clockid_t clock_) {",
        "  struct timespec t_; clock_gettime(clock_, &t_); return t_.tv_sec + 1e-9 * t_.tv_nsec;",
        "}",
        "static double busy_[256];",
        "int main(int argc_, char **argv_) {",
        *(f"  {a.ctype} {a.name} = {values[a.name]};" for a in scop.arguments if not a.shape),
    ]  # fmt: skip
    for a in arrays:
        inner = "".join(f"[{extent}]" for extent in a.shape[1:])
        pointer = f"(*{a.name}){inner}" if inner else f"*{a.name}"
        lines.append(f"  {a.ctype} {pointer} = aligned_alloc(64, (sizeof({a.ctype}) * {count[a.name]} + 63) / 64 * 64 + 64);")
    lines += [f"  {a.ctype} *expected_{a.name} = malloc(sizeof({a.ctype}) * ({count[a.name]}) + 1);" for a in compared]
    fill = [f"      init_0({call});"] if init else [
        f"      for (size_t e_ = 0; e_ < {count[a.name]}; e_++)"
        f" (({a.ctype} *){a.name})[e_] = ({a.ctype})((e_ * 37 + {n}) % 101) / 7 + 1;"
        for n, a in enumerate(arrays)
    ]  # fmt: skip
    lines += [
        "  int known_ = 0;",
        "  for (int p_ = 2; p_ < argc_; p_++) for (int r_ = 0; r_ < atoi(argv_[1]); r_++) {",
        "    omp_set_num_threads(atoi(argv_[p_]));",
        f"    for (int v_ = 0; v_ < {variants}; v_++) {{",
        *fill,
        "      #pragma omp parallel",
        "      busy_[omp_get_thread_num()] = -seconds_(CLOCK_THREAD_CPUTIME_ID);",
        "      double start_ = seconds_(CLOCK_MONOTONIC);",
        "      switch (v_) {",
        *(f"        case {n}: variant_{n}({call}); break;" for n in range(variants)),
        "      }",
        "      double wall_ = seconds_(CLOCK_MONOTONIC) - start_, cpu_ = 0;",
        "      #pragma omp parallel",
        "      busy_[omp_get_thread_num()] += seconds_(CLOCK_THREAD_CPUTIME_ID);",
        "      for (int n_ = 0; n_ < atoi(argv_[p_]) && n_ < 256; n_++) cpu_ = busy_[n_] > cpu_ ? busy_[n_] : cpu_;",
        '      char difference_[200] = "";',
    ]
    for a in compared:
        size = f"sizeof({a.ctype}) * ({count[a.name]})"
        lines += [
            f"      if (!known_) memcpy(expected_{a.name}, {a.name}, {size});",
            f"      else if (!difference_[0] && memcmp(expected_{a.name}, {a.name}, {size}))",
            f"        for (size_t e_ = 0; e_ < {count[a.name]}; e_++)",
            f"          if (memcmp(expected_{a.name} + e_, ({a.ctype} *){a.name} + e_, sizeof({a.ctype}))) {{",
            f'            snprintf(difference_, 200, "element %zu of {a.name} is %.17g, expected %.17g", e_,',
            f"                     (double)(({a.ctype} *){a.name})[e_], (double)expected_{a.name}[e_]);",
            "            break;",
            "          }",
        ]
    lines += [
        "      known_ = 1;",
        '      printf("{\\"threads\\": %d, \\"variant\\": %d, \\"wall_s\\": %.9g, "',
        '             "\\"cpu_s\\": %.9g, \\"difference\\": \\"%s\\"}\\n",',
        "             atoi(argv_[p_]), v_, wall_, cpu_, difference_);",
        "    }",
        "  }",
        "  return 0;",
        "}",
    ]
    return "\n".join(lines) + "\n"
