"""Which statements share loops: the groups that go one after the other at a dimension."""

from npu_sparse.schedule.config import ConfigError, Dimension
from npu_sparse.schedule.solve.costs import contiguity
from npu_sparse.schedule.solve.farkas import Dependence
from npu_sparse.schedule.solve.problem import InfeasibleError, Problem
from npu_sparse.schedule.solve.program import Program
from npu_sparse.schedule.solve.refusals import core_of, describe


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


def groups_at(problem: Problem, names: tuple, active: list, outer: tuple, rows: dict, missing: dict) -> list[tuple[str, ...]]:
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


def refuse_forced(problem: Problem, names: tuple[str, ...], active: list, number: int, rows: dict) -> None:
    """Raises ConfigError where statements have no row together that the configuration wants fused."""
    asked = problem.config.fusion_at(number)
    wanted = {problem.scop.statements[index].name for group in asked.stmts_fusion for index in group}
    if len(names) < 2 or not wanted & set(names):
        return

    def possible(dependences) -> bool:
        return Program(problem, names, list(dependences), number, Dimension(()), rows).feasible()

    if not possible(active):
        core = core_of(tuple(active), possible)
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


def separate(problem: Problem, names: tuple, active: list, outer: tuple, rows: dict) -> list[tuple[str, ...]]:
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
