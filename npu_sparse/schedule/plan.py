"""The result of scheduling: a tree of bands and sequences, as rows for people and as an isl schedule tree for code generation."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import islpy as isl

from npu_sparse.schedule.scop import Scop, ScopError


@dataclass(frozen=True)
class Loop:
    """One scheduling dimension of a band.

    Attributes:
        exprs: statement -> affine expression over its iterators and the parameters: {"S0": "i + j", "S1": "k"}.
        coincident: no dependence that is active where the band starts crosses iterations of this loop.
        free: the same, not counting what outer loops carry; outer includes the loops before it in an untiled band.
        private: parallel when each iteration has its own copy of some temporaries, which code generation provides.
        relaxed: carries updates of a reduction that may run in any order: in this one, it does not respect them.
        combines: parallel when sums and products of one element are made in parts, where it is the innermost loop of its band.
        parallel, vector: marked for threads, or for SIMD; transform.py decides.
        tile: tile size, 0 for a loop that is not tiled.
        unroll: unroll-and-jam factor, 0 for none.
    """

    exprs: dict[str, str]
    coincident: bool = False
    free: bool = False
    private: bool = False
    relaxed: bool = False
    combines: bool = False
    parallel: bool = False
    vector: bool = False
    tile: int = 0
    unroll: int = 0

    @property
    def mark(self) -> str:
        """Of the schedule tree: "parallel", "vector" or "", and whether that needs what is combined."""
        kind = "parallel" if self.parallel else "vector" if self.vector else ""
        return f"{kind} reduction" if kind and self.combines and not (self.free or self.coincident or self.private) else kind


@dataclass(frozen=True)
class Leaf:
    """Where one statement, or statements in any order, execute."""


@dataclass(frozen=True)
class Sequence:
    """Groups of statements, one after the other."""

    children: tuple[tuple[tuple[str, ...], "Node"], ...]


@dataclass(frozen=True)
class Band:
    """Consecutive loops.

    Attributes:
        loops: outermost first. The tile loops come in this order.
        permutable: every dependence active at the band's start is respected by each loop on its own, so that tiling is legal.
        wavefront: the first tile loop runs over the sum of the first two, which makes the second parallel.
        points: order of the point loops inside a tile, as positions in `loops`; () keeps it. Needs `permutable`.
        shared: how many of the point loops of a tiled band, outermost first, its statements run in together; the other ones are
            loops of the bands below, one for each statement. -1 is all of them.
    """

    loops: tuple[Loop, ...]
    child: "Node"
    permutable: bool = False
    wavefront: bool = False
    points: tuple[int, ...] = ()
    shared: int = -1

    @property
    def tiled(self) -> bool:
        return any(loop.tile for loop in self.loops)

    def inner(self) -> tuple[Loop, ...]:
        """The point loops in the order of execution; of an untiled band, the loops."""
        loops = tuple(self.loops[i] for i in self.points) if self.points else self.loops
        return loops if self.shared < 0 else loops[: self.shared]


Node = Leaf | Sequence | Band


@dataclass(frozen=True)
class Row:
    """One dimension of the flat view of a plan.

    Attributes:
        kind: "loop" or "scalar" (an order between groups of statements).
        exprs: statement -> affine expression; statements that have ended are "0".
        band: bands are numbered in the order of the text; rows of one band share the number. -1 for a scalar row.
        parallel, vector: the statements for which this row is a parallel or a SIMD loop; empty, thus false, for none.
        tile: the largest tile size along the row, 0 for none.
    """

    kind: str
    exprs: dict[str, str]
    band: int
    parallel: frozenset[str] = frozenset()
    vector: frozenset[str] = frozenset()
    tile: int = 0


@dataclass(frozen=True)
class Plan:
    """A legal schedule of a scop.

    Attributes:
        root: the schedule.
        strategy: name of the configuration.
        notes: what happened on the way that the user did not ask for, such as fallbacks.
    """

    scop: Scop
    root: Node
    strategy: str
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """The flat view, without tiling: every statement has an expression in every row."""
        return _rows(self)

    def union_map(self) -> isl.UnionMap:
        """The order in which instances execute, tiling, wavefront and interchanges included."""
        return self.tree().get_map()

    def tree(self) -> isl.Schedule:
        """The isl schedule tree. A mark "parallel", "vector" or "unroll" stands above a band and means its first loop."""
        return _tree(self)

    def bands(self) -> Iterator[tuple[tuple[str, ...], Band]]:
        """Every band with its statements, in the order of the text."""
        yield from _bands(self.root, tuple(statement.name for statement in self.scop.statements))

    def with_root(self, root: Node) -> "Plan":
        return replace(self, root=root)


def _bands(node: Node, statements: tuple[str, ...]):
    if isinstance(node, Sequence):
        for names, child in node.children:
            yield from _bands(child, names)
    elif isinstance(node, Band):
        yield statements, node
        yield from _bands(node.child, statements)


def _rows(plan: Plan) -> tuple[Row, ...]:
    names = tuple(statement.name for statement in plan.scop.statements)
    counter = iter(range(10**9))
    return tuple(_pad(row, names) for row in _flatten(plan.root, names, counter))


def _pad(row: Row, names: tuple[str, ...]) -> Row:
    return replace(row, exprs={name: row.exprs.get(name, "0") for name in names})


def _flatten(node: Node, names: tuple[str, ...], counter: Iterator[int]) -> list[Row]:
    if isinstance(node, Leaf):
        return []
    if isinstance(node, Band):
        band = next(counter)
        mine = [
            Row(
                "loop",
                loop.exprs,
                band,
                frozenset(names) if loop.parallel else frozenset(),
                frozenset(names) if loop.vector else frozenset(),
                loop.tile,
            )
            for loop in (node.loops if node.tiled and node.shared < 0 else node.inner())
        ]
        return mine + _flatten(node.child, names, counter)
    order = Row("scalar", {name: str(place) for place, (group, _) in enumerate(node.children) for name in group}, -1)
    columns = [_flatten(child, group, counter) for group, child in node.children]
    return [order, *_align(columns)]


def _align(columns: list[list[Row]]) -> list[Row]:
    """Rows of sibling groups side by side. A row is a scalar row only if it is one in all groups that reach it."""
    merged = []
    for depth in range(max((len(column) for column in columns), default=0)):
        level = [column[depth] for column in columns if depth < len(column)]
        loops = [row for row in level if row.kind == "loop"]
        merged.append(
            Row(
                "loop" if loops else "scalar",
                {name: text for row in level for name, text in row.exprs.items()},
                min((row.band for row in loops), default=-1),
                frozenset().union(*(row.parallel for row in level)),
                frozenset().union(*(row.vector for row in level)),
                max((row.tile for row in level), default=0),
            )
        )
    return merged


def partial_schedule(scop: Scop, loops: list[dict[str, str]]) -> isl.MultiUnionPwAff:
    """The loops, each statement -> expression, as a partial schedule over all statements named in the first."""
    parameters = f"[{', '.join(scop.parameters)}] -> " if scop.parameters else ""
    tuples = {statement.name: f"{statement.name}[{', '.join(statement.iterators)}]" for statement in scop.statements}
    pieces = ["{ " + "; ".join(f"{tuples[name]} -> [({text})]" for name, text in loop.items()) + " }" for loop in loops]
    return isl.MultiUnionPwAff(f"{parameters}[{', '.join(pieces)}]")


def _tree(plan: Plan) -> isl.Schedule:
    scop = plan.scop
    domain = scop.domain().intersect_params(scop.context)
    domains = {statement.name: isl.UnionSet.from_set(statement.domain) for statement in scop.statements}
    node = isl.Schedule.from_domain(domain).get_root().child(0)
    return _insert(node, plan.root, scop, domains).get_schedule()


def _insert(node: isl.ScheduleNode, item: Node, scop: Scop, domains: dict[str, isl.UnionSet]) -> isl.ScheduleNode:
    """The schedule node with `item` below it; the position on return is the one on entry."""
    depth = node.get_tree_depth()
    if isinstance(item, Sequence):
        filters = None
        for group, _ in item.children:
            points = domains[group[0]]
            for name in group[1:]:
                points = points.union(domains[name])
            piece = isl.UnionSetList.from_union_set(points)
            filters = piece if filters is None else filters.concat(piece)
        node = node.insert_sequence(filters)
        for place, (_, child) in enumerate(item.children):
            node = _insert(node.child(place).child(0), child, scop, domains)
            node = node.ancestor(node.get_tree_depth() - depth)
    elif isinstance(item, Band):
        for piece in _pieces(item):
            node = _insert_band(node, piece, scop).child(0)
        node = _insert(node, item.child, scop, domains)
        node = node.ancestor(node.get_tree_depth() - depth)
    return node


@dataclass(frozen=True)
class _Piece:
    """A band as isl sees it: loops, coincidence, permutability, an optional mark above, and whether to unroll it."""

    exprs: list[dict[str, str]]
    coincident: list[bool]
    permutable: bool
    mark: str = ""
    unroll: bool = False


def _pieces(band: Band) -> list[_Piece]:
    tiles = [loop for loop in band.loops if loop.tile]
    pieces = []
    if tiles:
        exprs = [{name: f"floor(({text})/{loop.tile})" for name, text in loop.exprs.items()} for loop in tiles]
        coincident = [loop.coincident for loop in tiles]
        parallel = [loop.parallel for loop in tiles]
        permutable = band.permutable
        if band.wavefront and len(tiles) > 1:
            exprs[0] = {name: f"{exprs[0][name]} + {exprs[1][name]}" for name in exprs[0]}
            coincident, parallel = [False, True] + coincident[2:], [False, any(parallel)] + [False] * (len(tiles) - 2)
        pieces += _split(exprs, coincident, ["parallel" if mark else "" for mark in parallel], permutable)
    inner = band.inner()
    unrolled = [loop for loop in inner if loop.unroll]
    exprs, coincident, marks = [], [], []
    for loop in inner:
        exprs.append({name: f"floor(({text})/{loop.unroll})" for name, text in loop.exprs.items()} if loop.unroll else loop.exprs)
        coincident.append(loop.free or loop.coincident)
        marks.append((replace(loop, parallel=False) if tiles else loop).mark)
    pieces += _split(exprs, coincident, marks, band.permutable)
    if unrolled:
        # Unroll-and-jam: the register tile is executed inside of the innermost loop, completely unrolled.
        flags = [loop.coincident for loop in unrolled]
        pieces.append(_Piece([loop.exprs for loop in unrolled], flags, band.permutable, "unroll", unroll=True))
    return pieces


def _split(exprs: list, coincident: list[bool], marks: list[str], permutable: bool) -> list[_Piece]:
    """Bands cut so that each marked loop is the first of its band."""
    pieces: list[_Piece] = []
    for text, flag, mark in zip(exprs, coincident, marks):
        if mark or not pieces or pieces[-1].mark.startswith("vector"):
            pieces.append(_Piece([text], [flag], permutable, mark))
        else:
            pieces[-1].exprs.append(text)
            pieces[-1].coincident.append(flag)
    return pieces


def _insert_band(node: isl.ScheduleNode, piece: _Piece, scop: Scop) -> isl.ScheduleNode:
    node = node.insert_partial_schedule(partial_schedule(scop, piece.exprs))
    node = node.band_set_permutable(int(piece.permutable))
    for place, flag in enumerate(piece.coincident):
        node = node.band_member_set_coincident(place, int(flag))
        if piece.unroll:
            node = node.band_member_set_ast_loop_type(place, isl.ast_loop_type.unroll)
    if piece.mark:
        node = node.insert_mark(isl.Id(piece.mark)).child(0)
    return node


def original(scop: Scop) -> Plan:
    """The plan that keeps the order of the source, one loop per band."""
    return Plan(scop, _original(scop, tuple(scop.statements), 0), "original")


def _original(scop: Scop, statements: tuple, depth: int) -> Node:
    """The tree of the original positions from `depth` on: order, loop, order, loop ..."""
    groups: dict[int, list] = {}
    for statement in statements:
        groups.setdefault(statement.position[depth] if depth < len(statement.position) else 0, []).append(statement)
    children = []
    for place in sorted(groups):
        members = tuple(groups[place])
        loops = {s.name: str(s.position[depth + 1]) for s in members if depth + 1 < len(s.position)}
        if len(loops) not in (0, len(members)) or (not loops and len(members) > 1):
            raise ScopError(f"{scop.source}: statements {', '.join(s.name for s in members)} must not share a position")
        node = Band((Loop(loops),), _original(scop, members, depth + 2)) if loops else Leaf()
        children.append((tuple(s.name for s in members), node))
    return children[0][1] if len(children) == 1 else Sequence(tuple(children))
