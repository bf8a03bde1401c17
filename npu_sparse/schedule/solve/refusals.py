"""Why something that was asked for cannot be: contradictory constraints, directives, and dependences with a witness."""

from dataclasses import replace

import islpy as isl

from npu_sparse.schedule.config import ConfigError
from npu_sparse.schedule.plan import Plan
from npu_sparse.schedule.solve.farkas import Dependence
from npu_sparse.schedule.solve.problem import Group, InfeasibleError, Problem
from npu_sparse.schedule.solve.program import Program
from npu_sparse.schedule.solve.rows import Form, Row, is_zero


def describe(dependence: Dependence) -> str:
    """The dependence with one pair of instances as a witness."""
    return f"{dependence.label}, such as {witness(dependence.relation)}"


def witness(relation: isl.BasicMap) -> str:
    """One pair of instances of a relation: "S0[0, 1] -> S1[1, 1] (n = 4)"."""
    point = relation.sample()
    values = {kind: [] for kind in (isl.dim_type.param, isl.dim_type.in_, isl.dim_type.out)}
    for kind, coordinates in values.items():
        for place in range(point.dim(kind)):
            coordinates.append(str(point.plain_get_val_if_fixed(kind, place)))
    names = [point.get_tuple_name(kind) for kind in (isl.dim_type.in_, isl.dim_type.out)]
    pair = [f"{name}[{', '.join(values[k])}]" for name, k in zip(names, (isl.dim_type.in_, isl.dim_type.out))]
    parameters = [f"{point.get_dim_name(isl.dim_type.param, p)} = {value}" for p, value in enumerate(values[isl.dim_type.param])]
    return f"{pair[0]} -> {pair[1]}" + (f" ({', '.join(parameters)})" if parameters else "")


def check_requests(problem: Problem) -> None:
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


def explain(group: Group) -> InfeasibleError:
    """Why the statements have no further row: contradictory constraints, or the dependence that forbids what was asked."""
    config = group.problem.config
    dimension = config.dimension(group.number)
    asked = (*config.constraints(group.number), *dimension.constraints)
    where = f"dimension {group.number} of {', '.join(group.names)}"

    def possible(active: tuple, constraints: tuple, directives: tuple = config.directives) -> bool:
        tried = replace(group.configured(custom_constraints={None: constraints}, directives=directives), active=active)
        return Program(tried, replace(dimension, constraints=())).feasible()

    if asked and not possible((), asked, ()):
        core = core_of(asked, lambda items: possible((), items, ()))
        listed = " and ".join(repr(item.text) for item in core)
        return InfeasibleError(f"{core[0].where}constraints must not contradict each other, got {listed} for {where}")
    if config.directives and not possible((), asked):
        core = core_of(config.directives, lambda items: possible((), asked, items))
        return InfeasibleError(
            f"{core[0].where}directive {core[0].type} must agree with the constraints, got none such row for {where}"
        )
    if (asked or config.directives) and possible((), asked):
        core = core_of(group.active, lambda items: possible(items, asked))
        place = asked[0].where if asked else config.directives[0].where
        what = f"constraints {', '.join(repr(c.text) for c in asked)}" if asked else f"directive {config.directives[0].type}"
        return InfeasibleError(f"{place}{what} must respect dependences, got no row at {where} because of {describe(core[0])}")
    worst = f" because of {describe(group.active[0])}" if group.active else ""
    return InfeasibleError(f"no row with coefficients up to {config.coefficient_bound} exists for {where}{worst}")


def core_of(items: tuple, possible) -> tuple:
    """A smallest set, by deletion, of items that are impossible together."""
    kept = list(items)
    for item in items:
        without = [other for other in kept if other is not item]
        if not possible(tuple(without)):
            kept = without
    return tuple(kept)


def check_directives(plan: Plan, problem: Problem) -> None:
    """Raises ConfigError when a vectorize directive ended on a loop that carries a dependence."""
    for directive in problem.config.directives:
        if directive.type != "vectorize":
            continue
        for index in directive.stmts:
            statement = problem.scop.statements[index]
            loops = [loop for names, band in plan.bands() if statement.name in names for loop in band.inner()]
            loop = loops[-1] if loops else None
            if loop is not None and (loop.free or loop.coincident or loop.combines):
                continue
            unit = tuple(int(place == directive.iterator) for place in range(len(statement.iterators)))
            form = Form(unit, (0,) * len(problem.scop.parameters), 0)
            row = Row({statement.name: form})
            own = [d for d in problem.dependences if d.own and d.source == statement.name and not is_zero(d, row)]
            reason = f" because of {describe(own[-1])}" if own else ""
            name = statement.iterators[directive.iterator]
            raise ConfigError(
                f"{directive.where}vectorize must name a loop that carries nothing, got {name} of {statement.name}{reason}"
            )
