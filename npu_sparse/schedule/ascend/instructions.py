"""Vector instructions, and scalar ones where there is none, for the statements of a nest whose arrays lie in UB."""

import math
from dataclasses import replace

from pycparser import c_ast

from npu_sparse.schedule.ascend.events import Block, Instruction, Item
from npu_sparse.schedule.ascend.memory import Layout, round_up
from npu_sparse.schedule.ascend.nest import (
    BINARY,
    BLOCK,
    Affine,
    Branch,
    Instance,
    Loop,
    Node,
    assignment,
    operands,
    references,
    subscript,
)  # fmt: skip
from npu_sparse.schedule.ascend.products import Spread, outer_product
from npu_sparse.schedule.scop import Scop, ScopError

WITH_SCALAR = {"Add": "Adds", "Mul": "Muls", "Max": "Maxs"}
CALLS = {"expf": "Exp", "sqrtf": "Sqrt", "fabsf": "Abs", "logf": "Ln"}
REDUCTIONS = {"+": "ReduceSum", "max": "ReduceMax"}


class NotAVectorError(Exception):
    """A loop that no vector instructions compute."""


class Lowering:
    """Turns the nest of a layout into instructions.

    Attributes:
        width: floats of a register, the longest row that an instruction takes.
        registers: how many rows of intermediate values are alive at once.
        reduces: whether sums or maxima of rows need scratch memory.
        spreads: matrices whose values multiply rows, by array and sign.
        per_loop: take a loop for parallel when the statements that are left in it are, whatever shared it in the schedule.
    """

    def __init__(self, scop: Scop, sizes: dict[str, int], layout: Layout, per_loop: bool = False):
        self.scop, self.sizes, self.layout, self.per_loop = scop, sizes, layout, per_loop
        self.width = self.registers = self.values = 0
        self.reduces = False
        self.known: dict[tuple[str, str], str] = {}  # place in UB -> C variable with its value
        self.spreads: dict[tuple[str, bool], Spread] = {}
        body = self._nodes(layout.body)
        self.items = [*(item for spread in self.spreads.values() for item in spread.items()), *body]

    @property
    def scratch_floats(self) -> dict[str, int]:
        """Floats of the buffers besides arrays: registers, and what reductions and scalar functions need."""
        floats = {f"register{n}": self.width for n in range(self.registers)}
        for spread in self.spreads.values():
            floats.update(spread.buffers)
        work = {"work": round_up(2 * math.ceil(self.width / 64))} if self.reduces else {}
        return {**floats, **work, "result": 8}

    # ---- nests

    def _nodes(self, nodes: list[Node]) -> list[Item]:
        return [item for node in nodes for item in self._node(node)]

    def _node(self, node: Node) -> list[Item]:
        if isinstance(node, Instance):
            return _Scalar(self, node).items
        if isinstance(node, Loop):
            product = outer_product(node, self.layout, self.place, self.spreads)
            if product:
                self.known = {}
                return product
            known = dict(self.known)
            try:
                return self._vectors(self._merged(node))
            except NotAVectorError:
                self.known = known
        self.known = {}
        body = self._nodes(node.body)
        self.known = {}
        if isinstance(node, Branch):
            return [Block(f"if ({node.condition})", body)]
        t, end = node.iterator, node.start + (node.count if node.step == 1 else Affine(0, {f"({node.count})": node.step}))
        return [Block(f"for (int32_t {t} = {node.start}; {t} < {end}; {t} += {node.step})", body)]

    def _merged(self, loop: Loop) -> Loop:
        """One loop in the place of two whose rows follow each other in UB without a gap, or `loop`."""
        inner = loop.body[0]
        if len(loop.body) > 1 or not isinstance(inner, Loop) or not (loop.parallel and inner.parallel):
            return loop
        inner = self._merged(inner)
        length = inner.count.constant
        simple = loop.step == inner.step == 1 and not inner.start.terms and not inner.count.terms and not loop.count.terms
        if not simple or length % BLOCK or not all(isinstance(item, Instance) for item in inner.body):
            return loop
        for item in inner.body:
            for node in _array_nodes(assignment(item.statement)):
                _, place = self.place(node, item.iterators)
                if place.terms.get(loop.iterator, 0) != length * place.terms.get(inner.iterator, 0) or place.hides(loop.iterator):
                    return loop
        body = [Instance(item.statement, {name: value.at(loop.iterator, loop.start) for name, value in item.iterators.items()})
                for item in inner.body]  # fmt: skip
        return replace(inner, count=loop.count.times(length), body=body)

    def _vectors(self, loop: Loop) -> list[Item]:
        """Each statement of an innermost loop over all of its iterations, one statement after the other."""
        if loop.step != 1 or not all(isinstance(item, Instance) for item in loop.body):
            raise NotAVectorError
        single = len(loop.body) == 1
        parallel = loop.parallel or self.per_loop and single and loop.body[0].statement.name in loop.alone
        if not parallel and not single:
            raise NotAVectorError
        return [item for instance in loop.body for item in _Vector(self, instance, loop, parallel).items]

    # ---- what scalar and vector statements share

    def place(self, node, iterators: dict[str, Affine]) -> tuple[str, Affine]:
        """The array that a C expression accesses, and where in UB."""
        [(array, indices)] = references(node)
        return array, self.layout.slices[array].place([subscript(index, iterators, self.sizes) for index in indices])

    def is_register(self, array: str) -> bool:
        return self.layout.slices[array].register

    def variable(self) -> str:
        self.values += 1
        return f"value{self.values}"

    def forget(self, array: str) -> None:
        self.known = {key: value for key, value in self.known.items() if key[0] != array}


