"""Updates x[i][c] += s[i] * y[c] of a whole tile as one vector instruction, one repeat a row."""

from dataclasses import dataclass

from pycparser import c_ast

from npu_sparse.schedule.ascend.events import Block, Instruction, Item
from npu_sparse.schedule.ascend.memory import Layout
from npu_sparse.schedule.ascend.nest import BLOCK, Instance, Loop, assignment, operands

LANES, REPEATS = 64, 255  # of one instruction, at most


@dataclass(frozen=True)
class Spread:
    """A matrix with every value, or its negative, in a block of its own: what multiplies a row.

    Attributes:
        floats: of the matrix in UB.
    """

    name: str
    array: str
    negative: bool
    floats: int

    @property
    def buffers(self) -> dict[str, int]:
        """Floats of its buffers."""
        return {self.name: BLOCK * self.floats, **({f"{self.name}Of": self.floats} if self.negative else {})}

    def items(self) -> list[Item]:
        """Fills it, in the first turn."""
        source, made = self.array, []
        if self.negative:
            source = f"{self.name}Of"
            text = f"Muls({source}, {self.array}, -1.0f, {self.floats});"
            made.append(Instruction("V", text, frozenset({self.array}), frozenset({source})))
        text = f"Brcb({self.name}, {source}, {self.floats // BLOCK}, BrcbRepeatParams(1, 8));"
        made.append(Instruction("V", text, frozenset({source}), frozenset({self.name})))
        return [Block("if (turn == 1)", made)]


def outer_product(loop: Loop, layout: Layout, place, spreads: dict) -> list[Item] | None:
    """The instruction for two parallel loops around an update, rows outside; None where it is no such update.

    Args:
        place: the array and the place in UB of a C expression, for values of the iterators.
        spreads: of the kernel, by array and sign; a missing one is added.
    """
    inner, instance = _nest(loop)
    factors = _factors(instance) if instance else None
    if factors is None:
        return None
    sign, *nodes = factors
    target, left, right = (place(node, instance.iterators) for node in nodes)
    scalar, row = (right, left) if left[1].terms.get(inner.iterator) else (left, right)
    steps = [tuple(where.terms.get(t, 0) for t in (loop.iterator, inner.iterator)) for _, where in (target, scalar, row)]
    (pitch, one), (stride, zero), (same, along) = steps
    matrix = layout.slices[scalar[0]]
    if (one, zero, along, same) != (1, 0, 1, 0) or pitch % BLOCK or pitch // BLOCK > REPEATS or not 0 < stride <= REPEATS:
        return None
    kept = layout.slices[target[0]].kept()
    if kept[-1] > LANES or max(kept[:-1]) > REPEATS or not matrix.fixed or matrix.floats // BLOCK > REPEATS:
        return None
    starts = [where.at(loop.iterator, loop.start).at(inner.iterator, inner.start) for _, where in (target, scalar, row)]
    if not (starts[0].aligned() and starts[2].aligned()):
        return None
    key = (scalar[0], sign == "-")
    spread = spreads.setdefault(key, Spread(f"spread{len(spreads)}", *key, matrix.floats))
    arguments = [f"{target[0]}[{starts[0]}]", f"{spread.name}[{starts[1].times(BLOCK)}]", f"{row[0]}[{starts[2]}]"]
    arguments += [inner.length, loop.length, f"BinaryRepeatParams(1, 0, 1, {pitch // BLOCK}, {stride}, 0)"]
    reads = frozenset({target[0], spread.name, row[0]})
    comment = Instruction("", f"// {instance.statement.name}: {' '.join(instance.statement.body.split())}")
    return [comment, Instruction("V", f"MulAddDst({', '.join(arguments)});", reads, frozenset({target[0]}))]


def _nest(loop: Loop) -> tuple[Loop | None, Instance | None]:
    """The inner loop and the statement of a rectangle; (None, None) for anything else."""
    inner = loop.body[0]
    if len(loop.body) > 1 or not isinstance(inner, Loop) or len(inner.body) > 1 or not isinstance(inner.body[0], Instance):
        return None, None
    rectangle = not any(loop.iterator in bound.terms or bound.hides(loop.iterator) for bound in (inner.start, inner.count))
    if not (loop.parallel and inner.parallel and loop.step == inner.step == 1 and rectangle):
        return None, None
    return inner, inner.body[0]


def _factors(instance: Instance):
    """`(sign, x, s, y)` of x += s * y and x -= s * y with elements of arrays; None for anything else."""
    tree = assignment(instance.statement)
    product = operands(tree.rvalue)
    if tree.op not in ("+=", "-=") or not product or product[0] != "*":
        return None
    nodes = (tree.lvalue, *product[1:])
    return (tree.op[0], *nodes) if all(isinstance(node, c_ast.ArrayRef) for node in nodes) else None
