"""The scheduler: one integer program per dimension, with costs, constraints and fusion taken from a configuration.

For every statement S a dimension is an affine form phi_S = T_it . i + T_par . N + T_cst. Legality of the dependences that no
earlier dimension carries is linear in the T by Farkas' lemma; dimensions are added to a permutable band until none exists that
is independent of the earlier ones, then what the band carries is dropped and the next band begins.
"""

from dataclasses import dataclass, field, replace
from itertools import count
from math import gcd, prod
from pathlib import Path

import islpy as isl

from npu_sparse.schedule import config as configuration
from npu_sparse.schedule.config import Config, ConfigError, Constraint, Dimension
from npu_sparse.schedule.farkas import Dependence
from npu_sparse.schedule.ilp import Model, SolverTimeoutError, Terms
from npu_sparse.schedule.plan import Band, Leaf, Loop, Node, Plan, Sequence, original
from npu_sparse.schedule.scop import Scop, Statement


class InfeasibleError(ConfigError):
    """No schedule exists under the configuration."""


@dataclass(frozen=True)
class Form:
    """phi of one statement: coefficients of iterators and parameters, and a constant."""

    it: tuple[int, ...]
    par: tuple[int, ...]
    cst: int


@dataclass(frozen=True)
class Row:
    """One dimension: a form per statement; whether it is zero on every dependence active where its band starts, and whether
    it is so on all that are not about the storage of temporaries."""

    forms: dict[str, Form]
    parallel: bool = False
    private: bool = False

    def __getitem__(self, name: str) -> Form:
        return self.forms[name]


@dataclass(frozen=True)
class Attempt:
    """What a strategy callback is told before each attempt at a dimension; it returns a config.Dimension or None to give up.

    Attributes:
        dimension: the scheduling dimension, counted from the outermost, scalar dimensions not included.
        number: 0 for the first attempt at this dimension; higher when the previous answer had no solution.
        statements: names of the statements scheduled together.
        band: rows found in the current band; empty where a band starts.
        outer: rows of enclosing bands.
        active: labels of the dependences the row must respect.
    """

    dimension: int
    number: int
    statements: tuple[str, ...]
    band: tuple[Row, ...]
    outer: tuple[Row, ...]
    active: tuple[str, ...]


@dataclass
class Problem:
    """A scop in the form the integer programs need."""

    scop: Scop
    config: Config
    statements: dict[str, Statement]
    fixed: dict[str, list[tuple[int, ...]]]  # directions in which a domain is flat: they need no loop
    extents: tuple[int, ...] = ()
    dependences: tuple[Dependence, ...] = ()
    notes: list[str] = field(default_factory=list)

    def depth(self, name: str) -> int:
        return len(self.statements[name].iterators) - len(self.fixed[name])


# ---------------------------------------------------------------------------------------------------------------------- public


def schedule(scop: Scop, config: Config | str | Path, dependences: list | None = None) -> Plan:
    """A legal plan for the scop under a strategy: a Config, the name of a shipped one, or a YAML file.

    Where the strategy finds no schedule or the solver runs out of time, the plan is made without fusion, then by isl's
    scheduler, then in the original order; Plan.notes says so. The plan has passed the independent legality check.

    Args:
        dependences: of dependences.dependences(scop), when the caller has them already.

    Raises:
        ConfigError: the configuration contradicts itself or asks for something illegal; names the constraint or dependence.
    """
    from npu_sparse.schedule import transform

    if not isinstance(config, Config):
        config = configuration.load(config)
    from npu_sparse.schedule.dependences import dependences as analyse

    if dependences is None:
        dependences = analyse(scop)
    if config.relax_reductions:
        # The relaxed analysis orders what is before or after a reduction with all of its updates.
        dependences = [*analyse(scop, relax_reductions=True), *(d for d in dependences if d.reduction)]
    problem = prepare(scop, config)
    active = split(problem, dependences)
    check_requests(problem, active)
    notes: list[str] = []
    for label, settings in (("", config), ("without fusion", replace(config, fusion_heuristic="none", fusion={}))):
        problem.config, problem.notes = settings, []
        try:
            root = build(problem, active)
        except (InfeasibleError, SolverTimeoutError) as error:
            if isinstance(error, InfeasibleError) and restricted(config):
                raise
            notes.append(f"strategy {config.name}{' ' * bool(label) + label}: {error}; trying the next fallback")
            continue
        plan = Plan(scop, root, config.name, (*notes, *problem.notes))
        plan = transform.apply(plan, config)
        check_directives(plan, problem, active)
        violation = _violation(plan, config.relax_reductions)
        if violation is None:
            return plan
        notes.append(f"strategy {config.name}{' ' * bool(label) + label}: {violation}; trying the next fallback")
    plan = from_isl(scop, active)
    if plan is not None and _violation(plan := transform.apply(plan, config)) is None:
        return replace(plan, strategy=config.name, notes=(*notes, "scheduled by isl's scheduler"))
    return replace(original(scop), strategy=config.name, notes=(*notes, "kept in the original order"))


def restricted(config: Config) -> bool:
    """Whether the user asked for something a fallback would silently drop."""
    own = any(dimension.constraints for dimension in config.dimensions.values())
    return bool(own or config.custom_constraints or config.directives or config.fusion or config.callback)


def prepare(scop: Scop, config: Config) -> Problem:
    statements = {statement.name: statement for statement in scop.statements}
    fixed = {statement.name: _flat_directions(statement.domain) for statement in scop.statements}
    problem = Problem(scop, config, statements, fixed)
    if config.constant_to_parameter:
        problem.extents = _extents(scop, config.constant_to_parameter)
    return problem


def split(problem: Problem, dependences: list) -> list[Dependence]:
    """The dependences, one per basic map, aligned to the scop's parameters and restricted to its context."""
    scop = problem.scop
    found = []
    for item in dependences:
        relation = isl.Map.from_basic_map(item.relation) if isinstance(item.relation, isl.BasicMap) else item.relation
        relation = relation.align_params(scop.context.get_space()).intersect_params(scop.context)
        lines = [f"{name} (line {problem.statements[name].line})" for name in (item.source, item.sink)]
        label = f"{item.kind} on {item.array} from {lines[0]} to {lines[1]}"
        for piece in relation.get_basic_maps():
            if not piece.is_empty():
                flow = item.kind == "RAW"
                relaxed = item.reduction and problem.config.relax_reductions
                found.append(Dependence(item.source, item.sink, piece, label, problem.extents, item.array, flow, relaxed))
    problem.dependences = tuple(found)
    return found


