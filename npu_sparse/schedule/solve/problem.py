"""What the integer programs are about: the scop as numbers, and the group of statements that one of them schedules."""

from dataclasses import dataclass, field, replace

import islpy as isl

from npu_sparse.schedule.config import Config, ConfigError
from npu_sparse.schedule.scop import Scop, Statement
from npu_sparse.schedule.solve.farkas import Dependence
from npu_sparse.schedule.solve.rows import Row
from npu_sparse.schedule.solve.spans import outside


class InfeasibleError(ConfigError):
    """No schedule exists under the configuration."""


@dataclass(frozen=True)
class Attempt:
    """What a strategy callback is told before each attempt at a dimension; it returns a config.Dimension or None to give up.

    Attributes:
        dimension: the scheduling dimension, counted from the outermost, scalar dimensions not included.
        number: 0 for the first attempt at this dimension; higher when the previous answer had no solution.
        statements: names of the statements scheduled together.
        band: rows of the current band so far; empty where a band starts.
        outer: rows of enclosing bands.
        active: labels of the dependences the row must respect.
    """

    dimension: int
    number: int
    statements: tuple[str, ...]
    band: tuple[Row, ...]
    outer: tuple[Row, ...]
    active: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """A scop under a configuration, in the form the integer programs need.

    Attributes:
        statements: by name.
        fixed: statement -> directions in which its domain is flat: they need no loop.
        extents: constants that act as parameters, see Config.constant_to_parameter.
        dependences: all of them, one per basic map.
        notes: filled while scheduling with what the user should know.
    """

    scop: Scop
    config: Config
    statements: dict[str, Statement]
    fixed: dict[str, list[tuple[int, ...]]]
    extents: tuple[int, ...] = ()
    dependences: tuple[Dependence, ...] = ()
    notes: list[str] = field(default_factory=list)

    def depth(self, name: str) -> int:
        """Loops that the statement needs."""
        return len(self.statements[name].iterators) - len(self.fixed[name])


@dataclass(frozen=True)
class Group:
    """Statements scheduled together, and how far that is.

    Attributes:
        names: of the statements, in the order of the text.
        active: the dependences among them that no enclosing band carries.
        outer: rows of the enclosing bands.
        band: rows of the band that is being built.
        directions: statement -> iterator parts of its rows, those that depend on earlier ones left out.
    """

    problem: Problem
    names: tuple[str, ...]
    active: tuple[Dependence, ...]
    outer: tuple[Row, ...]
    band: tuple[Row, ...]
    directions: dict[str, tuple[tuple[int, ...], ...]]

    @property
    def number(self) -> int:
        """The scheduling dimension that comes next."""
        return len(self.outer) + len(self.band)

    def missing(self, name: str) -> int:
        """Loops that the statement still needs."""
        return self.problem.depth(name) - len(self.directions[name])

    def part(self, names: tuple[str, ...]) -> "Group":
        """Some of the statements, with the dependences among them."""
        inside = tuple(d for d in self.active if d.source in names and d.sink in names)
        return replace(self, names=names, active=inside)

    def with_row(self, row: Row) -> "Group":
        """The group after one more row of the band, which gets some statement further."""
        directions = dict(self.directions)
        for name in self.names:
            if outside([*self.problem.fixed[name], *directions[name]], row[name].it):
                directions[name] = (*directions[name], row[name].it)
        assert sum(map(len, directions.values())) > sum(map(len, self.directions.values()))
        return replace(self, band=(*self.band, row), directions=directions)

    def configured(self, **options) -> "Group":
        """The group under a configuration with other options."""
        return replace(self, problem=replace(self.problem, config=replace(self.problem.config, **options)))

    def temporaries(self) -> frozenset[str]:
        """Arrays whose values live among the statements alone: none enters, leaves, or is wanted afterwards.

        An iteration of a loop that carries no flow of such an array may have a copy of its own, which code generation provides.
        """
        problem, names = self.problem, self.names
        arrays = set()
        for array in {d.array for d in problem.dependences if not d.flow and d.source in names and d.sink in names}:
            flows = [d for d in problem.dependences if d.flow and d.array == array]
            inside = all((d.source in names) == (d.sink in names) for d in flows)
            own = problem.scop.arrays[array].sized and not problem.scop.arrays[array].live_out
            if inside and own and all(_fed(problem, name, array, flows) for name in names):
                arrays.add(array)
        return frozenset(arrays)


