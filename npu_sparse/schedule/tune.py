"""The fastest of the promising schedules of a kernel: measured, verified, and kept in a file for the next time.

Nothing runs that has not passed the check of legality, and no time counts unless every result was bitwise the original's.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import islpy as isl

from npu_sparse.schedule.c.print import generate_file
from npu_sparse.schedule.c.run import FLAGS, run_right
from npu_sparse.schedule.candidates import ISL, PARALLEL, Choice, ranked
from npu_sparse.schedule.scop import Scop, ScopError

from ..runs.store import write_json

ORIGINAL = "original"
FIRST, TOGETHER = 6, 4  # candidates of the first measurement; and of the later ones
SIZES = ((), (32,), (32, 32, 256), (16,), (64, 16, 256), (64,))
JAMS, FUSIONS = (0, 4, 2, 8), ("", "max", "none")
FORMAT = 1


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        choice: the spelling of a Choice, or "original".
        sizes: the scalar arguments of the runs.
        speedup: of the choice over the original, in wall time of the last measurement that both were in.
        tried: seconds, the best run, of every candidate; of the original, too.
        failures: what could not be generated, run, or be right in time, and why.
    """

    function: str
    choice: str
    sizes: dict[str, float]
    threads: int
    speedup: float
    tried: dict[str, float]
    failures: dict[str, str]


def search(
    scop: Scop,
    text: str,
    sizes: dict[str, float],
    *,
    budget_s: float,
    threads: int,
    repeats: int = 2,
    flags: tuple[str, ...] = FLAGS,
    separate: bool = False,
    start: str = "",
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """The fastest schedule found in `budget_s` seconds for the region of the C program `text` at these sizes.

    First the FIRST best candidates of the model run beside the original, then neighbours of the fastest: other tiles, jams and
    fusions, and what the model ranks next. A measurement begins only while there is time for what the last one took; none is
    cut short by the budget except by a limit on each run. `start` is a choice to begin with.

    Raises:
        RunError: the original cannot be run at these sizes.
    """
    end = clock() + budget_s
    order = ranked(scop)
    trees: dict[str, isl.Schedule | None] = {str(choice): tree for choice, tree in order}  # None: schedules as another one does
    failures, tried = {}, {}
    best, speedup, last = ORIGINAL, 1.0, 0.0
    waiting = [choice for choice, _ in order]
    if start not in ("", ORIGINAL):
        waiting.insert(0, Choice.parse(start))
    count = FIRST
    while True:
        began = clock()
        sources = {ORIGINAL: text}
        if best != ORIGINAL:
            sources[best] = generate_file(scop, text, trees[best], separate=separate)
        for choice, tree in _fresh(scop, waiting, trees, tried, failures):
            try:
                sources[str(choice)] = generate_file(scop, text, tree, separate=separate)
            except ValueError as error:
                failures[str(choice)] = str(error)
            if len(sources) > count or clock() > end:
                break
        if set(sources) <= {ORIGINAL, best} and tried:
            break
        limit = max(1, math.ceil(budget_s / 4))
        results, wrong = run_right(scop, sources, sizes, threads=(threads,), repeats=repeats, flags=flags, limit_s=limit,
                                   timeout_s=limit * repeats * len(sources))  # fmt: skip
        failures |= wrong
        walls = {result.variant: min(result.wall_s) for result in results}
        for name, seconds in walls.items():
            tried[name] = min(seconds, tried.get(name, seconds))
        best = min(walls, key=walls.get)
        speedup = walls[ORIGINAL] / walls[best]
        waiting = [*_neighbours(best), *(choice for choice in waiting if str(choice) not in tried)]
        count, last = TOGETHER, max(last, clock() - began)
        if clock() + last > end:
            break
    return Tuned(scop.function, best, dict(sizes), threads, speedup, tried, failures)


def _fresh(scop: Scop, waiting: list[Choice], trees: dict, tried: dict, failures: dict) -> Iterator[tuple[Choice, isl.Schedule]]:
    """Choices with their trees that have not been measured and do not schedule as another one does."""
    for choice in waiting:
        name = str(choice)
        if name in tried or name in failures:
            continue
        if name not in trees:
            try:
                tree = choice.tree(scop)
            except ValueError as error:
                failures[name] = str(error)
                continue
            trees[name] = None if str(tree) in map(str, trees.values()) else tree
        if trees[name] is not None:
            yield choice, trees[name]


def _neighbours(name: str) -> list[Choice]:
    """Choices that differ from one in one respect."""
    if name == ORIGINAL:
        return []
    choice = Choice.parse(name)
    if choice.strategy == PARALLEL:
        return []
    neighbours = [replace(choice, sizes=sizes, preset=False) for sizes in SIZES]
    if choice.strategy != ISL:
        neighbours += [replace(choice, jam=jam) for jam in JAMS if not choice.preset]
        neighbours += [replace(choice, fusion=fusion) for fusion in FUSIONS]
    return [other for other in dict.fromkeys(neighbours) if other != choice]


def fingerprint(scop: Scop) -> str:
    """The same for regions that compute the same in the same order, whatever stands around them."""
    parts = [*scop.parameters, str(scop.context)]
    for s in scop.statements:
        accesses = [str(a.relation) for a in (*s.reads, *s.writes)]
        parts += [s.name, str(s.domain), str(s.position), " ".join(s.body.split()), *accesses]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def save(path: Path, scop: Scop, tuned: Tuned) -> None:
    """Keeps what was found for this region in a file, beside that of other regions."""
    regions = _read(path) if path.exists() else {}
    write_json(path, {"format": FORMAT, "regions": {**regions, fingerprint(scop): asdict(tuned)}})


def load(path: Path, scop: Scop) -> Tuned | None:
    """What the file has for this region, or None.

    Raises:
        ScopError: the file is not one of `save`.
    """
    if not path.exists():
        return None
    stored = _read(path).get(fingerprint(scop))
    if stored is None:
        return None
    try:
        tuned = Tuned(**stored)
        if tuned.choice != ORIGINAL:
            Choice.parse(tuned.choice)
    except (TypeError, AttributeError) as error:
        raise ScopError(f"{path} must be a file of tuned schedules, got: {error}") from error
    return tuned


def _read(path: Path) -> dict:
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ScopError(f"{path} must be a file of tuned schedules, got: {error}") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT or not isinstance(stored.get("regions"), dict):
        raise ScopError(f"{path} must be a file of tuned schedules of format {FORMAT}, got another")
    return stored["regions"]