# ---------------------------------------------------------------------------------------------------------------- tree building


def build(problem: Problem, active: list[Dependence]) -> Node:
    names = tuple(problem.statements)
    return _group(problem, names, active, (), {name: () for name in names})


def _group(problem: Problem, names: tuple[str, ...], active: list[Dependence], outer: tuple[Row, ...], rows: dict) -> Node:
    """The tree of statements that share the rows `outer`; `rows` are the independent iterator parts found per statement."""
    missing = {name: problem.depth(name) - len(rows[name]) for name in names}
    if not any(missing.values()):
        return _order(names, active)
    groups = _fusion(problem, names, active, outer, rows, missing)
    if len(groups) > 1:
        return _sequence(problem, groups, active, outer, rows)
    band, independent = _band(problem, names, active, outer, rows)
    if not band:
        _refuse_forced(problem, names, active, len(outer), rows)
        groups = _separate(problem, names, active, outer, rows)
        if len(groups) > 1:
            return _sequence(problem, groups, active, outer, rows)
        band, independent = _band(_relaxed(problem), names, active, outer, rows)
        if not band:
            raise explain(problem, names, active, outer, rows)
        allowed = "reversal, parametric shifts and coefficients up to 8 were allowed, parallelism was not required"
        problem.notes.append(f"{', '.join(names)}: no row as configured; {allowed}")
    loops, remaining = _close(problem, names, band, active)
    child = _group(problem, names, remaining, (*outer, *band), independent)
    permutable = len(loops) > 1
    return Band(tuple(loops), child, permutable)


def _sequence(problem: Problem, groups: list[tuple[str, ...]], active: list[Dependence], outer: tuple, rows: dict) -> Sequence:
    children = []
    for group in groups:
        inside = [d for d in active if d.source in group and d.sink in group]
        children.append((group, _group(problem, group, inside, outer, rows)))
    return Sequence(tuple(children))


def _order(names: tuple[str, ...], active: list[Dependence]) -> Node:
    """Statements whose instances share a time stamp, in an order that respects what is left of the dependences."""
    if len(names) == 1:
        return Leaf()
    components = strong_components(names, [d for d in active if not d.own])
    broken = [group for group in components if len(group) > 1]
    if broken:
        raise InfeasibleError(f"statements {', '.join(broken[0])} must have an order at equal time stamps, got a cycle")
    return Sequence(tuple((group, Leaf()) for group in components))


def _band(problem: Problem, names: tuple[str, ...], active: list[Dependence], outer: tuple[Row, ...], rows: dict):
    """Rows of a permutable band, as many as there are, and the independent iterator parts with them."""
    band: list[Row] = []
    rows = dict(rows)
    while any(missing := [problem.depth(name) - len(rows[name]) for name in names]):
        if band and not all(missing) and not problem.config.code_sinking:
            break
        row, dimension = _row(problem, names, active, tuple(band), outer, rows)
        if row is None:
            break
        band.append(
            replace(row, parallel=all(_is_zero(d, row) for d in active), private=_is_private(problem, names, active, row))
        )
        before = sum(map(len, rows.values()))
        for name in names:
            if _outside([*problem.fixed[name], *rows[name]], row[name].it):
                rows[name] = (*rows[name], row[name].it)
        assert sum(map(len, rows.values())) > before
        if "feautrier" in dimension.cost_functions:
            break  # Feautrier's algorithm drops what a row satisfies at once, and so wants no band
    return band, rows


def _is_private(problem: Problem, names: tuple[str, ...], active: list[Dependence], row: Row) -> bool:
    """Whether the row is parallel once temporaries are private, where the configuration counts that."""
    if not problem.config.privatisation:
        return False
    temporaries = _temporaries(problem, names)
    return all(_is_zero(d, row) or (not d.flow and d.array in temporaries) for d in active)


def _row(problem: Problem, names: tuple[str, ...], active: list[Dependence], band: tuple, outer: tuple, rows: dict):
    """The next row and the Dimension that produced it; (None, None) when no attempt has a solution."""
    config, number = problem.config, len(outer) + len(band)
    hopeless: set = set()
    dimension = None
    for attempt in count():
        if config.callback is not None:
            labels = tuple(d.label for d in active)
            dimension = config.callback(Attempt(number, attempt, names, band, outer, labels))
        else:
            dimension = config.dimension(number) if attempt == 0 else dimension.otherwise
        if dimension is None:
            return None, None
        if dimension.require_parallel == "outermost":
            wanted = not any(row.parallel or row.private for row in (*outer, *band))
            dimension = replace(dimension, require_parallel=wanted)
        # Costs do not change whether a row exists, so an attempt that differs in nothing else is not worth its time.
        key = (dimension.no_skewing, dimension.require_parallel, dimension.constraints)
        if key in hopeless or (dimension.starts_band and band):
            continue
        program = Program(problem, names, active, number, dimension, rows)
        row = program.solve()
        if row is not None:
            return row, dimension
        hopeless.add(key)


def _relaxed(problem: Problem) -> Problem:
    """The problem with every row allowed that the original order could need."""
    bound = max(problem.config.coefficient_bound, 8)
    dimensions = {None: Dimension()} if not restricted(problem.config) else problem.config.dimensions
    settings = replace(
        problem.config, negative_coefficients=True, parametric_shift=True, coefficient_bound=bound, dimensions=dimensions
    )
    return replace(problem, config=settings)


def _close(problem: Problem, names: tuple[str, ...], band: list[Row], active: list[Dependence]):
    """The band's loops with their parallelism, and the dependences that none of them carries."""
    remaining = active
    loops = []
    temporaries = _temporaries(problem, names)
    for row in band:
        free = row.parallel or all(_is_zero(d, row) for d in remaining)
        exprs = {name: text(row[name], problem.statements[name].iterators, problem.scop.parameters) for name in names}
        private = free or all(_is_zero(d, row) or (not d.flow and d.array in temporaries) for d in remaining)
        loops.append(Loop(exprs, row.parallel, free, private))
        remaining = [left for d in remaining if (left := _left(d, row)) is not None]
    return loops, remaining


