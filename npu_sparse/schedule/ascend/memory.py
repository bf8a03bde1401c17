"""Where the arrays of a nest live: in GM, moved by rectangles; in UB; or, one value at a time, in a scalar register."""

from dataclasses import dataclass
from functools import reduce

import islpy as isl

from npu_sparse.schedule.ascend.nest import (
    BLOCK,
    Affine,
    Instance,
    Loop,
    Node,
    Phase,
    affine,
    assignment,
    expression,
    references,
    subscript,
)  # fmt: skip
from npu_sparse.schedule.loop_analysis import union
from npu_sparse.schedule.scop import Scop, ScopError, Statement

UB_BYTES = 196608 - 256 - 8192  # of an Ascend 910B vector core, less what the runtime and some instructions reserve


@dataclass(frozen=True)
class Slice:
    """The rectangle of an array that one turn of the core loop uses.

    Attributes:
        shape: extents of the whole array.
        low, count: the rectangle's first index and extent along each dimension, in the iterators of the core loop.
        low_written, count_written: of what the turn writes.
        extent: the largest count along each dimension.
        folded: dimensions that keep one index at a time, because every element dies before the next index begins.
        loaded, stored: whether GM holds the values before, or needs them afterwards.
        fixed: whether every turn loads the same values and changes none, so that they are loaded once.
    """

    array: str
    shape: tuple[int, ...]
    low: tuple[Affine, ...]
    count: tuple[Affine, ...]
    low_written: tuple[Affine, ...]
    count_written: tuple[Affine, ...]
    extent: tuple[int, ...]
    folded: frozenset[int]
    loaded: bool
    stored: bool
    fixed: bool

    @property
    def register(self) -> bool:
        """Whether it is a value that never leaves the scalar unit."""
        return not (self.loaded or self.stored) and all(n == 1 for n in self.kept())

    def kept(self) -> tuple[int, ...]:
        return tuple(1 if axis in self.folded else n for axis, n in enumerate(self.extent))

    @property
    def pitches(self) -> tuple[int, ...]:
        """Floats in UB from one index to the next, along each dimension; rows begin at multiples of 32 bytes."""
        kept, pitch, listed = self.kept(), 1, []
        for axis in reversed(range(len(kept))):
            listed.append(pitch)
            pitch *= kept[axis]
            if axis == len(kept) - 1 and len(kept) > 1:
                pitch = round_up(pitch)
        return tuple(reversed(listed))

    @property
    def floats(self) -> int:
        """Of UB, for one turn."""
        return round_up(self.pitches[0] * self.kept()[0]) if self.extent else BLOCK

    def place(self, indices: list[Affine]) -> Affine:
        """Of an element in UB."""
        offset = Affine()
        for axis, index in enumerate(indices):
            if axis not in self.folded:
                offset += (index - self.low[axis]).times(self.pitches[axis])
        return offset


@dataclass(frozen=True)
class Layout:
    """A nest with its memory.

    Attributes:
        slices: by array.
        turns: the core loop: iterator, first value and number of values of each of its loops.
        body: what one turn runs.
    """

    slices: dict[str, Slice]
    turns: tuple[tuple[str, int, int], ...]
    body: list[Node]

    @property
    def total(self) -> int:
        """Turns of the core loop."""
        return reduce(int.__mul__, (count for _, _, count in self.turns), 1)

    @property
    def buffers(self) -> int:
        """Copies of the slices that move, so that one turn computes while others load and store."""
        return 2 if self.total > 1 else 1

    def copies(self, piece: Slice) -> int:
        return self.buffers if (piece.loaded or piece.stored) and not piece.fixed else 1

    @property
    def bytes(self) -> int:
        """Of UB, for all slices."""
        return sum(4 * piece.floats * self.copies(piece) for piece in self.slices.values() if not piece.register)


def round_up(floats: int) -> int:
    return (floats + BLOCK - 1) // BLOCK * BLOCK


