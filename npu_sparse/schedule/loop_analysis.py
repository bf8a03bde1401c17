"""What one iteration of a loop takes from another: the question before a loop is run in parallel."""

import re
from collections.abc import Iterable
from functools import reduce

import islpy as isl

from npu_sparse.schedule.scop import Scop, accumulation


def union(maps: Iterable[isl.Map]) -> isl.UnionMap:
    """All of the maps together."""
    joined = isl.UnionMap.read_from_str(isl.DEFAULT_CONTEXT, "{ }")
    for m in maps:
        joined = joined.union(isl.UnionMap.from_map(m))
    return joined


def _reads(scop: Scop, array: str = "") -> list[isl.Map]:
    return [a.relation.intersect_domain(s.domain) for s in scop.statements for a in s.reads if array in ("", a.array)]


def _writes(scop: Scop, array: str = "", may: bool = False) -> list[isl.Map]:
    """The writes that surely happen, or with `may` those that perhaps do."""
    writes = [(s, a) for s in scop.statements for a in s.writes if array in ("", a.array) and a.may == may]
    return [a.relation.intersect_domain(s.domain) for s, a in writes]


def flow(scop: Scop) -> isl.UnionMap:
    """Each write to the reads of the values it leaves."""
    return _flow(scop, union(_reads(scop)))


def _flow(scop: Scop, sinks: isl.UnionMap, array: str = "") -> isl.UnionMap:
    """From the write that left its value to each access of `sinks`; where a write only may happen, from earlier ones too."""
    sure, perhaps = union(_writes(scop, array)), union(_writes(scop, array, may=True))
    info = isl.UnionAccessInfo.from_sink(sinks).set_schedule_map(scop.original())
    try:
        return info.set_must_source(sure).set_may_source(perhaps).compute_flow().get_may_dependence()
    except isl.Error:  # isl's analysis gives up on some strides and divisions: every earlier write then counts
        return _earlier(scop, sure.union(perhaps), sinks)


def storage(scop: Scop) -> isl.UnionMap:
    """From every access to every later write of the same element."""
    writes = union(_writes(scop) + _writes(scop, may=True))
    return _earlier(scop, writes.union(union(_reads(scop))), writes)


def _earlier(scop: Scop, sources: isl.UnionMap, sinks: isl.UnionMap) -> isl.UnionMap:
    order = scop.original()
    return sources.apply_range(sinks.reverse()).intersect(order.lex_lt_union_map(order))


class Dependences:
    """Answers, loop by loop, what an iteration takes from another one."""

    def __init__(self, scop: Scop):
        self.scop = scop
        self.written = {}  # array -> (its writes, for each read of it (elements, flow into it), whether it may be private)
        for name, array in scop.arrays.items():
            sure, perhaps = _writes(scop, name), _writes(scop, name, may=True)
            if sure or perhaps:
                reads = [(isl.UnionMap.from_map(r), _flow(scop, isl.UnionMap.from_map(r), name)) for r in _reads(scop, name)]
                simple = all(r.is_single_valued() for r in [*sure, *_reads(scop, name)])
                self.written[name] = (union(sure + perhaps), reads, simple and not perhaps and not array.live_out and array.sized)

    def loop(self, band, member: int = 0, statements: set[str] | None = None) -> tuple[str, tuple[str, ...]]:
        """`(why the member is not parallel or "", arrays that each of its iterations needs a copy of)`.

        `statements`: the answer where the loop holds no others.
        """
        obstacle, private, _ = self._loop(band, member, statements, combine=False)
        return obstacle, private

    def combined(self, band) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """The same of the first member where sums and products of one element may be made in parts, with their statements."""
        return self._loop(band, 0, None, combine=True)

    def _loop(self, band, member: int, statements: set[str] | None, combine: bool):
        domain = band.get_domain()
        if statements is not None:
            kept = [isl.UnionSet.from_set(s.domain) for s in self.scop.statements if s.name in statements]
            domain = domain.intersect(reduce(isl.UnionSet.union, kept))
        outer = band.get_prefix_schedule_union_map().intersect_domain(domain)
        schedule = band.band_get_partial_schedule()
        for n in range(member):
            outer = outer.flat_range_product(isl.UnionMap.from_union_pw_aff(schedule.get_at(n)))
        here = isl.UnionMap.from_union_pw_aff(schedule.get_at(member)).intersect_domain(domain)
        beside = outer.apply_range(outer.reverse())  # instances in the same outer iteration
        later = here.lex_lt_union_map(here).intersect(beside)
        same = here.apply_range(here.reverse()).intersect(beside)
        private, combined = [], []
        for name, (writes, reads, may_be_private) in self.written.items():
            writes = accesses = writes.intersect_domain(domain)
            for read, _ in reads:
                accesses = accesses.union(read.intersect_domain(domain))
            conflict = writes.apply_range(accesses.reverse()).union(accesses.apply_range(writes.reverse())).intersect(later)
            if conflict.is_empty():
                continue
            names, updates = self._updates(name, domain, outer, beside) if combine else ((), None)
            if names and conflict.is_subset(updates):
                combined += names
                continue
            for read, flow in reads:
                carried = flow.intersect(later)
                if not carried.is_empty():
                    return f"a value of {name} from {_witness(carried)}", (), ()
                inside = flow.intersect(same)
                own = read.intersect_domain(domain).domain().is_subset(inside.range())
                may_be_private &= own and flow.intersect_domain(domain).is_subset(inside)
            if not may_be_private:
                return f"writes to the same element of {name} from {_witness(conflict)}", (), ()
            private.append(name)
        return "", tuple(private), tuple(combined)

    def _updates(self, name: str, domain, outer, beside) -> tuple[tuple[str, ...], isl.UnionMap]:
        """Statements that alone use elements of the array in the loop, one element each time that the loop is entered, and the
        pairs of their instances."""
        inside = {s.get_tuple_name() for s in _sets(domain)}
        using = [s for s in self.scop.statements if s.name in inside and name in {a.array for a in (*s.reads, *s.writes)}]
        names, pairs = [], union([])
        for s in using:
            if s.writes[0].array != name or not accumulation(s):
                continue
            points = isl.UnionSet.from_set(s.domain).intersect(domain)
            written = isl.UnionMap.from_map(s.writes[0].relation).intersect_domain(points)
            others = union(
                a.relation.intersect_domain(other.domain)
                for other in using for a in (*other.reads, *other.writes) if a.array == name and other is not s
            ).intersect_domain(domain)  # fmt: skip
            alone = written.apply_range(others.reverse()).intersect(beside).is_empty()
            if alone and outer.intersect_domain(points).reverse().apply_range(written).is_single_valued():
                names.append(s.name)
                pairs = pairs.union(isl.UnionMap.from_domain_and_range(points, points))
        return tuple(names), pairs


def _sets(domain: isl.UnionSet) -> list[isl.Set]:
    sets: list[isl.Set] = []
    domain.foreach_set(sets.append)
    return sets


def _witness(pairs: isl.UnionMap) -> str:
    """A pair of statement instances, as "S0[1, 2] to S1[3]"."""
    maps: list[isl.Map] = []
    pairs.foreach_map(maps.append)
    source = maps[0].domain().sample_point()
    sink = maps[0].intersect_domain(isl.Set.from_point(source)).range().sample_point()
    return " to ".join(re.search(r"\w+\[[^\]]*\]", re.sub(r"^.*->", "", str(point)))[0] for point in (source, sink))