def _temporaries(problem: Problem, names: tuple[str, ...]) -> frozenset[str]:
    """Arrays whose values live among the statements alone: none enters, leaves, or is wanted afterwards.

    An iteration of a loop that carries no flow of such an array may have a copy of its own, which code generation provides.
    """
    found = set()
    for array in {d.array for d in problem.dependences if not d.flow and d.source in names and d.sink in names}:
        flows = [d for d in problem.dependences if d.flow and d.array == array]
        inside = all((d.source in names) == (d.sink in names) for d in flows)
        if inside and not problem.scop.arrays[array].live_out and all(_fed(problem, name, array, flows) for name in names):
            found.add(array)
    return frozenset(found)


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


def difference(dependence: Dependence, row: Row, lifted: int = 0) -> tuple[int, ...]:
    """Coefficients of phi_sink - phi_source, in the columns of the dependence's cone."""
    source, sink = row[dependence.source], row[dependence.sink]
    if dependence.own:
        return (0, *[0] * (len(source.par) + lifted), *source.it)
    parameters = [b - a for a, b in zip(source.par, sink.par)]
    return (sink.cst - source.cst, *parameters, *[0] * lifted, *[-a for a in source.it], *sink.it)


def _is_zero(dependence: Dependence, row: Row) -> bool:
    vector = difference(dependence, row, len(dependence.lifted))
    return not any(vector) or (dependence.cone.contains(vector) and dependence.cone.contains(tuple(-x for x in vector)))


def _left(dependence: Dependence, row: Row) -> Dependence | None:
    """What the row does not carry of a dependence that it respects, or, for a relaxed one, that it does not separate."""
    vector = difference(dependence, row, len(dependence.lifted))
    if _is_zero(dependence, row):
        return dependence
    if dependence.cone.contains((vector[0] - 1, *vector[1:])):
        return None
    relation = dependence.relation.add_constraint(_constraint(dependence, row, 0, equality=True))
    return None if relation.is_empty() else replace(dependence, relation=relation, _cone=None)


def _constraint(dependence: Dependence, row: Row, constant: int, equality: bool = False, sign: int = 1) -> isl.Constraint:
    """sign * (phi_sink - phi_source) + constant = 0 or >= 0, over the pairs of the dependence."""
    space = isl.LocalSpace.from_space(dependence.relation.get_space())
    result = (isl.Constraint.equality_alloc if equality else isl.Constraint.inequality_alloc)(space)
    source, sink = row[dependence.source], row[dependence.sink]
    result = result.set_constant_val(isl.Val(sign * (sink.cst - source.cst) + constant))
    for kind, values in (
        (isl.dim_type.param, [b - a for a, b in zip(source.par, sink.par)]),
        (isl.dim_type.in_, [-a for a in source.it]),
        (isl.dim_type.out, sink.it),
    ):
        for place, value in enumerate(values):
            if value:
                result = result.set_coefficient_val(kind, place, isl.Val(sign * value))
    return result


def text(form: Form, iterators: tuple[str, ...], parameters: tuple[str, ...]) -> str:
    """The form in isl's notation: "2t + i + 1"."""
    result = ""
    for factor, name in [*zip(form.it, iterators), *zip(form.par, parameters), (form.cst, "")]:
        if factor:
            size = str(abs(factor)) if abs(factor) != 1 or not name else ""
            result += (" - " if factor < 0 else " + ") + size + name
    if not result:
        return "0"
    return result[3:] if result.startswith(" + ") else "-" + result[3:]


# ------------------------------------------------------------------------------------------------------------------- fusion


def strong_components(names: tuple[str, ...], active: list[Dependence]) -> list[tuple[str, ...]]:
    """Strongly connected components of the dependence graph in a topological order that stays close to the text."""
    place = {name: i for i, name in enumerate(names)}
    after: dict[str, set[str]] = {name: set() for name in names}
    for d in active:
        after[d.source].add(d.sink)
    reach: dict[str, set[str]] = {}
    for name in names:
        seen, stack = set(), [name]
        while stack:
            for other in after[stack.pop()]:
                if other not in seen:
                    seen.add(other)
                    stack.append(other)
        reach[name] = seen
    groups: list[tuple[str, ...]] = []
    for name in names:
        if not any(name in group for group in groups):
            groups.append(tuple(other for other in names if other == name or (other in reach[name] and name in reach[other])))
    ordered: list[tuple[str, ...]] = []
    while groups:
        ready = [g for g in groups if not any(o is not g and set(g) & reach[o[0]] for o in groups)]
        first = min(ready, key=lambda group: place[group[0]])
        groups.remove(first)
        ordered.append(first)
    return ordered


def _fusion(problem: Problem, names: tuple, active: list, outer: tuple, rows: dict, missing: dict) -> list[tuple[str, ...]]:
    """The groups that go one after the other at this point; one group for everything together."""
    if len(names) == 1:
        return [names]
    config, number = problem.config, len(outer)
    asked = config.fusion_at(number)
    if asked.total_distribution:
        return strong_components(names, active)
    if asked.stmts_fusion:
        return _asked_groups(problem, asked, names, active)
    # A statement without loops left cannot be inside of the others' loops at no cost: it goes before or after them.
    if any(missing[name] == 0 for name in names):
        return _runs(strong_components(names, active), lambda group: any(missing[name] for name in group))
    if config.fusion_heuristic == "none":
        return strong_components(names, active)
    if config.fusion_heuristic == "dimensionality":
        return _runs(strong_components(names, active), lambda group: max(missing[name] for name in group))
    if config.fusion_heuristic == "parallelism":
        return _by_parallelism(problem, names, active, outer, rows)
    return [names]


def _asked_groups(problem: Problem, asked, names: tuple, active: list) -> list[tuple[str, ...]]:
    known = {statement.index: statement.name for statement in problem.scop.statements}
    for group in asked.stmts_fusion:
        for index in group:
            if index not in known:
                raise ConfigError(f"{asked.where}stmts_fusion must name statements 0 to {len(known) - 1}, got {index}")
    groups = [tuple(known[index] for index in group if known[index] in names) for group in asked.stmts_fusion]
    mentioned = {name for group in groups for name in group}
    groups += [(name,) for name in names if name not in mentioned]
    groups = [group for group in groups if group]
    place = {name: i for i, group in enumerate(groups) for name in group}
    for d in active:
        if place[d.source] > place[d.sink]:
            raise ConfigError(
                f"{asked.where}stmts_fusion must respect dependences, got {d.sink} before {d.source} against {describe(d)}"
            )
    return groups