def prepare(scop: Scop, config: Config, dependences: list) -> Problem:
    """The problem of a scop; `dependences` as dependences.dependences gives them."""
    statements = {statement.name: statement for statement in scop.statements}
    fixed = {statement.name: _flat_directions(statement.domain) for statement in scop.statements}
    extents = _extents(scop, config.constant_to_parameter) if config.constant_to_parameter else ()
    problem = Problem(scop, config, statements, fixed, extents)
    return replace(problem, dependences=_split(problem, dependences))


def everything(problem: Problem) -> Group:
    """All statements, before the first row."""
    names = tuple(problem.statements)
    return Group(problem, names, problem.dependences, (), (), {name: () for name in names})


def _split(problem: Problem, dependences: list) -> tuple[Dependence, ...]:
    """The dependences, one per basic map, aligned to the scop's parameters and restricted to its context."""
    scop = problem.scop
    edges = []
    for item in dependences:
        relation = isl.Map.from_basic_map(item.relation) if isinstance(item.relation, isl.BasicMap) else item.relation
        relation = relation.align_params(scop.context.get_space()).intersect_params(scop.context)
        lines = [f"{name} (line {problem.statements[name].line})" for name in (item.source, item.sink)]
        label = f"{item.kind} on {item.array} from {lines[0]} to {lines[1]}"
        for piece in relation.get_basic_maps():
            if not piece.is_empty():
                flow = item.kind == "RAW"
                relaxed = item.reduction and problem.config.relax_reductions
                edges.append(Dependence(item.source, item.sink, piece, label, problem.extents, item.array, flow, relaxed))
    return tuple(edges)


def restricted(config: Config) -> bool:
    """Whether the user asked for something a fallback would silently drop."""
    own = any(dimension.constraints for dimension in config.dimensions.values())
    return bool(own or config.custom_constraints or config.directives or config.fusion or config.callback)


def _fed(problem: Problem, name: str, array: str, flows: list[Dependence]) -> bool:
    """Whether every read of the array by the statement takes a value that a flow brings."""
    for access in problem.statements[name].reads:
        if access.array == array:
            readers = access.relation.domain().intersect_params(problem.scop.context)
            for d in flows:
                if d.sink == name:
                    readers = readers.subtract(isl.Set.from_basic_set(d.relation.range()))
            if not readers.is_empty():
                return False
    return True


def _flat_directions(domain: isl.Set) -> list[tuple[int, ...]]:
    """Iterator parts of the equalities that hold on the whole domain."""
    hull = domain.affine_hull()
    directions: list[tuple[int, ...]] = []
    width = domain.dim(isl.dim_type.set)
    for constraint in hull.get_constraints():
        if constraint.is_equality() and not constraint.involves_dims(isl.dim_type.div, 0, hull.dim(isl.dim_type.div)):
            row = tuple(constraint.get_coefficient_val(isl.dim_type.set, k).to_python() for k in range(width))
            if outside(directions, row):
                directions.append(row)
    return directions


def _extents(scop: Scop, threshold: int) -> tuple[int, ...]:
    """Constant extents of loops that are at least the threshold."""
    extents = set()
    for statement in scop.statements:
        for place in range(len(statement.iterators)):
            low, high = statement.domain.dim_min_val(place), statement.domain.dim_max_val(place)
            if low.is_int() and high.is_int():
                size = high.sub(low).to_python() + 1
                if size >= threshold:
                    extents.add(size)
    kept: list[int] = []
    for size in sorted(extents):
        if not kept or size > kept[-1] + kept[-1] // 4:
            kept.append(size)
    return tuple(kept)
