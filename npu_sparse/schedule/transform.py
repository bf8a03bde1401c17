"""Changes of a legal plan that keep it legal: vector loops inwards, parallel loops outwards, tiles, wavefronts, marks."""

from dataclasses import dataclass, replace

import islpy as isl

from npu_sparse.schedule.config import Config, Tiling
from npu_sparse.schedule.distribute import distribute
from npu_sparse.schedule.plan import Band, Leaf, Loop, Node, Plan, Sequence
from npu_sparse.schedule.scop import Scop, Statement
from npu_sparse.schedule.solve.costs import step

CHUNK = 64  # iterations of a vector loop that one thread takes at a time: some cache lines


def apply(plan: Plan, config: Config) -> Plan:
    """The plan with everything that the configuration asks for after the rows have been found."""
    names = tuple(statement.name for statement in plan.scop.statements)
    root = plan.root
    if config.sink_vector_loop:
        root = sink(root, names, plan.scop, config.sink_vector_loop)
    if config.auto_vectorisation or any(directive.type == "vectorize" for directive in config.directives):
        root = _vectorise(root, names, plan.scop, config)
    if config.tiling.sizes:
        root = tile(root, config.tiling)
        if config.tiling.distribute:
            root = distribute(root, plan.scop, strides)
    if config.tiling.unroll_jam > 1:
        root = unroll_and_jam(root, names, plan.scop, config.tiling.unroll_jam)
    return plan.with_root(_parallelise(root, names, plan.scop, config, outer=0))


def sink(node: Node, names: tuple[str, ...], scop: Scop, chunk: int) -> Node:
    """Bands with loops below them, with a parallel contiguous loop moved below those, into each statement.

    All that is ordered inside of the band shares an iteration of such a loop, so that it may run anywhere inside. Chunks stay.
    """
    if isinstance(node, Sequence):
        return Sequence(tuple((group, sink(child, group, scop, chunk)) for group, child in node.children))
    if isinstance(node, Leaf) or not _depth(node.child):
        return node
    statements = [scop.statement(name) for name in names]
    places = [k for k, loop in enumerate(node.loops) if loop.coincident and _gain(loop, statements) > 0]
    if not places:
        return replace(node, child=sink(node.child, names, scop, chunk))
    loop = node.loops[places[-1]]
    chunks = replace(loop, exprs={name: f"floor(({text})/{chunk})" for name, text in loop.exprs.items()})
    loops = tuple(chunks if k == places[-1] else other for k, other in enumerate(node.loops))
    return replace(node, loops=loops, child=_below(node.child, names, loop))


def _below(node: Node, names: tuple[str, ...], loop: Loop) -> Node:
    """`node` with a loop around each of its statements."""
    if isinstance(node, Sequence):
        return Sequence(tuple((group, _below(child, group, loop)) for group, child in node.children))
    if isinstance(node, Band):
        return replace(node, child=_below(node.child, names, loop))
    return Band((replace(loop, exprs={name: loop.exprs[name] for name in names}),), node)


def _vectorise(node: Node, names: tuple[str, ...], scop: Scop, config: Config) -> Node:
    """Innermost bands with a parallel contiguous loop moved innermost and marked."""
    if isinstance(node, Sequence):
        return Sequence(tuple((group, _vectorise(child, group, scop, config)) for group, child in node.children))
    if isinstance(node, Leaf):
        return node
    if _depth(node.child):
        return replace(node, child=_vectorise(node.child, names, scop, config))
    asked = {(scop.statements[k].name, d.iterator) for d in config.directives if d.type == "vectorize" for k in d.stmts}
    statements = [scop.statement(name) for name in names]
    directed = [s for s in statements if any(name == s.name for name, _ in asked)]
    if directed:
        last = len(node.loops) - 1
        loop = node.loops[last]
        return _with_vector(node, last) if loop.free or loop.coincident or loop.combines else node
    if not config.auto_vectorisation:
        return node
    candidates = range(len(node.loops)) if node.permutable else [len(node.loops) - 1]
    best = max(candidates, key=lambda k: (_gain(node.loops[k], statements), k))
    if _gain(node.loops[best], statements) <= 0:  # a sum, then, along memory
        best = max(candidates, key=lambda k: (_gain(node.loops[k], statements, combines=True), k))
        return _with_vector(node, best) if _gain(node.loops[best], statements, combines=True) > 0 else node
    return _with_vector(node, best)