def _refuse_forced(problem: Problem, names: tuple[str, ...], active: list, number: int, rows: dict) -> None:
    """Raises ConfigError where statements have no row together that the configuration wants fused."""
    asked = problem.config.fusion_at(number)
    wanted = {problem.scop.statements[index].name for group in asked.stmts_fusion for index in group}
    if len(names) < 2 or not wanted & set(names):
        return

    def possible(dependences) -> bool:
        return Program(problem, names, list(dependences), number, Dimension(()), rows).feasible()

    if not possible(active):
        core = _core(tuple(active), possible)
        what = f" because of {describe(core[0])}" if core else ""
        raise InfeasibleError(f"{asked.where}stmts_fusion must be possible, got no row for {' and '.join(names)} together{what}")


def _runs(components: list[tuple[str, ...]], key) -> list[tuple[str, ...]]:
    """Neighbouring components of equal key together."""
    groups: list[tuple[str, ...]] = []
    for component in components:
        if groups and key(groups[-1]) == key(component):
            groups[-1] += component
        else:
            groups.append(component)
    return groups


def _by_parallelism(problem: Problem, names: tuple, active: list, outer: tuple, rows: dict) -> list[tuple[str, ...]]:
    """Neighbouring components that depend on each other fused, if none of them has fewer outer parallel loops than alone.

    Without code sinking, components of different depth stay apart: the shallow one would fix the order of the others' loops.
    Inside of a sequential loop, however, all that can share a parallel loop does, because starting threads costs.
    """
    inside = bool(outer) and not any(row.parallel or row.private for row in outer) and not problem.config.code_sinking
    components = strong_components(names, active)
    depth = {name: problem.depth(name) - len(rows[name]) if not problem.config.code_sinking else 0 for name in names}
    alone = [_parallel_rows(problem, component, active, len(outer), rows) for component in components]
    if (
        len(set(alone)) == len(set(depth.values())) == 1
        and _connected(names, active)
        and _parallel_rows(problem, names, active, len(outer), rows) >= alone[0]
    ):
        return [names]
    groups: list[tuple[str, ...]] = []
    parallel: list[int] = []
    for component, loops in zip(components, alone):
        if inside and groups and _shares_threads(problem, groups[-1] + component, active, len(outer), rows):
            groups[-1] += component
            parallel[-1] = min(parallel[-1], loops)
            continue
        same = groups and max(depth[name] for name in component) == max(depth[name] for name in groups[-1])
        if same and parallel[-1] == loops and any(d.source in groups[-1] and d.sink in component for d in active):
            fused = groups[-1] + component
            if _parallel_rows(problem, fused, active, len(outer), rows) >= loops and (
                loops or _has_row(problem, fused, active, outer, rows)
            ):
                groups[-1] = fused
                continue
        groups.append(component)
        parallel.append(loops)
    return groups


def _shares_threads(problem: Problem, names: tuple, active: list, number: int, rows: dict) -> bool:
    """Whether the statements have a parallel row together that leaves the loops along memory for the inside."""
    inside = [d for d in active if d.source in names and d.sink in names]
    program = Program(problem, names, inside, number, Dimension((), require_parallel=True, no_skewing=True), rows)
    for name in names:
        columns, costs = program.it[name], contiguity(problem.statements[name])
        if problem.depth(name) - len(rows[name]) > 1:
            program.model.row({columns[costs.index(max(costs))]: 1}, 0, 0)
    return program.feasible()


def _connected(names: tuple, active: list) -> bool:
    """Whether dependences, in any direction, lead from every statement to every other."""
    both = [(d.source, d.sink) for d in active] + [(d.sink, d.source) for d in active]
    seen, stack = {names[0]}, [names[0]]
    while stack:
        here = stack.pop()
        new = {sink for source, sink in both if source == here} - seen
        seen |= new
        stack += new
    return seen >= set(names)


def _parallel_rows(problem: Problem, names: tuple, active: list, number: int, rows: dict) -> int:
    """How many outer parallel loops the statements can share."""
    inside = [d for d in active if d.source in names and d.sink in names]
    depth = min(problem.depth(name) - len(rows[name]) for name in names)
    if not inside:
        return depth
    found = {name: rows[name] for name in names}
    for loops in range(depth):
        row = Program(problem, names, inside, number, Dimension((), require_parallel=True), found).any_row()
        if row is None:
            return loops
        found = {name: (*found[name], row[name].it) for name in names}
    return depth


def _has_row(problem: Problem, names: tuple, active: list, outer: tuple, rows: dict) -> bool:
    inside = [d for d in active if d.source in names and d.sink in names]
    return Program(problem, names, inside, len(outer), Dimension(()), rows).feasible()


def _separate(problem: Problem, names: tuple, active: list, outer: tuple, rows: dict) -> list[tuple[str, ...]]:
    """Groups after a cut where the statements have no row together: components stay fused as long as a row exists."""
    components = strong_components(names, active)
    if len(components) == 1 or problem.config.fusion_heuristic != "max":
        return components
    groups = [components[0]]
    for component in components[1:]:
        if _has_row(problem, groups[-1] + component, active, outer, rows):
            groups[-1] += component
        else:
            groups.append(component)
    return groups if len(groups) > 1 else components


# ---------------------------------------------------------------------------------------------------------- integer programs