class _Statement:
    """Instructions of one statement; subclasses say which."""

    def __init__(self, lowering: Lowering, instance: Instance):
        self.lowering, self.statement, self.iterators = lowering, instance.statement, instance.iterators
        self.items: list[Item] = []

    def value(self, tree):
        """What the statement assigns, with the update of `x op= e` written out."""
        if tree.op == "=":
            return tree.rvalue
        return c_ast.BinaryOp(tree.op[:-1], tree.lvalue, tree.rvalue)

    def load(self, array: str, place: Affine) -> str:
        """A C expression with the value at a place in UB."""
        if self.lowering.is_register(array):
            return array
        key = (array, str(place))
        if key not in self.lowering.known:
            name = self.lowering.known[key] = self.lowering.variable()
            self.scalar(f"const float {name} = {array}.GetValue({place});", reads={array})
        return self.lowering.known[key]

    def store(self, array: str, place: Affine, text: str) -> None:
        if self.lowering.is_register(array):
            self.items.append(Instruction("", f"{array} = {text};"))
            return
        name = self.lowering.variable()
        self.items.append(Instruction("", f"const float {name} = {text};"))
        self.scalar(f"{array}.SetValue({place}, {name});", writes={array})
        self.lowering.forget(array)
        self.lowering.known[array, str(place)] = name

    def scalar(self, text: str, reads=(), writes=()) -> None:
        self.items.append(Instruction("S", text, frozenset(reads), frozenset(writes)))

    def vector(self, text: str, reads=(), writes=()) -> None:
        self.items.append(Instruction("V", text, frozenset(reads), frozenset(writes)))

    def constant(self, node) -> str | None:
        """The text of a number, a size or a scalar argument; None for anything else."""
        if isinstance(node, c_ast.Constant):
            return node.value
        if isinstance(node, c_ast.ID):
            if node.name in self.iterators:
                return f"static_cast<float>({self.iterators[node.name]})"
            if node.name in self.lowering.sizes:
                return f"{float(self.lowering.sizes[node.name])!r}f"
            return "UNBOUNDED" if node.name == "INFINITY" else node.name
        return None

    def function(self, operation: str, text: str) -> str:
        """A function of one value: the scalar unit has none, so the vector unit computes it."""
        self.vector(f"Duplicate(result, {text}, 8);", writes={"result"})
        self.vector(f"{operation}(result, result, 8);", reads={"result"}, writes={"result"})
        name = self.lowering.variable()
        self.scalar(f"const float {name} = result.GetValue(0);", reads={"result"})
        return name

    def unknown(self, node):
        raise ScopError(f"{self.lowering.scop.name}: {self.statement.name} must use + - * /, fmaxf and {', '.join(CALLS)}, "
                        f"got {node.name.name if isinstance(node, c_ast.FuncCall) else type(node).__name__}")  # fmt: skip

    def combined(self, op: str, left: str, right: str) -> str:
        return f"({left} > {right} ? {left} : {right})" if op == "max" else f"({left} {op} {right})"

    def scalar_value(self, node) -> str:
        """A C expression with the value of a syntax tree."""
        constant = self.constant(node)
        if constant is not None:
            return constant
        if isinstance(node, c_ast.Cast):
            return self.scalar_value(node.expr)
        if isinstance(node, c_ast.ArrayRef):
            return self.load(*self.lowering.place(node, self.iterators))
        if isinstance(node, c_ast.UnaryOp) and node.op in "+-":
            return f"({node.op}{self.scalar_value(node.expr)})"
        split = operands(node)
        if split:
            op, left, right = split
            return self.combined(op, self.scalar_value(left), self.scalar_value(right))
        if isinstance(node, c_ast.FuncCall) and node.name.name in CALLS:
            return self.function(CALLS[node.name.name], self.scalar_value(node.args.exprs[0]))
        return self.unknown(node)


