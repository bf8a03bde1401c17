"""The scheduler: one integer program per dimension, with costs, constraints and fusion taken from a configuration.

For every statement S a dimension is an affine form phi_S = T_it . i + T_par . N + T_cst. Legality of the dependences that no
earlier dimension carries is linear in the T by Farkas' lemma; dimensions are added to a permutable band until none exists that
is independent of the earlier ones, then what the band carries is dropped and the next band begins.
"""

from dataclasses import replace
from itertools import count
from pathlib import Path

import islpy as isl

from npu_sparse.schedule import config as configuration
from npu_sparse.schedule import legality, transform
from npu_sparse.schedule.config import Config, Dimension
from npu_sparse.schedule.dependences import dependences as analyse
from npu_sparse.schedule.dependences import updates
from npu_sparse.schedule.isl_baseline import from_isl
from npu_sparse.schedule.plan import Band, Leaf, Loop, Node, Plan, Sequence, original
from npu_sparse.schedule.scop import Scop, accumulation
from npu_sparse.schedule.solve import fusion
from npu_sparse.schedule.solve.costs import step
from npu_sparse.schedule.solve.farkas import Dependence
from npu_sparse.schedule.solve.ilp import SolverTimeoutError
from npu_sparse.schedule.solve.problem import Attempt, Group, InfeasibleError, everything, prepare, restricted
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
    if config.relax_reductions:
        # The relaxed analysis orders what is before or after a reduction with all of its updates.
        dependences = [*analyse(scop, relax_reductions=True), *updates(scop)]
    elif dependences is None:
        dependences = analyse(scop)
    problem = prepare(scop, config, dependences)
    check_requests(problem)
    notes: list[str] = []
    for label, settings in (("", config), ("without fusion", replace(config, fusion_heuristic="none", fusion={}))):
        problem = replace(problem, config=settings, notes=[])
        try:
            root = _tree(everything(problem))
        except (InfeasibleError, SolverTimeoutError) as error:
            if isinstance(error, InfeasibleError) and restricted(config):
                raise
            notes.append(f"strategy {config.name}{' ' * bool(label) + label}: {error}; trying the next fallback")
            continue
        plan = Plan(scop, root, config.name, (*notes, *problem.notes))
        plan = transform.apply(plan, config)
        check_directives(plan, problem)
        violation = _violation(plan, config.relax_reductions)
        if violation is None:
            return plan
        notes.append(f"strategy {config.name}{' ' * bool(label) + label}: {violation}; trying the next fallback")
    plan = from_isl(scop, problem.dependences)
    if plan is not None and _violation(plan := transform.apply(plan, config)) is None:
        return replace(plan, strategy=config.name, notes=(*notes, "scheduled by isl's scheduler"))
    return replace(original(scop), strategy=config.name, notes=(*notes, "kept in the original order"))


def _tree(group: Group) -> Node:
    """The tree of the statements below the rows that they share."""
    if not any(map(group.missing, group.names)):
        return _order(group)
    parts = fusion.parts(group)
    if len(parts) > 1:
        return _sequence(group, parts)
    full = _band(group)
    if not full.band:
        fusion.refuse_forced(group)
        parts = fusion.separate(group)
        if len(parts) > 1:
            return _sequence(group, parts)
        full = _band(_relaxed(group))
        if not full.band:
            raise explain(group)
        allowed = "reversal, parametric shifts and coefficients up to 8 were allowed, parallelism was not required"
        group.problem.notes.append(f"{', '.join(group.names)}: no row as configured; {allowed}")
    loops, remaining = _close(full)
    inside = replace(group, active=remaining, outer=(*group.outer, *full.band), directions=full.directions)
    return Band(loops, _tree(inside), permutable=len(loops) > 1)


def _sequence(group: Group, parts: list[tuple[str, ...]]) -> Sequence:
    return Sequence(tuple((names, _tree(group.part(names))) for names in parts))


def _order(group: Group) -> Node:
    """Statements whose instances share a time stamp, in an order that respects what is left of the dependences."""
    if len(group.names) == 1:
        return Leaf()
    components = fusion.strong_components(group.names, [d for d in group.active if not d.own])
    broken = [names for names in components if len(names) > 1]
    if broken:
        raise InfeasibleError(f"statements {', '.join(broken[0])} must have an order at equal time stamps, got a cycle")
    return Sequence(tuple((names, Leaf()) for names in components))