class Program:
    """The integer program of one dimension for statements scheduled together."""

    def __init__(self, problem: Problem, names: tuple, active: list, number: int, dimension: Dimension, rows: dict):
        self.problem, self.names, self.active, self.dimension, self.rows = problem, names, active, dimension, rows
        self.config, self.number = problem.config, number
        self.ordered = [d for d in active if not d.relaxed]
        self.model = Model()
        self.it: dict[str, list[int]] = {}
        self.par: dict[str, list[int]] = {}
        self.cst: dict[str, int] = {}
        self.size: dict[str, list[int]] = {}  # columns of |T_it|
        self.users: dict[str, int] = {}
        self.temporaries: frozenset[str] = frozenset()
        if dimension.require_parallel and self.config.privatisation:
            self.temporaries = _temporaries(problem, names)
        self.columns()
        for d in active:
            self.legal(d)
        for name in names:
            self.progress(name)
            self.directed(name)
        if dimension.no_skewing:
            for name in names:
                self.model.row({column: 1 for column in self.size[name]}, None, 1)
        for constraint in (*self.config.constraints(number), *dimension.constraints):
            self.constrain(constraint)

    def columns(self) -> None:
        config, model = self.config, self.model
        bound = config.coefficient_bound
        shift = 64 + 4 * len(self.problem.statements)
        for name in self.names:
            iterators = self.problem.statements[name].iterators
            self.it[name] = [model.column(-bound if config.negative_coefficients else 0, bound) for _ in iterators]
            self.par[name] = [model.column(0, bound if config.parametric_shift else 0) for _ in self.problem.scop.parameters]
            self.cst[name] = model.column(0, shift)
            self.size[name] = self.it[name]
            if config.negative_coefficients:
                self.size[name] = [model.column(0, bound) for _ in iterators]
                for plain, size in zip(self.it[name], self.size[name]):
                    model.row({size: 1, plain: 1})
                    model.row({size: 1, plain: -1})
        self.users = {name: model.column(0, 1000) for name in config.new_variables}

    def terms(self, d: Dependence, row: tuple[int, ...]) -> Terms:
        """row . (coefficients of phi_sink - phi_source), as terms in the columns; row is in the columns of the cone."""
        parameters, lifted = len(self.problem.scop.parameters), len(d.lifted)
        variables = row[1 + parameters + lifted :]
        found: Terms = {}

        def add(column: int, factor: int) -> None:
            found[column] = found.get(column, 0) + factor

        if d.own:
            for column, factor in zip(self.it[d.source], variables):
                add(column, factor)
            return found
        add(self.cst[d.sink], row[0])
        add(self.cst[d.source], -row[0])
        for p in range(parameters):
            add(self.par[d.sink][p], row[1 + p])
            add(self.par[d.source][p], -row[1 + p])
        depth = len(self.it[d.source])
        for column, factor in zip(self.it[d.source], variables[:depth]):
            add(column, -factor)
        for column, factor in zip(self.it[d.sink], variables[depth:]):
            add(column, factor)
        return found

    def legal(self, d: Dependence) -> None:
        """phi_sink - phi_source >= 0, or = 0 where the row has to be parallel."""
        if d.relaxed and not self.dimension.require_parallel:
            return
        parallel = self.dimension.require_parallel and (d.flow or d.array not in self.temporaries)
        for row in d.cone.equalities:
            self.model.row(self.terms(d, row), 0, 0)
        for row in d.cone.inequalities:
            self.model.row(self.terms(d, row), 0, 0 if parallel else None)

    def progress(self, name: str) -> None:
        """T_it leaves the span of the rows found so far, unless they span everything."""
        width = len(self.it[name])
        basis = _null_space([*self.problem.fixed[name], *self.rows[name]], width)
        if not basis:
            return
        model = self.model
        if not self.config.negative_coefficients and all(value >= 0 for vector in basis for value in vector):
            model.row({self.it[name][k]: 1 for vector in basis for k in range(width) if vector[k]}, 1)
            return
        # One number in a base large enough is zero only if all components outside of the span are (Pluto+).
        bound = self.config.coefficient_bound
        sizes = [bound * sum(abs(value) for value in vector) for vector in basis]
        terms: Terms = {}
        scale = 1
        for vector, size in zip(basis, sizes):
            for k in range(width):
                if vector[k]:
                    terms[self.it[name][k]] = terms.get(self.it[name][k], 0) + scale * vector[k]
            scale *= size + 1
        sign = model.column(0, 1)
        model.row({**terms, sign: scale}, 1)
        model.row({**terms, sign: scale}, None, scale - 1)

    def directed(self, name: str) -> None:
        """Coefficients that directives fix for the statement."""
        statement, model = self.problem.statements[name], self.model
        found = len(self.rows[name])
        for directive in self.config.directives:
            if statement.index not in directive.stmts:
                continue
            k = directive.iterator
            unit = [int(place == k) for place in range(len(statement.iterators))]
            last = found + 1 >= self.problem.depth(name)
            if directive.type == "vectorize" and found < self.problem.depth(name):
                if last:
                    for column, value in zip(self.it[name], unit):
                        model.row({column: 1}, value, value)
                else:
                    model.row({self.it[name][k]: 1}, 0, 0)
            if directive.type == "parallel" and found == 0:
                for column, value in zip(self.it[name], unit):
                    model.row({column: 1}, value, value)
                for d in self.active:
                    if name in (d.source, d.sink):
                        for row in (*d.cone.equalities, *d.cone.inequalities):
                            model.row(self.terms(d, row), 0, 0)

    def constrain(self, constraint: Constraint) -> None:
        """The constraint on the columns, once per statement where it speaks of Si."""
        general = any(name.startswith("Si_") for _, name in constraint.terms)
        for chosen in self.names if general else (None,):
            terms: Terms = {}
            known = True
            for factor, name in constraint.terms:
                columns = self.named(name, chosen, constraint)
                known &= columns is not None
                for column in columns or ():
                    terms[column] = terms.get(column, 0) + factor
            if known:
                value = -constraint.constant
                lower = None if constraint.relation == "<=" else value
                upper = None if constraint.relation == ">=" else value
                self.model.row(terms, lower, upper)

    def named(self, name: str, chosen: str | None, constraint: Constraint) -> list[int] | None:
        """Columns that a name stands for; None when it speaks of a statement scheduled elsewhere."""
        if name in self.users:
            return [self.users[name]]
        head, kind, *rest = name.split("_")
        statement = chosen if head == "Si" else f"S{head[1:]}"
        if statement not in self.problem.statements:
            last = len(self.problem.statements) - 1
            raise ConfigError(f"{constraint.where}constraint must name statements S0 to S{last}, got {name!r}")
        if statement not in self.names:
            return None
        if kind == "cst":
            return [self.cst[statement]]
        columns = self.it[statement] if kind == "it" else self.par[statement]
        if rest[0] == "i":
            return list(columns)
        if int(rest[0]) >= len(columns):
            if head == "Si":
                return None
            what = "iterators" if kind == "it" else "parameters"
            raise ConfigError(f"{constraint.where}constraint must name the {len(columns)} {what} of {statement}, got {name!r}")
        return [columns[int(rest[0])]]

    def objectives(self) -> list[Terms]:
        makers = {
            "proximity": self.proximity,
            "feautrier": self.feautrier,
            "contiguity": lambda: [self.weighted(contiguity)],
            "contiguous_last": self.contiguous_last,
            "big_loops_first": lambda: [self.weighted(lambda s: small_loops(s, self.problem.scop))],
        }
        levels: list[Terms] = []
        for cost in self.dimension.cost_functions:
            levels += [{self.users[cost]: 1}] if cost in self.users else makers[cost]()
        # Fixed tie-break: few and small coefficients, earlier iterators first, no parameters, then small shifts.
        depth = max((len(columns) for columns in self.it.values()), default=0)
        simple: Terms = {}
        for name in self.names:
            simple.update({column: 8 * (depth + 1) for column in self.par[name]})
            simple.update({column: depth + 1 + place for place, column in enumerate(self.size[name])})
        shifts = {self.cst[name]: 1 for name in self.names}
        # Of equal rows, the one with positive leading coefficients.
        return [*levels, simple, shifts, *([self.signs()] if self.config.negative_coefficients else [])]

    def signs(self) -> Terms:
        return {column: -1 for name in self.names for column in self.it[name]}

    def proximity(self) -> list[Terms]:
        """phi_sink - phi_source <= u . N + w on every dependence; u first, then w."""
        parameters = len(self.problem.scop.parameters)
        u = [self.model.column(0, 64) for _ in range(parameters + len(self.problem.extents))]
        w = self.model.column(0, 10**7)
        if self.dimension.require_parallel:
            return []
        for d in self.ordered:
            for rows, equality in ((d.cone.equalities, True), (d.cone.inequalities, False)):
                for row in rows:
                    terms = {column: -factor for column, factor in self.terms(d, row).items()}
                    terms[w] = row[0]
                    terms.update({column: row[1 + p] for p, column in enumerate(u)})
                    self.model.row(terms, 0, 0 if equality else None)
        return [{column: 1 for column in u}, {w: 1}]

    def feautrier(self) -> list[Terms]:
        """phi_sink - phi_source >= e with e = 1 for as many dependences as possible."""
        satisfied = {}
        for d in self.ordered:
            e = self.model.column(0, 1)
            satisfied[e] = -1
            for rows, equality in ((d.cone.equalities, True), (d.cone.inequalities, False)):
                for row in rows:
                    self.model.row({**self.terms(d, row), e: -row[0]}, 0, 0 if equality else None)
        return [satisfied]

    def contiguous_last(self) -> list[Terms]:
        """One per statement of the largest depth whose most contiguous iterator would not be its last."""
        deepest = max(len(columns) for columns in self.it.values())
        terms: Terms = {}
        for name in self.names:
            costs = contiguity(self.problem.statements[name])
            if len(costs) == deepest and self.problem.depth(name) - len(self.rows[name]) > 1:
                terms[self.size[name][costs.index(max(costs))]] = 1
        return [terms]

    def weighted(self, costs) -> Terms:
        return {
            column: cost for name in self.names for column, cost in zip(self.size[name], costs(self.problem.statements[name]))
        }

    def feasible(self) -> bool:
        return self.model.lexmin([], self.config.time_limit) is not None

    def solve(self) -> Row | None:
        row = self.row(self.model.lexmin(self.objectives(), self.config.time_limit))
        if not self.model.optimal:
            self.problem.notes.append(
                f"dimension {self.number} of {', '.join(self.names)}: not the best row within the time limit"
            )
        return row

    def any_row(self) -> Row | None:
        return self.row(self.model.lexmin([], self.config.time_limit))

    def row(self, solution: list[int] | None) -> Row | None:
        if solution is None:
            return None
        row = Row(
            {
                name: Form(
                    tuple(solution[column] for column in self.it[name]),
                    tuple(solution[column] for column in self.par[name]),
                    solution[self.cst[name]],
                )
                for name in self.names
            }
        )
        assert all(d.cone.contains(difference(d, row, len(d.lifted))) for d in self.ordered)
        return row


