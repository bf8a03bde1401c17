"""Dependences of a SCoP by exact dataflow analysis (isl's compute_flow).

RAW is value based: a read depends on the instance that wrote what it reads. WAR and WAW end at the next write: a write
depends on the last write of the element, and on the reads since. Every conflicting pair is ordered by these dependences or by
a chain of them, so a schedule that keeps them all is legal; legality.py checks that in another way.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import islpy as isl

from .scop import Access, Scop, Statement, statement_schedule


@dataclass(frozen=True)
class Dependence:
    """Instances of `sink` that must run after instances of `source`: one pair of accesses, one basic map.

    Attributes:
        kind: "RAW", "WAR" or "WAW".
        source, sink: statement names.
        relation: `{ S0[i] -> S1[j] : ... }`.
        array: through which they depend.
        reduction: whether both ends are updates of x by the same reduction x op= e, which may run in any order.
    """

    kind: str
    source: str
    sink: str
    relation: isl.BasicMap
    array: str
    reduction: bool = False


@dataclass(frozen=True)
class _Use:
    """An access with a tag that tells it from the others: `{ [S0[i] -> S0_w0[]] -> A[i] }`."""

    statement: Statement
    access: Access
    tag: str
    relation: isl.Map
    update: bool  # the read or the write of x in x op= e


def dependences(scop: Scop, relax_reductions: bool = False) -> list[Dependence]:
    """The dependences of a scop, by array and kind.

    With `relax_reductions` nothing orders the updates x op= e of one statement among themselves (running them in another
    order reassociates op); what comes before or after them is ordered with all of them.

    Arrays whose conflicts need integer division (A[i / 2], A[2 * i] against A[j]) get all ordered pairs, not the last only.
    """
    edges, dense = [], _without_strides(scop)
    for array in scop.arrays:
        reads, writes = _uses(scop, array, "read", dense), _uses(scop, array, "write", dense)
        if not writes:
            continue
        # A write that may leave the old value, or that may run in another order, hides no earlier write.
        hiding = [w for w in writes if not w.access.may and not (relax_reductions and w.update)]
        # A read that its own instance overwrites is ordered with later writes by that write.
        kept = [r for r in reads if not any(
            w.statement is r.statement and r.access.relation.is_subset(w.access.relation) for w in hiding)]
        uses = {use.tag: use for use in (*reads, *writes)}
        orders = {use.tag: _order(scop, use, dense) for use in uses.values()}
        # isl's parametric lexicographic maximum, up to 0.28, is wrong for some domains with strides and several upper bounds.
        divides = any(_divides(write.relation.apply_range(use.relation.reverse())) for write in writes for use in uses.values())
        for kind, sinks, sources in (("RAW", reads, writes), ("WAR", writes, kept), ("WAW", writes, writes)):
            pairs = None if divides else _last(scop, sources, sinks, hiding, kind == "WAR", orders)
            if pairs is None:
                pairs = _every(sources, sinks, orders)
            for pair in pairs:
                source, sink = (uses[_tag(space)] for space in (pair.get_space().domain(), pair.get_space().range()))
                reduction = source.statement is sink.statement and source.update and sink.update
                if reduction and relax_reductions:
                    continue
                relation = pair.factor_domain().apply_domain(dense[source.statement.name].reverse())
                relation = relation.apply_range(dense[sink.statement.name].reverse()).intersect_params(scop.context)
                for part in _basic_maps(relation):
                    edges.append(Dependence(kind, source.statement.name, sink.statement.name, part, array, reduction))
    return edges


def updates(scop: Scop) -> list[Dependence]:
    """All pairs of updates x op= e of one element by one statement, the earlier first: where these run in any order, it is not
    enough to know those that follow each other in the order of the source."""
    edges = []
    for statement in scop.statements:
        if statement.reduction is None:
            continue
        element = statement.writes[0].relation.intersect_domain(statement.domain)
        place = statement_schedule(statement, len(statement.position))
        pairs = element.apply_range(element.reverse()).intersect_params(scop.context)
        pairs = pairs.intersect(place.lex_lt_map(place))
        for part in _basic_maps(pairs):
            edges.append(Dependence("RAW", statement.name, statement.name, part, statement.writes[0].array, True))
    return edges


def _last(scop: Scop, sources: list[_Use], sinks: list[_Use], hiding: list[_Use], reading: bool,
          orders: dict[str, isl.Map]) -> list[isl.Map] | None:
    """Pairs of a sink and what touched the element before it, with no hiding write in between; None where isl fails."""
    kill, schedule = (_union(scop, maps) for maps in ([use.relation for use in hiding], orders.values()))
    info = isl.UnionAccessInfo.from_sink(_union(scop, [use.relation for use in sinks])).set_schedule_map(schedule)
    info = info.set_may_source(_union(scop, [use.relation for use in sources]))
    info = info.set_kill(kill) if reading else info.set_must_source(kill)
    flows = []
    try:
        info.compute_flow().get_may_dependence().foreach_map(flows.append)
    except isl.Error:  # an error inside isl 0.28, seen on domains with several bounds
        return None
    return sorted(flows, key=lambda m: (_tag(m.get_space().domain()), _tag(m.get_space().range())))


def _every(sources: list[_Use], sinks: list[_Use], orders: dict) -> list[isl.Map]:
    """Pairs of a sink and all that touched the element before it, one map for each level at which their places part."""
    conflicts = []
    for source in sources:
        for sink in sinks:
            touching = source.relation.apply_range(sink.relation.reverse())
            places = orders[source.tag].get_space().range().map_from_set()
            before = isl.Map.universe(places)
            for level in range(places.dim(isl.dim_type.out)):
                now = before.order_lt(isl.dim_type.in_, level, isl.dim_type.out, level)
                conflicts.append(touching.intersect(orders[source.tag].apply_range(now).apply_range(orders[sink.tag].reverse())))
                before = before.equate(isl.dim_type.in_, level, isl.dim_type.out, level)
    return [pair for pair in conflicts if not pair.is_empty()]


def _without_strides(scop: Scop) -> dict[str, isl.Map]:
    """Statement -> `{ S[i] -> S[e] : i = 2e + 1 }`: its iterations counted without gaps, so that no division is left.

    A loop keeps its own count where its statements run in different iterations (if (i % 2) ... else ...).
    """
    steps: dict[tuple, set[str]] = {}
    chosen: dict[str, list[tuple[tuple, str]]] = {}
    for statement in scop.statements:
        depth = len(statement.iterators)
        chosen[statement.name] = []
        for at in range(depth):
            info = statement.domain.project_out(isl.dim_type.set, at + 1, depth - at - 1).get_stride_info(at)
            offset, names = info.get_offset(), [f"i{k}'" for k in range(depth)]  # no name of C has a prime
            terms = [f"{offset.get_constant_val()}"]
            terms += [f"{offset.get_coefficient_val(isl.dim_type.in_, k)} * {names[k]}" for k in range(at)]
            terms += [f"{offset.get_coefficient_val(isl.dim_type.param, k)} * {offset.get_dim_name(isl.dim_type.param, k)}"
                      for k in range(offset.dim(isl.dim_type.param))]
            step = f"{info.get_stride()} * e{at}' + {' + '.join(terms)}"
            if info.get_stride() <= 1 or offset.dim(isl.dim_type.div):  # no stride, or one that starts at a quotient
                step = f"e{at}'"
            loop = statement.position[: 2 * at + 2]
            steps.setdefault(loop, set()).add(step)
            chosen[statement.name].append((loop, step))
    dense = {}
    for statement in scop.statements:
        conditions = [f"i{at}' = " + (step if len(steps[loop]) == 1 else f"e{at}'")
                      for at, (loop, step) in enumerate(chosen[statement.name])]
        old, new = (", ".join(f"{letter}{k}'" for k in range(len(statement.iterators))) for letter in "ie")
        dense[statement.name] = isl.Map(f"[{', '.join(scop.parameters)}] -> {{ {statement.name}[{old}] -> "
                                        f"{statement.name}[{new}] : {' and '.join(conditions) or 'true'} }}")
    return dense


def _uses(scop: Scop, array: str, kind: str, dense: dict[str, isl.Map]) -> list[_Use]:
    uses = []
    for statement in scop.statements:
        for number, access in enumerate(statement.reads if kind == "read" else statement.writes):
            if access.array == array:
                tag = f"{statement.name}_{kind}{number}"
                relation = access.relation.apply_domain(dense[statement.name])
                point = isl.Set(f"{{ {tag}[] }}").align_params(relation.get_space())
                relation = isl.Map.from_domain_and_range(relation.domain(), point).domain_map().apply_range(relation)
                uses.append(_Use(statement, access, tag, relation, statement.reduction is not None and number == 0))
    return uses


def _order(scop: Scop, use: _Use, dense: dict[str, isl.Map]) -> isl.Map:
    """When each access happens: when its statement does, in iterations counted without gaps."""
    length = max(len(statement.position) for statement in scop.statements)
    return use.relation.domain().unwrap().domain_map().apply_range(statement_schedule(use.statement, length))


def _divides(relation: isl.Map) -> bool:
    return any(part.dim(isl.dim_type.div) for part in relation.get_basic_maps())


def _union(scop: Scop, maps: Iterable[isl.Map]) -> isl.UnionMap:
    total = isl.UnionMap.empty(scop.context.get_space())
    for relation in maps:
        total = total.union(isl.UnionMap.from_map(relation))
    return total


def _tag(space: isl.Space) -> str:
    return space.unwrap().get_tuple_name(isl.dim_type.out)


def _basic_maps(relation: isl.Map) -> list[isl.BasicMap]:
    return [part for part in relation.get_basic_maps() if not part.is_empty()]