def _band(group: Group) -> Group:
    """The group with as many rows of a permutable band as there are."""
    while any(missing := [group.missing(name) for name in group.names]):
        if group.band and not all(missing) and not group.problem.config.code_sinking:
            break
        row, dimension = _row(group)
        if row is None:
            break
        parallel = all(is_zero(d, row) for d in group.active)
        group = group.with_row(replace(row, parallel=parallel, private=_is_private(group, row)))
        if "feautrier" in dimension.cost_functions:
            break  # Feautrier's algorithm drops what a row satisfies at once, and so wants no band
    return group


def _is_private(group: Group, row: Row) -> bool:
    """Whether the row is parallel once temporaries are private, where the configuration counts that."""
    if not group.problem.config.privatisation:
        return False
    temporaries = group.temporaries()
    return all(is_zero(d, row) or (not d.flow and d.array in temporaries) for d in group.active)


def _row(group: Group) -> tuple[Row | None, Dimension | None]:
    """The next row and the Dimension that produced it; (None, None) when no attempt has a solution."""
    config = group.problem.config
    hopeless: set = set()
    dimension = None
    for attempt in count():
        if config.callback is not None:
            labels = tuple(d.label for d in group.active)
            dimension = config.callback(Attempt(group.number, attempt, group.names, group.band, group.outer, labels))
            if dimension is not None:
                config.check(dimension)
        else:
            dimension = config.dimension(group.number) if attempt == 0 else dimension.otherwise
        if dimension is None:
            return None, None
        if dimension.require_parallel == "outermost":
            wanted = not any(row.parallel or row.private for row in (*group.outer, *group.band))
            dimension = replace(dimension, require_parallel=wanted)
        # Costs do not change whether a row exists, so an attempt that differs in nothing else is not worth its time.
        key = (dimension.no_skewing, dimension.require_parallel, dimension.constraints)
        if key in hopeless or (dimension.starts_band and group.band):
            continue
        row = Program(group, dimension).solve()
        if row is not None:
            return row, dimension
        hopeless.add(key)


def _relaxed(group: Group) -> Group:
    """The group with every row allowed that the original order could need."""
    config = group.problem.config
    return group.configured(
        negative_coefficients=True,
        parametric_shift=True,
        coefficient_bound=max(config.coefficient_bound, 8),
        dimensions=config.dimensions if restricted(config) else {None: Dimension()},
    )


def _close(group: Group) -> tuple[tuple[Loop, ...], tuple[Dependence, ...]]:
    """The band's loops with their parallelism, and the dependences that none of them carries."""
    problem, remaining = group.problem, group.active
    loops = []
    temporaries = group.temporaries()
    for row in group.band:
        free = row.parallel or all(is_zero(d, row) for d in remaining)
        private = free or all(is_zero(d, row) or (not d.flow and d.array in temporaries) for d in remaining)
        exprs = {name: text(row[name], problem.statements[name].iterators, problem.scop.parameters) for name in group.names}
        relaxed = any(d.relaxed and not is_zero(d, row) for d in group.active)
        combines = not free and all(is_zero(d, row) or d.relaxed for d in remaining) and _sums_stay(group, row)
        loops.append(Loop(exprs, row.parallel, free, private, relaxed, combines))
        remaining = tuple(left for d in remaining if (left := remainder(d, row)) is not None)
    return tuple(loops), remaining


def _sums_stay(group: Group, row: Row) -> bool:
    """Whether each relaxed sum or product that the row carries is of one element, as long as all other rows stay the same."""
    for name in {d.source for d in group.active if d.relaxed and not is_zero(d, row)}:
        statement = group.problem.statements[name]
        around = [other[name].it for other in (*group.outer, *group.band) if other is not row]
        element = statement.writes[0].relation
        moves = [
            tuple(step(element, place, k) for place in range(len(statement.iterators)))
            for k in range(element.dim(isl.dim_type.out))
        ]
        if accumulation(statement) is None or any(outside([*group.problem.fixed[name], *around], move) for move in moves):
            return False
    return True


def _violation(plan: Plan, relax_reductions: bool = False) -> str | None:
    """The first violation that the independent check finds, as a phrase."""
    violations = legality.check(plan.scop, plan.union_map(), relax_reductions)
    return f"illegal schedule: {violations[0]}" if violations else None