def contiguity(statement: Statement) -> list[int]:
    """A cost per iterator, large for one that runs along the last subscript of many accesses and moves nothing else.

    Writes count twice, and every dimension of an array fourfold: jumping through a matrix costs more than through a vector.
    """
    costs = []
    for place in range(len(statement.iterators)):
        cost = 0
        for access, weight in [*((a, 2) for a in statement.writes), *((a, 1) for a in statement.reads)]:
            along = [step(access.relation, place, k) for k in range(access.relation.dim(isl.dim_type.out))]
            weight *= 4 ** (len(along) - 1) if along else 0
            if not any(along):
                cost += weight  # the element stays in a register
            elif abs(along[-1]) == 1 and not any(along[:-1]):
                cost += 4 * weight
        costs.append(cost)
    return costs


def step(relation: isl.Map, place: int, subscript: int) -> int:
    """How far the subscript of an access moves with the iterator at that place."""
    for piece in relation.get_basic_maps():
        for constraint in piece.get_constraints():
            if constraint.is_equality() and constraint.involves_dims(isl.dim_type.out, subscript, 1):
                return constraint.get_coefficient_val(isl.dim_type.in_, place).to_python()
    return 0


def small_loops(statement: Statement, scop: Scop) -> list[int]:
    """A cost per iterator: how many iterators have a larger extent, with every parameter set to 1000."""
    sizes = [_extent(statement.domain.intersect_params(scop.context), place) for place in range(len(statement.iterators))]
    return [sum(other > size for other in sizes) for size in sizes]


def _extent(domain: isl.Set, place: int) -> int:
    for p in range(domain.dim(isl.dim_type.param)):
        domain = domain.fix_val(isl.dim_type.param, p, isl.Val(1000))
    if domain.is_empty():
        return 0
    high, low = domain.dim_max_val(place), domain.dim_min_val(place)
    return high.sub(low).to_python() + 1 if high.is_int() and low.is_int() else 10**9