def _with_vector(band: Band, place: int) -> Band:
    """The band with a loop moved innermost. Loops that lose an outer loop may lose what it carried for them."""
    vector = replace(band.loops[place], vector=True)
    rest = [loop for k, loop in enumerate(band.loops) if k != place]
    rest[place:] = [replace(loop, free=loop.coincident, private=loop.coincident, combines=False) for loop in rest[place:]]
    return replace(band, loops=(*rest, vector))


def _gain(loop: Loop, statements: list[Statement], combines: bool = False) -> int:
    """Positive when the loop is parallel, or else combines, and runs along memory in more accesses than it jumps through."""
    if not (loop.combines if combines else loop.free or loop.coincident):
        return 0
    gain = 0
    for statement in statements:
        if loop.exprs[statement.name] in statement.iterators:
            gain += strides(statement, statement.iterators.index(loop.exprs[statement.name]))
    return gain


def strides(statement: Statement, place: int) -> int:
    """Accesses along which the iterator is contiguous, minus those in which it jumps, weighted like the cost contiguity."""
    total = 0
    for access, weight in [*((a, 3) for a in statement.writes), *((a, 1) for a in statement.reads)]:
        steps = [step(access.relation, place, k) for k in range(access.relation.dim(isl.dim_type.out))]
        if any(steps):
            contiguous = abs(steps[-1]) == 1 and not any(steps[:-1])
            total += (1 if contiguous else -weight) * 4 ** (len(steps) - 1)
    return total


def tile(node: Node, tiling: Tiling) -> Node:
    """Permutable bands of enough loops with tile sizes, and a wavefront where no tile loop is parallel."""
    if isinstance(node, Sequence):
        return Sequence(tuple((group, tile(child, tiling)) for group, child in node.children))
    if isinstance(node, Leaf):
        return node
    node = replace(node, child=tile(node.child, tiling))
    if not node.permutable or len(node.loops) < tiling.minimum_depth:
        return node
    sizes = [tiling.sizes[min(k, len(tiling.sizes) - 1)] for k in range(len(node.loops))]
    loops = tuple(replace(loop, tile=size if size > 1 else 0) for loop, size in zip(node.loops, sizes))
    tiles = [loop for loop in loops if loop.tile]
    wavefront = tiling.wavefront and len(tiles) > 1 and not any(loop.coincident or loop.relaxed for loop in tiles)
    return replace(node, loops=loops, wavefront=wavefront)


def unroll_and_jam(node: Node, names: tuple[str, ...], scop: Scop, factor: int) -> Node:
    """Permutable innermost bands with register tiles of that factor, along those of the two loops around the innermost that pay.

    A loop pays where what the innermost loop moves through stays the same along it, so that it is loaded once for a strip; not so
    where statements read what they write at other elements, for the compiler then loads it again after every store. A parallel
    loop also pays around one that is not: a strip of it is as many recurrences, none of which waits for another. Bands that are
    skewed, or that statements share at a constant, are left alone: few of their register tiles are full.
    """
    if isinstance(node, Sequence):
        return Sequence(tuple((group, unroll_and_jam(child, group, scop, factor)) for group, child in node.children))
    if isinstance(node, Leaf):
        return node
    if _depth(node.child) or not node.permutable:
        return replace(node, child=unroll_and_jam(node.child, names, scop, factor))
    last = len(node.loops) - 1
    if not all(loop.exprs[name] in scop.statement(name).iterators for loop in node.loops for name in names):
        return node
    if node.loops[last].vector and not node.loops[last].coincident:
        return node  # what an outer loop carries would lie inside of the vector loop
    uses = [use for name in names for use in _uses(scop.statement(name), node.loops)]
    outer = [k for k in (last - 2, last - 1) if k >= 0]
    pays = [k for k in outer if any(use.steady(k, last) for use in uses)] if _apart(uses) else []
    if not (node.loops[last].free or node.loops[last].coincident):
        pays += [k for k in outer if node.loops[k].coincident and k not in pays]
    if not pays:
        return node
    loops = tuple(replace(loop, free=loop.coincident, private=loop.coincident) for loop in node.loops)
    loops = tuple(replace(loop, unroll=factor) if k in pays else loop for k, loop in enumerate(loops))
    return replace(node, loops=loops)


@dataclass(frozen=True)
class _Use:
    """An access in a band: its array, whether it writes, and how far each subscript moves along each loop; then the whole
    relation in the iterators of the band, for comparisons."""

    array: str
    writes: bool
    steps: tuple[tuple[int, ...], ...]
    elements: isl.Map

    def steady(self, loop: int, innermost: int) -> bool:
        """Whether it moves along the innermost loop, but not along the other."""
        return any(self.steps[innermost]) and not any(self.steps[loop])


