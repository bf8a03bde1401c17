"""Which schedules are worth measuring on a kernel: choices of strategy, tiles and fusion, ranked by a model.

The model is linear in what a schedule tree looks like and in the strategy that made it; `weights.yaml` has the weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import islpy as isl
import yaml

from npu_sparse.schedule import config, legality
from npu_sparse.schedule.config import HEURISTICS, Tiling
from npu_sparse.schedule.dependences import dependences as analyse
from npu_sparse.schedule.isl_baseline import isl_tree, mark_parallel
from npu_sparse.schedule.plan import original
from npu_sparse.schedule.scheduler import schedule
from npu_sparse.schedule.scop import Scop, ScopError
from npu_sparse.schedule.transform import strides

NODE = isl.schedule_node_type
ISL, PARALLEL = "isl's scheduler", "original, parallel"
WEIGHTS = Path(__file__).with_name("weights.yaml")
FEATURES = (  # of a statement; those of a tree are means over its statements, which count by their depth
    "parallel outermost", "parallel inside", "parallel inside of tiles", "vector", "along memory", "across memory", "jammed",
    "skewed", "tiles of two loops", "tiles of three", "skewed tiles", "parallel innermost",
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A way to schedule: a shipped strategy, ISL, or PARALLEL (the original order on threads).

    Attributes:
        sizes: of tiles, the last one repeated; () is untiled.
        jam: unroll-and-jam factor, 0 for none.
        fusion: a fusion heuristic in place of the strategy's, "" for its own.
        preset: tiles as the strategy has them.
    """

    strategy: str
    sizes: tuple[int, ...] = ()
    jam: int = 0
    fusion: str = ""
    preset: bool = False

    def __str__(self):
        sizes = "preset" if self.preset else ",".join(map(str, self.sizes)) or "0"
        jam, fusion = f"/{self.jam}" if self.jam else "", f" fusion={self.fusion}" if self.fusion else ""
        return f"{self.strategy} {sizes}{jam}{fusion}"

    @classmethod
    def parse(cls, text: str) -> "Choice":
        """The choice of that spelling: "pluto 0", "pluto 32,32,256/4", "cpu-vector preset", "pluto-plus 32 fusion=max"."""
        rest, _, fusion = text.partition(" fusion=")
        strategy, _, tiles = rest.rpartition(" ")
        sizes, _, jam = tiles.partition("/")
        numbers = [*sizes.split(","), jam or "0"]
        known = strategy in (*config.shipped(), ISL, PARALLEL) and fusion in ("", *HEURISTICS)
        if not known or tiles != "preset" and not all(number.isdecimal() for number in numbers):
            raise ScopError(f'choice must be a strategy and tiles, such as "pluto 32,32,256/4", got {text!r}')
        if tiles == "preset":
            return cls(strategy, fusion=fusion, preset=True)
        return cls(strategy, tuple(int(size) for size in sizes.split(",") if int(size)), int(jam or 0), fusion)

    def tree(self, scop: Scop, dependences: list | None = None) -> isl.Schedule:
        """The schedule tree, which has passed the independent check of legality."""
        if self.strategy not in (PARALLEL, ISL):
            settings = config.load(self.strategy)
            if not self.preset:
                settings = replace(settings, tiling=Tiling(self.sizes, 2, True, self.jam))
            if self.fusion:
                settings = replace(settings, fusion_heuristic=self.fusion)
            return schedule(scop, settings, dependences).tree()  # plans have been checked
        tree = mark_parallel(scop, original(scop).tree()) if self.strategy == PARALLEL else isl_tree(scop, self.sizes)
        violations = legality.check(scop, tree.get_map())
        if violations:
            raise ScopError(f"{scop.source}: {self}: {violations[0]}")
        return tree


def ranked(scop: Scop) -> list[tuple[Choice, isl.Schedule]]:
    """Choices that schedule the scop differently, with their trees, the most promising by the model first."""
    weights, scored, seen = _weights(), [], set()
    dependences = analyse(scop)
    for text, bonus in weights["choices"].items():
        choice = Choice.parse(text)
        try:
            tree = choice.tree(scop, dependences)
        except ValueError:  # isl's scheduler, for one, finds none
            continue
        if str(tree) not in seen:
            seen.add(str(tree))
            value = sum(weights["features"][name] * number for name, number in zip(FEATURES, features(scop, tree)))
            scored.append((value + bonus, choice, tree))
    scored.sort(key=lambda item: -item[0])
    return [(choice, tree) for _, choice, tree in scored]


