"""The scheduler: one integer program per dimension, with costs, constraints and fusion taken from a configuration.

For every statement S a dimension is an affine form phi_S = T_it . i + T_par . N + T_cst. Legality of the dependences that no
earlier dimension carries is linear in the T by Farkas' lemma; dimensions are added to a permutable band until none exists that
is independent of the earlier ones, then what the band carries is dropped and the next band begins.
"""

from dataclasses import replace
from itertools import count
from pathlib import Path

from npu_sparse.schedule import config as configuration
from npu_sparse.schedule import legality, transform
from npu_sparse.schedule.config import Config, Dimension
from npu_sparse.schedule.dependences import dependences as analyse
from npu_sparse.schedule.isl_baseline import from_isl
from npu_sparse.schedule.plan import Band, Leaf, Loop, Node, Plan, Sequence, original
from npu_sparse.schedule.scop import Scop
from npu_sparse.schedule.solve.farkas import Dependence
from npu_sparse.schedule.solve.fusion import groups_at, refuse_forced, separate, strong_components
from npu_sparse.schedule.solve.ilp import SolverTimeoutError
from npu_sparse.schedule.solve.problem import Attempt, InfeasibleError, Problem, prepare, restricted, split, temporary_arrays
from npu_sparse.schedule.solve.program import Program
from npu_sparse.schedule.solve.refusals import check_directives, check_requests, explain
from npu_sparse.schedule.solve.rows import Row, is_zero, remainder, text
from npu_sparse.schedule.solve.spans import outside


def schedule(scop: Scop, config: Config | str | Path, dependences: list | None = None) -> Plan:
    """A legal plan for the scop under a strategy: a Config, the name of a shipped one, or a YAML file.

    Where the strategy finds no schedule or the solver runs out of time, the plan is made without fusion, then by isl's
    scheduler, then in the original order; Plan.notes says so. The plan has passed the independent legality check.

    Args:
        dependences: of dependences.dependences(scop), when the caller has them already.

    Raises:
        ConfigError: the configuration contradicts itself or asks for something illegal; names the constraint or dependence.
    """
    if not isinstance(config, Config):
        config = configuration.load(config)
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


def build(problem: Problem, active: list[Dependence]) -> Node:
    names = tuple(problem.statements)
    return _group(problem, names, active, (), {name: () for name in names})


def _group(problem: Problem, names: tuple[str, ...], active: list[Dependence], outer: tuple[Row, ...], rows: dict) -> Node:
    """The tree of statements that share the rows `outer`; `rows` are the independent iterator parts found per statement."""
    missing = {name: problem.depth(name) - len(rows[name]) for name in names}
    if not any(missing.values()):
        return _order(names, active)
    groups = groups_at(problem, names, active, outer, rows, missing)
    if len(groups) > 1:
        return _sequence(problem, groups, active, outer, rows)
    band, independent = _band(problem, names, active, outer, rows)
    if not band:
        refuse_forced(problem, names, active, len(outer), rows)
        groups = separate(problem, names, active, outer, rows)
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
            replace(row, parallel=all(is_zero(d, row) for d in active), private=_is_private(problem, names, active, row))
        )
        before = sum(map(len, rows.values()))
        for name in names:
            if outside([*problem.fixed[name], *rows[name]], row[name].it):
                rows[name] = (*rows[name], row[name].it)
        assert sum(map(len, rows.values())) > before
        if "feautrier" in dimension.cost_functions:
            break  # Feautrier's algorithm drops what a row satisfies at once, and so wants no band
    return band, rows


def _is_private(problem: Problem, names: tuple[str, ...], active: list[Dependence], row: Row) -> bool:
    """Whether the row is parallel once temporaries are private, where the configuration counts that."""
    if not problem.config.privatisation:
        return False
    temporaries = temporary_arrays(problem, names)
    return all(is_zero(d, row) or (not d.flow and d.array in temporaries) for d in active)


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
    temporaries = temporary_arrays(problem, names)
    for row in band:
        free = row.parallel or all(is_zero(d, row) for d in remaining)
        exprs = {name: text(row[name], problem.statements[name].iterators, problem.scop.parameters) for name in names}
        private = free or all(is_zero(d, row) or (not d.flow and d.array in temporaries) for d in remaining)
        loops.append(Loop(exprs, row.parallel, free, private))
        remaining = [left for d in remaining if (left := remainder(d, row)) is not None]
    return loops, remaining


def _violation(plan: Plan, relax_reductions: bool = False) -> str | None:
    """The first violation that the independent check finds, as a phrase."""
    violations = legality.check(plan.scop, plan.union_map(), relax_reductions)
    return f"illegal schedule: {violations[0]}" if violations else None
