"""The independent check of a schedule, before any code is generated.

It uses neither dataflow analysis nor the scheduler's dependences: any two instances that touch the same element, one of them
writing, must keep the order of the source. Every instance must have exactly one place in the schedule.
"""

from dataclasses import dataclass

import islpy as isl

from .scop import Scop, Statement, statement_schedule


@dataclass(frozen=True)
class Violation:
    """Why a schedule is illegal, with one witness.

    Attributes:
        kind: "RAW", "WAR" or "WAW": the sink runs before the source or at the same place; "unscheduled": the source instance
            has no place in the schedule; "ambiguous": it has several.
        source, sink: statement names; the source runs first in the original program. Equal for the last two kinds.
        source_iteration, sink_iteration: values of the iterators.
        parameters: values of the parameters for which the witness exists.
    """

    kind: str
    source: str
    sink: str
    array: str
    source_iteration: tuple[int, ...]
    sink_iteration: tuple[int, ...]
    parameters: dict[str, int]

    def __str__(self):
        source = f"{self.source}[{', '.join(map(str, self.source_iteration))}]"
        sink = f"{self.sink}[{', '.join(map(str, self.sink_iteration))}]"
        where = ", ".join(f"{name} = {value}" for name, value in self.parameters.items())
        where = f" ({where})" if where else ""
        if self.kind == "unscheduled":
            return f"schedule must place every instance, got none for {source}{where}"
        if self.kind == "ambiguous":
            return f"schedule must place every instance once, got several places for {source}{where}"
        return f"schedule must run {source} before {sink} ({self.kind} on {self.array}), got it after or at the same place{where}"


def check(scop: Scop, schedule: isl.UnionMap, relax_reductions: bool = False) -> list[Violation]:
    """What makes a schedule illegal: at most one violation for each kind, array and pair of statements; [] for a legal one.

    Args:
        schedule: from statement instances to points of one space, ordered lexicographically; it may be defined on more than
            the instances.
        relax_reductions: allows any order among the updates x op= e of one statement.
    """
    violations, places = [], {}
    width = _width(schedule)
    for statement in scop.statements:
        place = _of(statement, schedule, width)
        missing = statement.domain.intersect_params(scop.context).subtract(place.domain())
        if not missing.is_empty():
            violations.append(_witness("unscheduled", statement, statement, "", isl.Map.identity(
                missing.get_space().map_from_set()).intersect_domain(missing)))
        elif not place.is_single_valued():
            twice = place.intersect_params(scop.context).apply_range(_different(place)).apply_range(place.reverse())
            twice = twice.intersect(isl.Map.identity(twice.get_space()))
            violations.append(_witness("ambiguous", statement, statement, "", twice))
        places[statement.name] = place
    if violations:
        return violations
    length = max(len(statement.position) for statement in scop.statements)
    orders = {s.name: statement_schedule(s, length).intersect_domain(s.domain) for s in scop.statements}
    for source in scop.statements:
        for sink in scop.statements:
            before = None
            for kind, array, conflict in _conflicts(scop, source, sink, relax_reductions):
                if before is None:
                    before = _ordered(orders[source.name], orders[sink.name])
                for first in before:
                    wrong = _not_before(conflict.intersect(first), places[source.name], places[sink.name])
                    if wrong is not None:
                        violations.append(_witness(kind, source, sink, array, wrong))
                        break
    return violations


def _conflicts(scop: Scop, source: Statement, sink: Statement, relax: bool):
    """Kind, array and pairs of instances that touch the same element, whichever runs first."""
    for kind, firsts, seconds in (("RAW", source.writes, sink.reads), ("WAR", source.reads, sink.writes),
                                  ("WAW", source.writes, sink.writes)):
        total: dict[str, isl.Map] = {}
        for a, first in enumerate(firsts):
            for b, second in enumerate(seconds):
                updates = relax and source is sink and source.reduction and a == b == 0
                if first.array == second.array and not updates:
                    pairs = first.relation.apply_range(second.relation.reverse()).intersect_params(scop.context)
                    total[first.array] = total[first.array].union(pairs) if first.array in total else pairs
        for array, pairs in total.items():
            if not pairs.is_empty():
                yield kind, array, pairs


