"""Statements of a tile one after the other, so that each of them has vector loops and bounds of its own.

A skewed band that statements share runs them together at its innermost loop: shifted against each other, they leave guards there,
and what one takes from another keeps the loop from being a vector loop. Between its outer point loops the statements of a tile
can often run apart: in a stencil over time, all of one array's step in the tile and then all of the other's.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import islpy as isl

from npu_sparse.schedule.loop_analysis import flow, storage
from npu_sparse.schedule.plan import Band, Leaf, Loop, Node, Sequence
from npu_sparse.schedule.scop import Scop, Statement
from npu_sparse.schedule.solve.costs import step

Gain = Callable[[Statement, int], int]
Pairs = dict[tuple[str, str], isl.Map]


def distribute(root: Node, scop: Scop, gain: Gain) -> Node:
    """`root` with the statements of skewed tiles distributed at the outermost point loop where no dependence forbids it.

    A tiled band is changed where it has no vector loop, and some statement has one afterwards: a parallel loop along an iterator
    for which `gain(statement, place)` is positive.
    """
    return _distribute(root, tuple(s.name for s in scop.statements), scop, gain, cache(lambda: _pairs(scop)))


def _distribute(node: Node, names: tuple[str, ...], scop: Scop, gain: Gain, pairs: Callable[[], Pairs]) -> Node:
    if isinstance(node, Sequence):
        return Sequence(tuple((group, _distribute(child, group, scop, gain, pairs)) for group, child in node.children))
    if isinstance(node, Leaf):
        return node
    if not _fits(node):
        return replace(node, child=_distribute(node.child, names, scop, gain, pairs))
    for shared in range(1, len(node.loops)):
        within = _within(pairs(), node.loops[:shared], names, scop)
        order = _order([group[0] for group, _ in node.child.children], within)
        if order is None:
            continue
        bands = {name: _own(node, shared, name, scop, gain, within.get((name, name))) for name in order}
        if not any(loop.vector for band in bands.values() for loop in band.loops):
            return node
        return replace(node, shared=shared, child=Sequence(tuple(((name,), bands[name]) for name in order)))
    return node


def _fits(band: Band) -> bool:
    """A tiled, skewed band of several statements without vector and register tiles."""
    skewed = any(not text.isidentifier() for loop in band.loops for text in loop.exprs.values())
    leaves = isinstance(band.child, Sequence) and all(
        isinstance(child, Leaf) and len(group) == 1 for group, child in band.child.children
    )
    plain = not any(loop.vector or loop.unroll or loop.relaxed for loop in band.loops) and not band.points
    return band.tiled and band.permutable and skewed and leaves and plain


def _own(band: Band, shared: int, name: str, scop: Scop, gain: Gain, within: isl.Map | None) -> Band:
    """The point loops of one statement inside of those that are shared, the best parallel one innermost, as a vector loop."""
    statement = scop.statement(name)
    fixed = {loop.exprs[name] for loop in band.loops[:shared]}
    loops, best = [], (0, -1)
    for place, loop in enumerate(band.loops[shared:]):
        row = _row(loop, statement, scop)
        parallel = within is None or _equal(within, row, row)
        loops.append(Loop({name: loop.exprs[name]}, coincident=parallel, free=parallel))
        moved = [k for k, it in enumerate(statement.iterators) if it not in fixed and step(row, k, 0)]
        if parallel and len(moved) == 1:
            best = max(best, (gain(statement, moved[0]), place))
    if best[0] > 0:
        vector = replace(loops.pop(best[1]), vector=True)
        loops.append(vector)
    return Band(tuple(loops), Leaf(), permutable=len(loops) > 1)


def _pairs(scop: Scop) -> Pairs:
    """Every pair of instances that must keep its order, by source and sink."""
    merged: Pairs = {}
    everything: list[isl.Map] = []
    flow(scop).union(storage(scop)).foreach_map(everything.append)
    for m in everything:
        key = (m.get_tuple_name(isl.dim_type.in_), m.get_tuple_name(isl.dim_type.out))
        merged[key] = merged[key].union(m) if key in merged else m
    return merged


def _within(pairs: Pairs, loops: tuple[Loop, ...], names: tuple[str, ...], scop: Scop) -> Pairs:
    """The pairs of these statements in one iteration of the loops."""
    inside = {}
    for (source, sink), pair in pairs.items():
        if source in names and sink in names:
            for loop in loops:
                there = _row(loop, scop.statement(sink), scop)
                pair = pair.intersect(_row(loop, scop.statement(source), scop).apply_range(there.reverse()))
            if not pair.is_empty():
                inside[source, sink] = pair
    return inside


def _order(names: list[str], within: Pairs) -> list[str] | None:
    """The statements after what they need, otherwise in the given order; None where they need each other."""
    needs = {name: {source for source, sink in within if sink == name and source != name} for name in names}
    order: list[str] = []
    while len(order) < len(names):
        ready = [name for name in names if name not in order and needs[name] <= set(order)]
        if not ready:
            return None
        order.append(ready[0])
    return order


def _row(loop: Loop, statement: Statement, scop: Scop) -> isl.Map:
    parameters = f"[{', '.join(scop.parameters)}] -> " if scop.parameters else ""
    iterators = ", ".join(statement.iterators)
    return isl.Map(f"{parameters}{{ {statement.name}[{iterators}] -> [({loop.exprs[statement.name]})] }}")


def _equal(pairs: isl.Map, source: isl.Map, sink: isl.Map) -> bool:
    """Whether both ends of every pair are in the same iteration."""
    return pairs.is_subset(source.apply_range(sink.reverse()))