def place(scop: Scop, phase: Phase, sizes: dict[str, int], scratch) -> Layout:
    """The layout with the fewest loops shared by the cores whose slices, and the bytes of `scratch(layout)`, fit in UB."""
    needed = []
    for depth in range(min(1, len(phase.outer) - 1), len(phase.outer)):
        fitted = layout(scop, phase, sizes, depth)
        if fitted is not None:
            needed.append(fitted.bytes + scratch(fitted))
            if needed[-1] <= UB_BYTES:
                return fitted
    if not needed:
        raise ScopError(f"{scop.name}: cores must share loops of constant bounds and write apart, got a plan where they do not")
    raise ScopError(f"{scop.name}: what one turn of a core uses must fit in {UB_BYTES} bytes of UB, got {min(needed)}")


def layout(scop: Scop, phase: Phase, sizes: dict[str, int], depth: int) -> Layout | None:
    """With the `depth` outermost loops shared by the cores; None where their bounds are not constant."""
    body, turns = phase.body, []
    while len(body) == 1 and isinstance(body[0], Loop) and int(body[0].iterator[1:]) < depth:
        loop = body[0]
        if loop.start.terms or loop.count.terms or loop.step != 1:
            return None
        turns.append((loop.iterator, loop.start.constant, loop.count.constant))
        body = loop.body
    if any(isinstance(item, Loop) and int(item.iterator[1:]) < depth for item in body):
        return None
    reader = _Footprints(scop, phase, sizes, depth)
    used = dict.fromkeys(a.array for s in statements(body) for a in (*s.reads, *s.writes) if scop.arrays[a.array].shape)
    written = {a.array for s in scop.statements for a in s.writes}
    scalars = [name for name in written if not scop.arrays[name].shape]
    if scalars:
        raise ScopError(f"{scop.name}: results must be arrays, got the scalar {scalars[0]}")
    slices = {name: reader.slice(name, body) for name in used}
    return Layout(slices, tuple(turns), body) if all(slices.values()) else None


def statements(body: list[Node]) -> list[Statement]:
    """The statements of a nest, in the order of the text."""
    return [s for item in body for s in ([item.statement] if isinstance(item, Instance) else statements(item.body))]