# -------------------------------------------------------------------------------------------------------- mistakes and witnesses


def describe(dependence: Dependence) -> str:
    """The dependence with one pair of instances as a witness."""
    return f"{dependence.label}, such as {witness(dependence.relation)}"


def witness(relation: isl.BasicMap) -> str:
    """One pair of instances of a relation: "S0[0, 1] -> S1[1, 1] (n = 4)"."""
    point = relation.sample()
    values = {kind: [] for kind in (isl.dim_type.param, isl.dim_type.in_, isl.dim_type.out)}
    for kind, found in values.items():
        for place in range(point.dim(kind)):
            found.append(str(point.plain_get_val_if_fixed(kind, place)))
    names = [point.get_tuple_name(kind) for kind in (isl.dim_type.in_, isl.dim_type.out)]
    pair = [f"{name}[{', '.join(values[k])}]" for name, k in zip(names, (isl.dim_type.in_, isl.dim_type.out))]
    parameters = [f"{point.get_dim_name(isl.dim_type.param, p)} = {value}" for p, value in enumerate(values[isl.dim_type.param])]
    return f"{pair[0]} -> {pair[1]}" + (f" ({', '.join(parameters)})" if parameters else "")


def check_requests(problem: Problem, active: list[Dependence]) -> None:
    """Raises ConfigError for directives that speak of what the scop does not have, or that exclude each other."""
    last = len(problem.statements) - 1
    seen: dict[tuple[int, str], int] = {}
    kinds: dict[tuple[int, int], str] = {}
    for directive in problem.config.directives:
        for index in directive.stmts:
            if index > last:
                raise ConfigError(f"{directive.where}directive must name statements 0 to {last}, got {index}")
            statement = problem.scop.statements[index]
            if directive.iterator >= len(statement.iterators):
                depth = len(statement.iterators)
                raise ConfigError(
                    f"{directive.where}iterator of {statement.name} must be below {depth}, got {directive.iterator}"
                )
            other = seen.setdefault((index, directive.type), directive.iterator)
            if directive.type != "sequential" and other != directive.iterator:
                both = f"{other} and {directive.iterator}"
                raise ConfigError(f"{directive.where}{statement.name} must have one {directive.type} iterator, got {both}")
            opposite = kinds.setdefault((index, directive.iterator), directive.type)
            if "sequential" in (opposite, directive.type) and opposite != directive.type:
                raise ConfigError(
                    f"{directive.where}iterator {directive.iterator} of {statement.name} must have one directive, "
                    f"got {opposite} and {directive.type}"
                )


def explain(problem: Problem, names: tuple, active: list, outer: tuple, rows: dict) -> InfeasibleError:
    """Why the statements have no further row: contradictory constraints, or the dependence that forbids what was asked."""
    number = len(outer)
    dimension = problem.config.dimension(number)
    asked = (*problem.config.constraints(number), *dimension.constraints)
    where = f"dimension {number} of {', '.join(names)}"

    def possible(dependences: list, constraints: tuple, directives: tuple = problem.config.directives) -> bool:
        settings = replace(problem.config, custom_constraints={None: constraints}, directives=directives)
        loose = replace(dimension, constraints=())
        return Program(replace(problem, config=settings), names, dependences, number, loose, rows).feasible()

    if asked and not possible([], asked, ()):
        core = _core(asked, lambda items: possible([], items, ()))
        listed = " and ".join(repr(item.text) for item in core)
        return InfeasibleError(f"{core[0].where}constraints must not contradict each other, got {listed} for {where}")
    if problem.config.directives and not possible([], asked):
        core = _core(problem.config.directives, lambda items: possible([], asked, items))
        return InfeasibleError(
            f"{core[0].where}directive {core[0].type} must agree with the constraints, got none such row for {where}"
        )
    if (asked or problem.config.directives) and possible([], asked):
        core = _core(tuple(active), lambda items: possible(list(items), asked))
        place = asked[0].where if asked else problem.config.directives[0].where
        what = (
            f"constraints {', '.join(repr(c.text) for c in asked)}" if asked else f"directive {problem.config.directives[0].type}"
        )
        return InfeasibleError(f"{place}{what} must respect dependences, got no row at {where} because of {describe(core[0])}")
    worst = f" because of {describe(active[0])}" if active else ""
    return InfeasibleError(f"no row with coefficients up to {problem.config.coefficient_bound} exists for {where}{worst}")


def _core(items: tuple, possible) -> tuple:
    """A smallest set, by deletion, of items that are impossible together."""
    kept = list(items)
    for item in items:
        without = [other for other in kept if other is not item]
        if not possible(tuple(without)):
            kept = without
    return tuple(kept)


def check_directives(plan: Plan, problem: Problem, active: list[Dependence]) -> None:
    """Raises ConfigError when a vectorize directive ended on a loop that carries a dependence."""
    for directive in problem.config.directives:
        if directive.type != "vectorize":
            continue
        for index in directive.stmts:
            statement = problem.scop.statements[index]
            loops = [loop for names, band in plan.bands() if statement.name in names for loop in band.inner()]
            loop = loops[-1] if loops else None
            if loop is not None and (loop.free or loop.coincident):
                continue
            unit = tuple(int(place == directive.iterator) for place in range(len(statement.iterators)))
            form = Form(unit, (0,) * len(problem.scop.parameters), 0)
            own = [d for d in active if d.own and d.source == statement.name and not _is_zero(d, Row({statement.name: form}))]
            reason = f" because of {describe(own[-1])}" if own else ""
            name = statement.iterators[directive.iterator]
            raise ConfigError(
                f"{directive.where}vectorize must name a loop that carries nothing, got {name} of {statement.name}{reason}"
            )


def _violation(plan: Plan, relax_reductions: bool = False) -> str | None:
    """The first violation that the independent check finds, as a phrase."""
    from npu_sparse.schedule import legality

    violations = legality.check(plan.scop, plan.union_map(), relax_reductions)
    return f"illegal schedule: {violations[0]}" if violations else None


# ------------------------------------------------------------------------------------------------------------------- isl's own


