"""Schedulers of others, where they are installed: Pluto's polycc, and clang with Polly.

Nothing that they make is taken on trust: it runs beside the original only, and `run` compares every result.
"""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from npu_sparse.schedule.c.process import wait_for

from ...errors import USER_ERROR, ActionableError

SCHEDULE_S = 120  # of one source, at most
SIZES = 16  # loops that a file of tile sizes speaks of: the last size is repeated
CLANG = ("-O3", "-march=native", "-ffp-contract=off", "-std=gnu11")
POLLY = (*CLANG, "-mllvm", "-polly", "-mllvm", "-polly-parallel", "-mllvm", "-polly-vectorizer=stripmine")
PROBE = """\
void kernel_probe(int n, double x[n], double y[n]) {
  int i;
#pragma scop
  for (i = 0; i < n; i++)
    x[i] = 2.0 * y[i];
#pragma endscop
}
"""


class ForeignError(ActionableError, ValueError):
    """A foreign scheduler that is not there, refuses a program, or does not end."""

    exit_status = USER_ERROR


@dataclass(frozen=True)
class Variant:
    """How polycc is asked: its options, and the tile sizes that it finds in `tile.sizes`."""

    options: tuple[str, ...]
    tiles: tuple[int, ...] = ()


TILED = ("--tile", "--parallel")  # both are defaults of some versions only
PLUTO = {
    "default": Variant(TILED),
    "notile": Variant(("--notile", "--parallel", "--nounrolljam")),
    "maxfuse": Variant((*TILED, "--maxfuse")),
    "innerpar": Variant((*TILED, "--innerpar")),
    "lastwriter": Variant((*TILED, "--lastwriter")),
    "32,32,256": Variant(TILED, (32, 32, 256)),
}


def check_pluto(polycc: str) -> str:
    """The absolute path of a polycc, after it has scheduled a small loop.

    Raises ForeignError in one sentence where it is not there or does not do that.
    """
    program = _program("--pluto", polycc)
    try:
        schedule_by_pluto(program, PROBE, "default")
    except ForeignError as error:
        raise ForeignError(f"--pluto must be a polycc that schedules a copy of an array, got {polycc}: {error}") from error
    return program


def schedule_by_pluto(polycc: str, text: str, variant: str, limit_s: float = SCHEDULE_S) -> str:
    """The C program `text` with its region as a variant of Pluto's schedules it, for gcc.

    Pluto's `#pragma ivdep` is written as gcc's, which ignores other compilers'.

    Raises:
        ForeignError: polycc fails, says nothing, or takes longer than `limit_s` seconds.
    """
    asked = PLUTO[variant]
    with tempfile.TemporaryDirectory(prefix="pluto-") as name:  # polycc leaves files, of fixed names, where it runs
        directory = Path(name)
        (directory / "kernel.c").write_text(text)
        if asked.tiles:
            sizes = [*asked.tiles, *[asked.tiles[-1]] * (SIZES - len(asked.tiles))]
            (directory / "tile.sizes").write_text("".join(f"{size}\n" for size in sizes))
        command = [polycc, "kernel.c", *asked.options, "-o", "scheduled.c"]
        try:
            status, words = wait_for(command, limit_s, directory=directory, output=True)
        except TimeoutError as error:
            raise ForeignError(f"polycc {error}") from error
        except OSError as error:
            raise ForeignError(f"polycc must be a program that runs, got {error}") from error
        made = directory / "scheduled.c"
        scheduled = made.read_text(errors="replace") if made.is_file() else ""
    if status or not scheduled.strip() or re.search(r"^\s*#\s*pragma\s+scop\b", scheduled, re.M):
        raise ForeignError(f"polycc must schedule the region, got exit status {status}: {' '.join(words.split())[-300:]}")
    scheduled = re.sub(r"^[ \t]*#[ \t]*pragma[ \t]+vector[ \t]+always[ \t]*\n", "", scheduled, flags=re.M)
    return re.sub(r"^([ \t]*#[ \t]*pragma[ \t]+)ivdep\b", r"\1GCC ivdep", scheduled, flags=re.M)


def check_polly(clang: str) -> dict[str, tuple[str, ...]]:
    """The commands that compile with clang alone, and with clang and Polly: `{"clang": ..., "Polly": ...}`.

    Raises ForeignError in one sentence where clang is not there or has no Polly.
    """
    program = _program("--polly", clang)
    commands = {"clang": (program, *CLANG), "Polly": (program, *POLLY)}
    with tempfile.TemporaryDirectory(prefix="polly-") as name:
        source = Path(name) / "probe.c"
        source.write_text(PROBE)
        for command in commands.values():
            try:
                status, words = wait_for([*command, "-c", str(source), "-o", str(source.with_suffix(".o"))], SCHEDULE_S)
            except (TimeoutError, OSError) as error:
                raise ForeignError(f"--polly must be a clang that compiles a copy of an array, got {clang}: {error}") from error
            if status:
                raise ForeignError(f"--polly must be a clang with Polly, got {clang}: {' '.join(words.split())[:300]}")
    return commands


def _program(option: str, name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ForeignError(f"{option} must be the path of a program, or one on PATH, got {name}")
    return str(Path(path).absolute())