class _Scalar(_Statement):
    """One instance on the scalar unit."""

    def __init__(self, lowering: Lowering, instance: Instance):
        super().__init__(lowering, instance)
        tree = assignment(self.statement)
        text = self.scalar_value(self.value(tree))
        self.store(*lowering.place(tree.lvalue, self.iterators), text)


class _Vector(_Statement):
    """All instances of an innermost loop as vector instructions over rows; NotAVectorError where its accesses are no rows."""

    def __init__(self, lowering: Lowering, instance: Instance, loop: Loop, parallel: bool):
        super().__init__(lowering, instance)
        self.loop = loop
        self.free: list[str] = []
        self.made = 0
        tree = assignment(self.statement)
        self.start = self._common_start(tree)
        self.aligned = self.start.aligned()
        self.items.append(Instruction("", f"// {self.statement.name}: {' '.join(self.statement.body.split())}"))
        target = lowering.place(tree.lvalue, self.iterators)
        if not target[1].terms.get(loop.iterator):
            self._reduce(tree, *target)
        elif not parallel:
            raise NotAVectorError
        else:
            self._assign(self.value(tree), *target)
        lowering.registers = max(lowering.registers, self.made)

    def _common_start(self, tree) -> Affine:
        """Where the first row begins; the others begin at the same offset from a multiple of 32 bytes."""
        starts = []
        for node in _array_nodes(tree):
            array, place = self.lowering.place(node, self.iterators)
            step = place.terms.get(self.loop.iterator, 0)
            if step not in (0, 1) or place.hides(self.loop.iterator):
                raise NotAVectorError
            if step:
                starts.append(place.at(self.loop.iterator, self.loop.start))
                kept = self.lowering.layout.slices[array].kept()
                length = kept[-1] if self.loop.count.terms else self.loop.count.constant
                self.lowering.width = max(self.lowering.width, round_up(length) + BLOCK)
        if not starts or not all((start - starts[0]).aligned() for start in starts):
            raise NotAVectorError
        return starts[0]

    # ---- statements

    def _assign(self, value, array: str, place: Affine) -> None:
        out = self._row(array, place)
        if not self._multiply_add(value, out):
            kind, text = self._expression(value, out)
            if kind == "scalar":
                self._issue("Duplicate", out, [], text)
            elif text != out:
                self._issue("Adds", out, [text], "0.0f")
        self.lowering.forget(array)

    def _multiply_add(self, value, out: str) -> bool:
        """x + s * row and x - s * row, into x, in one instruction."""
        split = operands(value)
        product = operands(split[2]) if split and split[0] in "+-" else None
        if not product or product[0] != "*" or self._expression_of(split[1]) != out:
            return False
        sides = [(self._is_row(side), side) for side in product[1:]]
        if sorted(row for row, _ in sides) != [False, True]:
            return False
        scalar = self.scalar_value(next(side for row, side in sides if not row))
        _, row = self._expression(next(side for row, side in sides if row), None)
        if row != out:
            self._issue("Axpy", out, [row], scalar if split[0] == "+" else f"-({scalar})", more={out})
        return row != out

    def _reduce(self, tree, array: str, place: Affine) -> None:
        reduction = self.statement.reduction
        op, left, value = operands(self.value(tree)) or ("", None, None)
        if reduction not in REDUCTIONS or op != reduction or not self.aligned:
            raise NotAVectorError
        if self._is(value, array, place):
            left, value = value, left
        if not self._is(left, array, place) or array in dict(references(value)):
            raise NotAVectorError
        kind, row = self._expression(value, None)
        if kind == "scalar":
            raise NotAVectorError
        self.lowering.reduces = True
        body, self.items = self.items, []
        count, operation = self.loop.count, REDUCTIONS[reduction]
        reads = {_tensor(row)}
        self.vector(f"{operation}(result, {row}, work, {self.loop.length});", reads, {"result", "work"})
        part = self.lowering.variable()
        self.scalar(f"const float {part} = result.GetValue(0);", reads={"result"})
        self.store(array, place, self.combined(reduction, self.load(array, place), part))
        if count.terms:  # of no elements there is no maximum
            self.lowering.known = {}
            self.items = [Block(f"if ({count} > 0)", self.items)]
        self.items = body + self.items

    def _is(self, node, array: str, place: Affine) -> bool:
        return isinstance(node, c_ast.ArrayRef) and self.lowering.place(node, self.iterators) == (array, place)

    # ---- expressions

    def _is_row(self, node) -> bool:
        places = [self.lowering.place(array, self.iterators)[1] for array in _array_nodes(node)]
        return any(place.terms.get(self.loop.iterator) for place in places)

    def _row(self, array: str, place: Affine) -> str:
        start = place.at(self.loop.iterator, self.loop.start)
        if self.aligned:
            return f"{array}[{start}]" if str(start) != "0" else array
        return f"{array}[Down({start}) + lanes.at]"

    def _expression_of(self, node) -> str:
        """The operand that an array's row is; "" for anything else."""
        if not isinstance(node, c_ast.ArrayRef) or not self._is_row(node):
            return ""
        return self._row(*self.lowering.place(node, self.iterators))

    def _expression(self, node, into: str | None) -> tuple[str, str]:
        """`(row or scalar, operand or C text)`; a row is computed in `into`, or in a register."""
        if isinstance(node, c_ast.Cast):
            return self._expression(node.expr, into)
        if not self._is_row(node):
            if any(self.loop.iterator in value.terms for value in self._used(node)):
                raise NotAVectorError
            return "scalar", self.scalar_value(node)
        row = self._expression_of(node)
        if row:
            return "row", row
        if isinstance(node, c_ast.UnaryOp) and node.op in "+-":
            _, text = self._expression(node.expr, into)
            return "row", self._compute("Muls", into, [text], "-1.0f") if node.op == "-" else text
        split = operands(node)
        if split:
            return "row", self._binary(*split, into)
        if isinstance(node, c_ast.FuncCall) and node.name.name in CALLS:
            _, text = self._expression(node.args.exprs[0], into)
            return "row", self._compute(CALLS[node.name.name], into, [text])
        return self.unknown(node)

    def _used(self, node) -> list[Affine]:
        """Values of the iterators that an expression uses as numbers."""
        if isinstance(node, c_ast.ArrayRef):
            return []
        if isinstance(node, c_ast.ID):
            return [self.iterators[node.name]] if node.name in self.iterators else []
        return [value for _, child in node.children() for value in self._used(child)]

    def _binary(self, op: str, left, right, into: str | None) -> str:
        operation = "Max" if op == "max" else BINARY[op]
        (left_kind, left), (right_kind, right) = self._expression(left, None), self._expression(right, None)
        if left_kind == right_kind:
            return self._compute(operation, into, [left, right])
        if left_kind == "scalar" and op in "-/" or op == "/":
            spread = self._compute("Duplicate", None, [], left if left_kind == "scalar" else right)
            return self._compute(operation, into, [spread, right] if left_kind == "scalar" else [left, spread])
        row, scalar = (left, right) if left_kind == "row" else (right, left)
        if op == "-":
            operation, scalar = "Add", f"-({scalar})"
        return self._compute(WITH_SCALAR[operation], into, [row], scalar)

    def _compute(self, operation: str, into: str | None, rows: list[str], scalar: str = "") -> str:
        """Issues an instruction into an operand or a register, and frees the registers it read."""
        out = into
        if out is None:
            if not self.free:
                self.free.append(f"register{self.made}")
                self.made += 1
            out = self.free.pop() + ("" if self.aligned else "[lanes.at]")
        self._issue(operation, out, rows, scalar)
        self.free += [_tensor(row) for row in rows if row.startswith("register") and row != out]
        return out

    def _issue(self, operation: str, out: str, rows: list[str], scalar: str = "", more=frozenset()) -> None:
        """One instruction; over lanes that begin between multiples of 32 bytes, as many as it takes."""
        operands = ", ".join([out, *rows, *([scalar] if scalar else [])])
        if self.aligned:
            text = f"{operation}({operands}, {self.loop.length});"
        else:
            parameters = {0: "1, 8", 1: "UnaryRepeatParams()", 2: "BinaryRepeatParams()"}[len(rows)]
            lanes = f"for (Lanes lanes({self.start}, {self.loop.length}); lanes.count > 0; lanes.Next()) "
            text = f"{lanes}{operation}({operands}, lanes.mask, 1, {parameters});"
        self.vector(text, {_tensor(row) for row in (*rows, *more)}, {_tensor(out)})


def _array_nodes(node) -> list:
    if isinstance(node, c_ast.ArrayRef):
        return [node]
    return [below for _, child in node.children() for below in _array_nodes(child)]


def _tensor(operand: str) -> str:
    return operand.partition("[")[0]
