"""Compiles an original kernel and generated ones into one program, runs them in turn, compares every live-out array bitwise."""

import json
import math
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import islpy as isl

from npu_sparse.schedule.c.driver import CALLER, driver, parameter
from npu_sparse.schedule.c.print import identifiers
from npu_sparse.schedule.c.process import interrupted_by_termination, wait_for
from npu_sparse.schedule.scop import Scop

from ...errors import USER_ERROR, ActionableError

MERGE = ("-Wl,--allow-multiple-definition",)  # the variants are copies of one file: its other functions are the same
GCC = ("gcc", "-fmax-errors=20")
COMPILE_S = 120  # of one source, at most
FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-std=gnu11")


class RunError(ActionableError, ValueError):
    """A program that could not be compiled or did not end well; the compiler's or the program's own words are in it."""

    exit_status = USER_ERROR
    variant = ""  # the one that failed, where only one did


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
    sizes: dict[str, float],
    *,
    scalars: dict[str, float] | None = None,
    threads: tuple[int, ...] = (1,),
    repeats: int = 5,
    flags: tuple[str, ...] = FLAGS,
    compilers: dict[str, tuple[str, ...]] | None = None,
    timeout_s: float = 300,
    limit_s: int = 0,
) -> list[Result]:
    """Runs `variants` (name -> C source with the kernel's function), the first being the reference.

    Variants that `compilers` names are compiled by that command, its flags included, and not by gcc with `flags`.

    The arrays of every run start from the source's own `init_<name>` where it has one for `kernel_<name>`, and otherwise from
    fixed values. Runs of the variants are interleaved: all variants once, `repeats` times, for each number of threads.

    Raises:
        RunError: a compiler or a program fails, all runs take longer than `timeout_s` seconds or, unless that is 0, one of them
            longer than `limit_s`; a program leaves before all of its runs have
            been compared; sizes for which there is nothing to compare, or that the arguments' types cannot hold.
    """
    if not scop.function:
        raise RunError(f"{scop.source} must define the SCoP inside of a function to be run")
    arguments = {argument.name for argument in scop.arguments}
    structs = [path for path in scop.fields.values() if re.match(r"\w+", path)[0] in arguments]
    if structs:
        raise RunError(f"{scop.function} must take numbers and arrays of numbers to be run, got {structs[0]}")
    keys = {name: key for key, name in scop.aliases.items()}
    values = _checked(scop, {keys.get(name, name): value for name, value in {**sizes, **(scalars or {})}.items()})
    passed = {a.name for a in scop.arguments if a.shape}
    results = [a.name for a in scop.arrays.values() if a.live_out]
    hidden = [name for name in results if name not in passed]
    if hidden:
        got = ", ".join(scop.fields.get(name, name) for name in hidden)
        raise RunError(f"results must be array arguments of {scop.function} to be compared, got {got}")
    endless = [f"{a.ctype} *{a.name}" for a in scop.arguments if a.shape and not a.sized]
    if endless:
        raise RunError(f"arrays of {scop.function} must have extents to be made for a run, as x[n] has, got {', '.join(endless)}")
    if not results:
        raise RunError(f"{scop.function} must have results to be compared, got none that lives after its loops")
    with interrupted_by_termination(), tempfile.TemporaryDirectory(prefix="schedule-") as directory:
        program = _compile(Path(directory), scop, variants, values, {n: (*GCC, *flags) for n in variants} | (compilers or {}))
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_DYNAMIC": "false", "OMP_PROC_BIND": "false"}
        environment[CALLER] = str(os.getpid())
        written = Path(directory) / "records"
        command = [str(program), str(written), str(repeats), str(limit_s), *map(str, threads)]
        try:
            status, errors = wait_for(command, timeout_s, environment)
        except TimeoutError as error:
            raise RunError(f"{scop.function} {error}") from error
        records = [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []
    if records and "refused" in records[0]:
        raise RunError(_refusal(scop, records[0]))
    expected = repeats * len(threads) * len(variants)
    name = list(variants)[len(records) % len(variants)]
    if status == -signal.SIGALRM:
        raise _of(name, f"{scop.function} must return from a run within {limit_s} s, and {name} did not")
    if status:
        raise _of(name, f"{scop.function} must exit with 0, got {status} in {name}: {errors.strip()[-500:]}")
    if len(records) != expected:
        got = f"{len(records)}: the program ends itself in {name}"
        raise _of(name, f"{scop.function} must return from all {expected} runs, got {got}")
    return _results(records, list(variants))


def run_right(
    scop: Scop, variants: dict[str, str], sizes: dict[str, float], *, suspects: Collection[str] = (), **options
) -> tuple[list[Result], dict[str, str]]:
    """Results of `run` of those variants that do what the first one does, and of the others, why not.

    Only a program in which every result is right counts: what is wrong may have written where the others read. Where variants
    differ, the `suspects` among them leave alone at first. `options` are those of `run`.

    Raises:
        RunError: the first variant fails, or gives different results, or the runs fail as a whole.
    """
    first, failures = next(iter(variants)), {}
    left = dict(variants)
    while True:
        try:
            results = run(scop, left, sizes, **options)
        except RunError as error:
            if error.variant not in left or error.variant == first:
                raise
            failures[error.variant] = str(error)
            del left[error.variant]
            continue
        wrong = {result.variant: result.difference for result in results if result.difference}
        if first in wrong:
            raise _of(first, f"{first} must give one result, got two: {wrong[first]}")
        if not wrong:
            return results, failures
        for name in set(wrong) & set(suspects) or wrong:
            failures[name] = wrong[name]
            del left[name]


def _of(variant: str, message: str) -> RunError:
    error = RunError(message)
    error.variant = variant
    return error


def _checked(scop: Scop, values: dict[str, float]) -> dict[str, float]:
    """The values of the scalar arguments, whole numbers as int, when the loops do something for them."""
    names = [a.name for a in scop.arguments if not a.shape]
    missing = [name for name in names if name not in values]
    if missing:
        raise RunError(f"sizes must give a value for {', '.join(missing)}")
    unknown = [name for name in values if name not in names]
    if unknown:
        known = ", ".join(names) or "none"
        raise RunError(f"sizes must name scalar arguments of {scop.function} ({known}), got {', '.join(unknown)}")
    endless = [f"{name}={value}" for name, value in values.items() if not math.isfinite(value)]
    if endless:
        raise RunError(f"sizes must be finite numbers, got {', '.join(endless)}")
    values = {name: int(value) if float(value).is_integer() else value for name, value in values.items()}
    fixed = {name: values[name] for name in scop.parameters if name in values}
    broken = [f"{name}={value}" for name, value in fixed.items() if not isinstance(value, int)]
    if broken:
        raise RunError(f"sizes must be whole numbers for parameters of loops, got {', '.join(broken)}")
    given = ", ".join(f"{name}={value}" for name, value in fixed.items())
    possible = _at(scop.context, fixed)
    if possible.is_empty():
        wanted = str(scop.context).partition(":")[2].strip(" }")
        raise RunError(f"sizes must satisfy {wanted}, which {scop.function} needs, got {given}")
    if all(_at(statement.domain, fixed).intersect_params(possible).is_empty() for statement in scop.statements):
        raise RunError(f"sizes must let some statement of {scop.function} run, got {given}")
    return values


def _at(points: isl.Set, values: dict[str, int]) -> isl.Set:
    for name, value in values.items():
        place = points.find_dim_by_name(isl.dim_type.param, name)
        if place >= 0:
            points = points.fix_val(isl.dim_type.param, place, isl.Val(value))
    return points


def _refusal(scop: Scop, record: dict) -> str:
    if record["refused"] == "memory":
        return f"arrays of {scop.function} must fit into the machine's memory, got {float(record['value']):.3g} bytes"
    a, value = scop.arguments[record["argument"]], f"{float(record['value']):.17g}"
    if record["refused"] == "value":
        return f"{a.name} must be a value of {a.ctype}, got {value}"
    return f"extent {a.shape[record['dimension']]} of {a.name} must be positive, got {value}"


def _results(records: list[dict], names: list[str]) -> list[Result]:
    grouped: dict[tuple[int, int], list[dict]] = {}
    for record in records:
        grouped.setdefault((record["threads"], record["variant"]), []).append(record)
    return [
        Result(
            names[variant], threads, next((r["difference"] for r in group if r["difference"]), ""),
            tuple(r["wall_s"] for r in group), tuple(r["cpu_s"] for r in group),
        )
        for (threads, variant), group in grouped.items()
    ]  # fmt: skip


def _compile(directory: Path, scop: Scop, variants: dict[str, str], values: dict, commands: dict[str, tuple[str, ...]]) -> Path:
    if shutil.which("gcc") is None:
        raise RunError("gcc must be installed to compile what was generated")
    init = _init_function(scop, next(iter(variants.values())))
    objects = []
    for n, (name, source) in enumerate(variants.items()):
        path = directory / f"v{n}.c"
        text = source
        if init and not n:  # the compiler then sees to it that it takes what it will be given
            text += f"\nvoid {init}({', '.join(map(parameter, scop.arguments))});\n"
        path.write_text(text)
        renames = [f"-D{scop.function}=variant_{n}"] + ([f"-D{init}=init_{n}"] if init else [])
        _make([*commands[name], *renames, "-c", path, "-o", path.with_suffix(".o")], name)
        objects.append(path.with_suffix(".o"))
    main = directory / "driver.c"
    main.write_text(driver(scop, len(variants), values, bool(init)))
    _make([*GCC, "-O1", "-fopenmp", "-std=gnu11", main, *objects, "-lm", *MERGE, "-o", directory / "program"], "the driver")
    return directory / "program"


def _init_function(scop: Scop, source: str) -> str:
    name = re.sub("^kernel", "init", scop.function)
    return name if name != scop.function and name in identifiers(source) else ""


def _make(command: list, name: str) -> None:
    try:
        status, errors = wait_for([*map(str, command)], COMPILE_S)
    except TimeoutError as error:
        raise _of(name, f"{name} must compile within {COMPILE_S} s, and did not") from error
    except OSError as error:
        raise _of(name, f"{name} must have a compiler that runs, got {error}") from error
    if status:
        raise _of(name, f"{name} must compile, got: {errors.strip()[:2000]}")
