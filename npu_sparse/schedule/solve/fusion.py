"""Which statements share loops: the parts of a group that go one after the other."""

from collections.abc import Iterable
from dataclasses import replace

from npu_sparse.schedule.config import ConfigError, Dimension, Fusion
from npu_sparse.schedule.solve.costs import contiguity
from npu_sparse.schedule.solve.farkas import Dependence
from npu_sparse.schedule.solve.problem import Group, InfeasibleError
from npu_sparse.schedule.solve.program import Program
from npu_sparse.schedule.solve.refusals import core_of, describe


def strong_components(names: tuple[str, ...], active: Iterable[Dependence]) -> list[tuple[str, ...]]:
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


def parts(group: Group) -> list[tuple[str, ...]]:
    """The statements that go one after the other at this point; one part for everything together."""
    names, config = group.names, group.problem.config
    if len(names) == 1:
        return [names]
    asked = config.fusion_at(group.number)
    if asked.total_distribution:
        return strong_components(names, group.active)
    if asked.stmts_fusion:
        return _asked_parts(group, asked)
    missing = {name: group.missing(name) for name in names}
    # A statement without loops left cannot be inside of the others' loops at no cost: it goes before or after them.
    if not all(missing.values()):
        return _runs(strong_components(names, group.active), lambda part: any(missing[name] for name in part))
    if config.fusion_heuristic == "none":
        return strong_components(names, group.active)
    if config.fusion_heuristic == "dimensionality":
        return _runs(strong_components(names, group.active), lambda part: max(missing[name] for name in part))
    if config.fusion_heuristic == "parallelism":
        return _by_parallelism(group)
    return [names]


def _asked_parts(group: Group, asked: Fusion) -> list[tuple[str, ...]]:
    known = {statement.index: statement.name for statement in group.problem.scop.statements}
    for part in asked.stmts_fusion:
        for index in part:
            if index not in known:
                raise ConfigError(f"{asked.where}stmts_fusion must name statements 0 to {len(known) - 1}, got {index}")
    parts = [tuple(known[index] for index in part if known[index] in group.names) for part in asked.stmts_fusion]
    mentioned = {name for part in parts for name in part}
    parts += [(name,) for name in group.names if name not in mentioned]
    parts = [part for part in parts if part]
    place = {name: i for i, part in enumerate(parts) for name in part}
    for d in group.active:
        if place[d.source] > place[d.sink]:
            raise ConfigError(
                f"{asked.where}stmts_fusion must respect dependences, got {d.sink} before {d.source} against {describe(d)}"
            )
    return parts


def refuse_forced(group: Group) -> None:
    """Raises ConfigError where statements have no row together that the configuration wants fused."""
    asked = group.problem.config.fusion_at(group.number)
    wanted = {group.problem.scop.statements[index].name for part in asked.stmts_fusion for index in part}
    if len(group.names) < 2 or not wanted & set(group.names):
        return

    def possible(active: tuple) -> bool:
        return _has_row(replace(group, active=active))

    if not possible(group.active):
        core = core_of(group.active, possible)
        what = f" because of {describe(core[0])}" if core else ""
        raise InfeasibleError(
            f"{asked.where}stmts_fusion must be possible, got no row for {' and '.join(group.names)} together{what}"
        )


def separate(group: Group) -> list[tuple[str, ...]]:
    """The parts after a cut where the statements have no row together: components stay fused as long as a row exists."""
    components = strong_components(group.names, group.active)
    if len(components) == 1 or group.problem.config.fusion_heuristic != "max":
        return components
    parts = [components[0]]
    for component in components[1:]:
        if _has_row(group.part(parts[-1] + component)):
            parts[-1] += component
        else:
            parts.append(component)
    return parts if len(parts) > 1 else components


def _runs(components: list[tuple[str, ...]], key) -> list[tuple[str, ...]]:
    """Neighbouring components of equal key together."""
    runs: list[tuple[str, ...]] = []
    for component in components:
        if runs and key(runs[-1]) == key(component):
            runs[-1] += component
        else:
            runs.append(component)
    return runs


def _by_parallelism(group: Group) -> list[tuple[str, ...]]:
    """Neighbouring components that depend on each other fused, if none of them has fewer outer parallel loops than alone.

    Without code sinking, components of different depth stay apart: the shallow one would fix the order of the others' loops.
    Inside of a sequential loop, however, all that can share a parallel loop does, because starting threads costs.
    """
    sinking = group.problem.config.code_sinking
    inside = bool(group.outer) and not any(row.parallel or row.private for row in group.outer) and not sinking
    components = strong_components(group.names, group.active)
    depth = {name: 0 if sinking else group.missing(name) for name in group.names}
    alone = [_parallel_rows(group.part(component)) for component in components]
    if len(set(alone)) == len(set(depth.values())) == 1 and _connected(group) and _parallel_rows(group) >= alone[0]:
        return [group.names]
    parts: list[tuple[str, ...]] = []
    parallel: list[int] = []
    for component, loops in zip(components, alone):
        if inside and parts and _shares_threads(group.part(parts[-1] + component)):
            parts[-1] += component
            parallel[-1] = min(parallel[-1], loops)
            continue
        same = parts and max(depth[name] for name in component) == max(depth[name] for name in parts[-1])
        if same and parallel[-1] == loops and any(d.source in parts[-1] and d.sink in component for d in group.active):
            fused = group.part(parts[-1] + component)
            if _parallel_rows(fused) >= loops and (loops or _has_row(fused)):
                parts[-1] = fused.names
                continue
        parts.append(component)
        parallel.append(loops)
    return parts


def _shares_threads(group: Group) -> bool:
    """Whether the statements have a parallel row together that leaves the loops along memory for the inside."""
    program = Program(group, Dimension((), require_parallel=True, no_skewing=True))
    for name in group.names:
        columns, costs = program.it[name], contiguity(group.problem.statements[name])
        if group.missing(name) > 1:
            program.model.row({columns[costs.index(max(costs))]: 1}, 0, 0)
    return program.feasible()


def _connected(group: Group) -> bool:
    """Whether dependences, in any direction, lead from every statement to every other."""
    both = [(d.source, d.sink) for d in group.active] + [(d.sink, d.source) for d in group.active]
    seen, stack = {group.names[0]}, [group.names[0]]
    while stack:
        here = stack.pop()
        new = {sink for source, sink in both if source == here} - seen
        seen |= new
        stack += new
    return seen >= set(group.names)


def _parallel_rows(group: Group) -> int:
    """How many outer parallel loops the statements can share."""
    depth = min(map(group.missing, group.names))
    if not group.active:
        return depth
    for loops in range(depth):
        row = Program(group, Dimension((), require_parallel=True)).any_row()
        if row is None:
            return loops
        directions = {name: (*group.directions[name], row[name].it) for name in group.names}
        group = replace(group, directions=directions)
    return depth


def _has_row(group: Group) -> bool:
    return Program(group, Dimension(())).feasible()