def _ordered(source: isl.Map, sink: isl.Map) -> list[isl.Map]:
    """Pairs of instances in which the source runs first, one map for each level at which their places part."""
    ordered = []
    for level in range(source.dim(isl.dim_type.out)):
        pairs = source.apply_range(_compare(source, level, "<")).apply_range(sink.reverse())
        if not pairs.is_empty():
            ordered.append(pairs)
    return ordered


def _not_before(pairs: isl.Map, source: isl.Map, sink: isl.Map) -> isl.Map | None:
    """The pairs that a schedule runs the other way round or at the same place; None where there are none."""
    if pairs.is_empty():
        return None
    moved = pairs.apply_domain(source).apply_range(sink)  # places to places: a cheap test before a witness is wanted
    for level in range(moved.dim(isl.dim_type.out) + 1):
        relation = _compare(source, level, ">")
        if not moved.intersect(relation).is_empty():
            return pairs.intersect(source.apply_range(relation).apply_range(sink.reverse()))
        if level < moved.dim(isl.dim_type.out):
            moved = moved.equate(isl.dim_type.in_, level, isl.dim_type.out, level)
            if moved.is_empty():
                return None
    return None


def _compare(place: isl.Map, level: int, order: str) -> isl.Map:
    """Pairs of places that agree before a level and are in this order at it; past the last level, equal places."""
    space = place.get_space().range().map_from_set()
    relation = isl.Map.universe(space)
    for dim in range(min(level, space.dim(isl.dim_type.out))):
        relation = relation.equate(isl.dim_type.in_, dim, isl.dim_type.out, dim)
    if level < space.dim(isl.dim_type.out):
        order_at = relation.order_lt if order == "<" else relation.order_gt
        relation = order_at(isl.dim_type.in_, level, isl.dim_type.out, level)
    return relation


def _different(place: isl.Map) -> isl.Map:
    space = place.get_space().range().map_from_set()
    return isl.Map.universe(space).subtract(isl.Map.identity(space))


def _width(schedule: isl.UnionMap) -> int:
    widths: set[tuple[str | None, int]] = set()
    schedule.foreach_map(lambda m: widths.add((m.get_tuple_name(isl.dim_type.out), m.dim(isl.dim_type.out))))
    if len(widths) > 1:
        raise ValueError(f"schedule must map into one space, got {sorted(map(str, widths))}")
    return next(iter(widths))[1] if widths else 0


def _of(statement: Statement, schedule: isl.UnionMap, width: int) -> isl.Map:
    """The part of the schedule that places a statement, into an unnamed space."""
    parts = []
    schedule.intersect_domain(isl.UnionSet.from_set(statement.domain)).foreach_map(parts.append)
    if not parts:
        space = statement.domain.get_space().map_from_set()
        return isl.Map.empty(isl.Map.identity(space).project_out(isl.dim_type.out, 0, space.dim(isl.dim_type.out)).add_dims(
            isl.dim_type.out, width).get_space())
    return parts[0].reset_tuple_id(isl.dim_type.out)


def _witness(kind: str, source: Statement, sink: Statement, array: str, pairs: isl.Map) -> Violation:
    point = pairs.wrap().sample_point()
    parameters = {}
    for at in range(point.get_space().dim(isl.dim_type.param)):
        name = point.get_space().get_dim_name(isl.dim_type.param, at)
        parameters[name] = point.get_coordinate_val(isl.dim_type.param, at).to_python()
    values = [point.get_coordinate_val(isl.dim_type.set, at).to_python()
              for at in range(len(source.iterators) + len(sink.iterators))]
    return Violation(kind, source.name, sink.name, array, tuple(values[:len(source.iterators)]),
                     tuple(values[len(source.iterators):]), parameters)