def from_isl(scop: Scop, active: list[Dependence]) -> Plan | None:
    """The plan of isl's own scheduler; None where it finds none, or one with rows that are not plain affine forms."""
    relation = isl.UnionMap.empty(scop.context.get_space())
    for d in active:
        relation = relation.union(isl.UnionMap.from_basic_map(d.relation))
    constraints = isl.ScheduleConstraints.on_domain(scop.domain().intersect_params(scop.context))
    constraints = constraints.set_validity(relation).set_proximity(relation).set_coincidence(relation)
    names = tuple(statement.name for statement in scop.statements)
    try:
        found = constraints.compute_schedule()
    except isl.Error:  # it cannot carry every dependence
        return None
    root = _from_node(found.get_root(), names, scop)
    return None if root is None else Plan(scop, root, "isl's scheduler")


def _from_node(node: isl.ScheduleNode, names: tuple[str, ...], scop: Scop) -> Node | None:
    kind = node.get_type()
    if kind == isl.schedule_node_type.leaf:
        return Leaf() if len(names) == 1 else Sequence(tuple(((name,), Leaf()) for name in names))
    if kind in (isl.schedule_node_type.domain, isl.schedule_node_type.filter):
        return _from_node(node.child(0), names, scop)
    if kind in (isl.schedule_node_type.sequence, isl.schedule_node_type.set):
        children = []
        for place in range(node.n_children()):
            points = node.child(place).filter_get_filter()
            present: list[str] = []
            points.foreach_set(lambda piece, present=present: present.append(piece.get_tuple_name()))
            group = tuple(name for name in names if name in present)
            children.append((group, _from_node(node.child(place), group, scop)))
        return None if any(child is None for _, child in children) else Sequence(tuple(children))
    if kind != isl.schedule_node_type.band:
        return None
    partial = node.band_get_partial_schedule()
    child = _from_node(node.child(0), names, scop)
    loops = []
    for place in range(partial.dim(isl.dim_type.out)):
        exprs = _exprs(partial.get_union_pw_aff(place), scop)
        if exprs is None or not set(names) <= set(exprs):
            return None
        flag = bool(node.band_member_get_coincident(place))
        loops.append(Loop({name: exprs[name] for name in names}, flag, flag))
    return None if child is None else Band(tuple(loops), child, bool(node.band_get_permutable()) and len(loops) > 1)


def _exprs(rows: isl.UnionPwAff, scop: Scop) -> dict[str, str] | None:
    found: dict[str, str] = {}
    pieces: list[isl.PwAff] = []
    rows.foreach_pw_aff(pieces.append)
    for piece in pieces:
        affs: list[isl.Aff] = []
        piece.foreach_piece(lambda _, aff, affs=affs: affs.append(aff))
        if len(affs) != 1 or affs[0].dim(isl.dim_type.div):
            return None
        name = piece.get_tuple_id(isl.dim_type.in_).get_name()
        statement = scop.statement(name)
        aff = affs[0].align_params(scop.context.get_space())
        values = [
            tuple(aff.get_coefficient_val(kind, k).to_python() for k in range(size))
            for kind, size in ((isl.dim_type.in_, len(statement.iterators)), (isl.dim_type.param, len(scop.parameters)))
        ]
        form = Form(values[0], values[1], aff.get_constant_val().to_python())
        found[name] = text(form, statement.iterators, scop.parameters)
    return found


# --------------------------------------------------------------------------------------------------------------- linear algebra


def _outside(rows: list[tuple[int, ...]], vector: tuple[int, ...]) -> bool:
    """Whether the vector is not in the span of the rows."""
    return any(_reduce(list(vector), _echelon(rows)))


def _null_space(rows: list[tuple[int, ...]], width: int) -> list[tuple[int, ...]]:
    """A basis of the vectors orthogonal to the rows."""
    pivots = _echelon(rows)
    fixed = {place for place, _ in pivots}
    basis = []
    for free in (k for k in range(width) if k not in fixed):
        scale = prod(abs(row[place]) for place, row in pivots)
        vector = [0] * width
        vector[free] = scale
        for place, row in pivots:
            vector[place] = -scale * row[free] // row[place]
        basis.append(tuple(_primitive(vector)))
    return basis


def _echelon(rows: list[tuple[int, ...]]) -> list[tuple[int, list[int]]]:
    """Reduced rows with the places of their leading entries, by exact elimination."""
    pivots: list[tuple[int, list[int]]] = []
    for row in rows:
        reduced = _reduce(list(row), pivots)
        lead = next((k for k, value in enumerate(reduced) if value), None)
        if lead is not None:
            pivots = [(place, _eliminate(old, reduced, lead)) for place, old in pivots] + [(lead, reduced)]
    return pivots


def _reduce(row: list[int], pivots: list) -> list[int]:
    for place, other in pivots:
        row = _eliminate(row, other, place)
    return row


def _eliminate(row: list[int], other: list[int], place: int) -> list[int]:
    if not row[place]:
        return row
    return _primitive([other[place] * a - row[place] * b for a, b in zip(row, other)])


def _primitive(row: list[int]) -> list[int]:
    divisor = gcd(*row)
    return [value // divisor for value in row] if divisor > 1 else row


def _flat_directions(domain: isl.Set) -> list[tuple[int, ...]]:
    """Iterator parts of the equalities that hold on the whole domain."""
    hull = domain.affine_hull()
    found: list[tuple[int, ...]] = []
    width = domain.dim(isl.dim_type.set)
    for constraint in hull.get_constraints():
        if constraint.is_equality() and not constraint.involves_dims(isl.dim_type.div, 0, hull.dim(isl.dim_type.div)):
            row = tuple(constraint.get_coefficient_val(isl.dim_type.set, k).to_python() for k in range(width))
            if _outside(found, row):
                found.append(row)
    return found


def _extents(scop: Scop, threshold: int) -> tuple[int, ...]:
    """Constant extents of loops that are at least the threshold."""
    found = set()
    for statement in scop.statements:
        for place in range(len(statement.iterators)):
            low, high = statement.domain.dim_min_val(place), statement.domain.dim_max_val(place)
            if low.is_int() and high.is_int():
                size = high.sub(low).to_python() + 1
                if size >= threshold:
                    found.add(size)
    kept: list[int] = []
    for size in sorted(found):
        if not kept or size > kept[-1] + kept[-1] // 4:
            kept.append(size)
    return tuple(kept)