def _uses(statement: Statement, loops: tuple[Loop, ...]) -> list[_Use]:
    places = [statement.iterators.index(loop.exprs[statement.name]) for loop in loops]
    names = ", ".join(f"i{k}" for k in range(len(statement.iterators)))
    order = isl.Map(f"{{ {statement.name}[{names}] -> [{', '.join(f'i{k}' for k in places)}] }}")
    uses = []
    for writes, accesses in ((True, statement.writes), (False, statement.reads)):
        for access in accesses:
            subscripts = range(access.relation.dim(isl.dim_type.out))
            steps = tuple(tuple(step(access.relation, place, k) for k in subscripts) for place in places)
            elements = access.relation.gist_domain(access.relation.domain()).apply_domain(order)
            uses.append(_Use(access.array, writes, steps, elements))
    return uses


def _apart(uses: list[_Use]) -> bool:
    """Whether every array that is written is used at the same elements everywhere."""
    written = {use.array: use.elements for use in uses if use.writes}
    return all(use.elements.is_equal(written[use.array]) for use in uses if use.array in written)


def _parallelise(node: Node, names: tuple[str, ...], scop: Scop, config: Config, outer: int) -> Node:
    """The outermost parallel loop of every nest marked where that pays; `outer` counts sequential loops around."""
    if isinstance(node, Sequence):
        children = tuple((group, _parallelise(child, group, scop, config, outer)) for group, child in node.children)
        return Sequence(children)
    if isinstance(node, Leaf):
        return node
    node = _parallel_first(node, names, scop, config)
    choice = _parallel_loop(node, names, scop, config)
    if choice is None and _in_chunks(node, names, scop, config):
        choice = len(node.loops) - 1
        node = replace(node, loops=(*node.loops[:-1], replace(node.loops[-1], tile=CHUNK)))
    if choice is not None:
        before = 0 if node.tiled else choice
        work = len(node.loops) - before + _depth(node.child)
        if _asked(node.loops[choice], names, scop, config, "parallel") or outer + before == 0 or work >= config.parallel_work:
            loops = tuple(replace(loop, parallel=k == choice) for k, loop in enumerate(node.loops))
            return replace(node, loops=loops)
    return replace(node, child=_parallelise(node.child, names, scop, config, outer + len(node.loops)))


def _parallel_first(band: Band, names: tuple[str, ...], scop: Scop, config: Config) -> Band:
    """A permutable band with a coincident loop that is not the vector loop outermost, if there is one."""
    if not config.auto_vectorisation or not band.permutable or band.loops[0].coincident:
        return band
    for place, loop in enumerate(band.loops):
        if loop.coincident and not loop.vector and not _asked(loop, names, scop, config, "sequential"):
            return replace(band, loops=(loop, *band.loops[:place], *band.loops[place + 1 :]))
    return band


def _parallel_loop(band: Band, names: tuple[str, ...], scop: Scop, config: Config) -> int | None:
    """Position of the loop to run on threads: of a tiled band the first parallel tile loop, or any for a wavefront."""
    for place, loop in enumerate(band.loops):
        legal = (loop.tile and (loop.coincident or band.wavefront)) if band.tiled else (loop.free or loop.private)
        if legal and not _asked(loop, names, scop, config, "sequential"):
            if band.tiled or not loop.vector or len(band.loops) == 1:
                return place
    last = band.loops[-1]
    if len(band.loops) == 1 and not band.tiled and last.combines and not _depth(band.child):
        return None if _asked(last, names, scop, config, "sequential") else 0
    return None


def _in_chunks(band: Band, names: tuple[str, ...], scop: Scop, config: Config) -> bool:
    """Whether chunks of the vector loop, moved outermost, are the only parallel loop of an untiled band."""
    last = band.loops[-1]
    if band.tiled or not band.permutable or not (last.vector and last.coincident):
        return False
    return not _asked(last, names, scop, config, "sequential")


def _asked(loop: Loop, names: tuple[str, ...], scop: Scop, config: Config, kind: str) -> bool:
    """Whether a directive of that kind speaks of an iterator in this loop."""
    for directive in config.directives:
        for index in directive.stmts if directive.type == kind else ():
            statement = scop.statements[index]
            if statement.name in names and loop.exprs[statement.name] == statement.iterators[directive.iterator]:
                return True
    return False


def _depth(node: Node) -> int:
    """Loops on the longest path."""
    if isinstance(node, Sequence):
        return max(_depth(child) for _, child in node.children)
    return len(node.loops) + _depth(node.child) if isinstance(node, Band) else 0