class _Footprints:
    """What the turns of a core loop of `depth` loops touch."""

    def __init__(self, scop: Scop, phase: Phase, sizes: dict[str, int], depth: int):
        self.scop, self.phase, self.sizes, self.depth = scop, phase, sizes, depth
        self.turn = phase.outer[depth]

    def slice(self, name: str, body: list[Node]) -> Slice | None:
        """None where turns would overwrite each other's results."""
        array = self.scop.arrays[name]
        if array.ctype != "float":
            raise ScopError(f"{self.scop.name}: arrays must be fp32, got {array.ctype} {name}")
        accessed = [a.relation for s in self._statements() for a in (*s.reads, *s.writes) if a.array == name]
        written = [a.relation for s in self._statements() for a in s.writes if a.array == name]
        touched = self._elements(accessed)
        intervals = [_interval(touched, axis) for axis in range(len(array.shape))]
        own = self._elements(written) if written else None
        results = [_interval(own, axis) for axis in range(len(array.shape))] if own else intervals
        gaps = reduce(isl.Map.flat_range_product, results).subtract(own) if own else None
        loaded = not own or self._needs(name)
        stored = own is not None and (array.live_out or self._wanted(name))
        if stored and not gaps.is_empty():
            if not gaps.apply_range(own.reverse()).subtract(isl.Map.identity(own.get_space().domain().map_from_set())).is_empty():
                return None
            loaded = True
        bounds = [self._bounds(interval) for interval in intervals]
        fixed = own is None and not any(low.terms or count.terms for low, count, _ in bounds)
        folded = frozenset() if loaded or stored else _folded(name, body, self.sizes)
        shape = tuple(subscript(expression(extent), {}, self.sizes).constant for extent in array.shape)
        low, count, extent = (tuple(column) for column in zip(*bounds))
        low_written, count_written, _ = (tuple(column) for column in zip(*map(self._bounds, results)))
        return Slice(name, shape, low, count, low_written, count_written, extent, folded, loaded, stored, fixed)

    def _statements(self) -> list[Statement]:
        return [s for s in self.scop.statements if not self.phase.domain.intersect(isl.UnionSet.from_set(s.domain)).is_empty()]

    def _elements(self, relations: list[isl.Map]) -> isl.Map:
        """Turns to the elements that their instances access."""
        accesses = union(relations).intersect_domain(self.phase.domain)
        touched = isl.Map.from_union_map(self.turn.reverse().apply_range(accesses)).reset_tuple_id(isl.dim_type.out)
        return touched.project_out(isl.dim_type.param, 0, touched.dim(isl.dim_type.param))

    def _needs(self, name: str) -> bool:
        """Whether a turn reads a value that it has not written."""
        beside = self.turn.apply_range(self.turn.reverse())
        for read, flow in self.phase.dependences.written[name][1]:
            here = read.intersect_domain(self.phase.domain).domain()
            if not here.is_subset(flow.intersect(beside).range()):
                return True
        return False

    def _wanted(self, name: str) -> bool:
        """Whether another nest reads what this one writes."""
        inside = self.phase.domain
        return any(
            not flow.intersect_domain(inside).subtract_range(inside).is_empty()
            for _, flow in self.phase.dependences.written[name][1]
        )

    def _bounds(self, interval: isl.Map) -> tuple[Affine, Affine, int]:
        """Lowest index, extent, and the largest extent of all turns."""
        extent = interval.dim_max(0).sub(interval.dim_min(0)).max_val().to_python() + 1
        for axis in range(self.depth):
            interval = interval.set_dim_name(isl.dim_type.in_, axis, f"t{axis}")
        here = interval.move_dims(isl.dim_type.param, 0, isl.dim_type.in_, 0, self.depth).range()
        build = isl.AstBuild.from_context(here.params())
        low, high = (affine(build.expr_from_pw_aff(end.gist(here.params())), {}) for end in (here.dim_min(0), here.dim_max(0)))
        return low, high - low + Affine(1), extent


def _interval(touched: isl.Map, axis: int) -> isl.Map:
    """Turns to the indices from the lowest to the highest along one dimension."""
    indices = touched.project_out(isl.dim_type.out, axis + 1, touched.dim(isl.dim_type.out) - axis - 1)
    indices = indices.project_out(isl.dim_type.out, 0, axis)
    above, below = (indices.apply_range(isl.Map(f"{{ [i] -> [j] : i {order} j }}")) for order in ("<=", ">="))
    return above.intersect(below)


def _folded(name: str, body: list[Node], sizes: dict[str, int]) -> frozenset[int]:
    """Dimensions that every access runs through with the same loop."""
    touched = list(_accesses(name, body, sizes, {}))
    folded = set()
    for axis in range(len(touched[0][0])):
        indices = {str(place[axis]) for place, _ in touched}
        iterator = next(iter(indices))
        loops = {id(loops.get(iterator)) for _, loops in touched}
        if len(indices) == len(loops) == 1 and iterator in touched[0][1]:
            folded.add(axis)
    return frozenset(folded)


def _accesses(name: str, body: list[Node], sizes: dict[str, int], loops: dict[str, Loop]):
    """The subscripts of every access, and the loops around it by iterator."""
    for item in body:
        if isinstance(item, Instance):
            for array, indices in references(assignment(item.statement)):
                if array == name:
                    yield [subscript(index, item.iterators, sizes) for index in indices], loops
        else:
            inner = {**loops, item.iterator: item} if isinstance(item, Loop) else loops
            yield from _accesses(name, item.body, sizes, inner)