@cache
def _weights() -> dict:
    return yaml.safe_load(WEIGHTS.read_text())


def features(scop: Scop, tree: isl.Schedule) -> list[float]:
    """How much of the work of a scop has each of FEATURES in this tree, from 0 to 1."""
    total, sums = 0.0, [0.0] * len(FEATURES)
    for name, loops in _paths(tree):
        statement = scop.statement(name)
        work = 100.0 ** len(statement.iterators)
        total += work
        for k, present in enumerate(_features(loops, [strides(statement, k) for k in range(len(statement.iterators))])):
            sums[k] += work * present
    return [value / total if total else 0.0 for value in sums]


@dataclass(frozen=True)
class _Loop:
    """A loop of a statement: the coefficients of its iterators, whether it runs over tiles, its mark, whether it is parallel."""

    coefficients: tuple[int, ...]
    tiles: bool
    mark: str
    parallel: bool

    @property
    def skewed(self) -> bool:
        return not self.tiles and sum(c != 0 for c in self.coefficients) > 1


def _features(loops: list[_Loop], along: list[int]) -> tuple[bool, ...]:
    loops = [loop for loop in loops if any(loop.coefficients) or loop.tiles]
    if not loops:
        return (False,) * len(FEATURES)
    threads = next((k for k, loop in enumerate(loops) if loop.mark.startswith("parallel")), None)
    vector = any(loop.mark.startswith("vector") for loop in loops)
    last = next((loop for loop in reversed(loops) if not loop.mark.startswith("unroll")), loops[-1])
    tiled, skewed = any(loop.tiles for loop in loops), any(loop.skewed for loop in loops)
    moved = [k for k, c in enumerate(last.coefficients) if c] if not last.tiles else []
    step = along[moved[0]] if len(moved) == 1 else 0
    return (
        threads == 0, bool(threads), bool(threads) and loops[0].tiles, vector, step > 0, step < 0,
        any(loop.mark.startswith("unroll") for loop in loops), skewed, tiled and len(along) < 3, tiled and len(along) >= 3,
        tiled and skewed, not vector and last.parallel,
    )  # fmt: skip


def _paths(tree: isl.Schedule) -> Iterator[tuple[str, list[_Loop]]]:
    """Every statement with the loops around it, outermost first."""
    root = tree.get_root()
    everything = _names(root.domain_get_domain())
    todo = [(root, everything, "", {name: [] for name in everything})]
    while todo:
        node, names, mark, paths = todo.pop()
        kind = node.get_type()
        if kind == NODE.mark:
            mark = node.mark_get_id().get_name()
        elif kind == NODE.filter:
            names = _names(node.filter_get_filter())
        elif kind == NODE.band:
            paths = {name: list(paths[name]) for name in names}
            partial = node.band_get_partial_schedule()
            for member in range(node.band_n_member()):
                parallel = bool(node.band_member_get_coincident(member))
                own = mark if not member or mark.startswith("unroll") else ""  # register tiles are all of their band
                for name, loop in _row(partial.get_at(member), own, parallel).items():
                    if name in paths:
                        paths[name].append(loop)
            mark = ""
        elif kind == NODE.leaf:
            yield from ((name, paths[name]) for name in names)
        todo += [(node.child(n), names, mark, paths) for n in range(node.n_children())] if kind != NODE.leaf else []


def _row(row: isl.UnionPwAff, mark: str, parallel: bool) -> dict[str, _Loop]:
    pieces: list[isl.PwAff] = []
    row.foreach_pw_aff(pieces.append)
    loops = {}
    for piece in pieces:
        affs: list[isl.Aff] = []
        piece.foreach_piece(lambda _, aff, affs=affs: affs.append(aff))
        iterators = range(affs[0].dim(isl.dim_type.in_))
        coefficients = tuple(affs[0].get_coefficient_val(isl.dim_type.in_, k).sgn() for k in iterators)
        tiles = affs[0].dim(isl.dim_type.div) > 0
        loops[piece.get_tuple_id(isl.dim_type.in_).get_name()] = _Loop(coefficients, tiles, mark, parallel)
    return loops


def _names(domain: isl.UnionSet) -> list[str]:
    names: list[str] = []
    domain.foreach_set(lambda points: names.append(points.get_tuple_name()))
    return names
