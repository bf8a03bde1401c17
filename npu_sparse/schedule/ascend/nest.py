"""Loop nests as vector code sees them: isl's AST of a schedule tree for fixed sizes, with affine subscripts."""

import re
from dataclasses import dataclass, field
from functools import cache

import islpy as isl
from pycparser import c_ast, c_parser

from npu_sparse.schedule.c.print import build_ast
from npu_sparse.schedule.loop_analysis import Dependences
from npu_sparse.schedule.scop import Scop, ScopError, Statement

NODE = isl.schedule_node_type
BINARY = {"+": "Add", "-": "Sub", "*": "Mul", "/": "Div"}
BLOCK = 8  # floats of 32 bytes, what addresses of vector operands are multiples of


@dataclass(frozen=True)
class Affine:
    """A sum of integer multiples of iterators, or of C expressions that are not affine, and a constant."""

    constant: int = 0
    terms: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: "Affine") -> "Affine":
        terms = {name: self.terms.get(name, 0) + other.terms.get(name, 0) for name in {**self.terms, **other.terms}}
        return Affine(self.constant + other.constant, {name: factor for name, factor in terms.items() if factor})

    def __sub__(self, other: "Affine") -> "Affine":
        return self + other.times(-1)

    def times(self, factor: int) -> "Affine":
        return Affine(self.constant * factor, {name: n * factor for name, n in self.terms.items() if n * factor})

    def at(self, iterator: str, value: "Affine") -> "Affine":
        """With a value in the place of an iterator."""
        rest = Affine(self.constant, {name: n for name, n in self.terms.items() if name != iterator})
        return rest + value.times(self.terms.get(iterator, 0))

    def hides(self, iterator: str) -> bool:
        """Whether the iterator stands inside of an expression that is not affine."""
        return any(name != iterator and re.search(rf"\b{iterator}\b", name) for name in self.terms)

    def aligned(self) -> bool:
        return all(n % BLOCK == 0 for n in (self.constant, *self.terms.values()))

    def __str__(self) -> str:
        text = ""
        for name, factor in self.terms.items():
            part = name if abs(factor) == 1 else f"{abs(factor)} * {name}"
            text += (" - " if factor < 0 else " + ") + part if text else ("-" if factor < 0 else "") + part
        if self.constant or not text:
            text += f" {'-' if self.constant < 0 else '+'} {abs(self.constant)}" if text else str(self.constant)
        return text


@dataclass(frozen=True)
class Instance:
    """A statement with the values of its iterators."""

    statement: Statement
    iterators: dict[str, Affine]


@dataclass(frozen=True)
class Branch:
    """What runs under a condition, a C expression."""

    condition: str
    body: list


@dataclass(frozen=True)
class Loop:
    """A loop of the generated code.

    Attributes:
        count: iterations, from `start` on, `step` apart.
        parallel: no iteration of the scheduled loop, with all of its statements, touches what another one writes.
        alone: statements of which that is true where the loop holds nothing else.
    """

    iterator: str
    start: Affine
    count: Affine
    step: int
    parallel: bool
    alone: frozenset[str]
    body: list

    @property
    def length(self) -> str:
        """The count as a C expression that is never negative, which a loop does not care about and an instruction does."""
        return f"Most({self.count}, 0)" if self.count.terms else str(self.count)


Node = Loop | Branch | Instance


@dataclass(frozen=True)
class Phase:
    """A nest that the cores run before any of them begins the next one.

    Attributes:
        body: the nest.
        domain: its statement instances.
        outer: for m = 0, 1, ...: instances to the values of the m outermost loops, as long as those are parallel when every
            core has its own temporaries.
        dependences: of the whole scop.
    """

    body: list
    domain: isl.UnionSet
    outer: tuple[isl.UnionMap, ...]
    dependences: Dependences


def phases(scop: Scop, tree: isl.Schedule, sizes: dict[str, int]) -> list[Phase]:
    """The nests of a schedule tree, one after the other, for fixed sizes of the parameters."""
    missing = [name for name in scop.parameters if name not in sizes]
    if missing:
        raise ScopError(f"sizes must give {', '.join(missing)}")
    values = " and ".join(f"{name} = {sizes[name]}" for name in scop.parameters) or "true"
    fixed = isl.Set(f"[{', '.join(scop.parameters)}] -> {{ : {values} }}")
    check = Dependences(scop)
    tree, hints = _examine(check, tree.intersect_domain(scop.domain().intersect_params(fixed)))
    listed = []
    for node in _nests(tree.get_root()):
        domain = node.get_domain()
        ast = build_ast(fixed, tree.intersect_domain(domain), "t")
        listed.append(Phase(_Reader(scop, sizes, hints).nodes(ast, ()), domain, tuple(_outer(node, hints)), check))
    return listed


@cache
def expression(text: str):
    """The syntax tree of a C expression."""
    return c_parser.CParser().parse(f"int value = {text};").ext[0].init


@cache
def assignment(statement: Statement) -> c_ast.Assignment:
    """The syntax tree of a statement's body."""
    return c_parser.CParser().parse(f"void f() {{ {statement.body} }}").ext[0].body.block_items[0]


def references(node):
    """The arrays that a syntax tree accesses, each with its index expressions."""
    if isinstance(node, c_ast.ArrayRef):
        indices = []
        while isinstance(node, c_ast.ArrayRef):
            indices.insert(0, node.subscript)
            node = node.name
        yield node.name, indices
    else:
        for _, child in node.children():
            yield from references(child)


def operands(node):
    """`(operator, left, right)` of a sum, product ... or maximum; None for anything else."""
    if isinstance(node, c_ast.BinaryOp) and node.op in BINARY:
        return node.op, node.left, node.right
    if isinstance(node, c_ast.FuncCall) and node.name.name == "fmaxf":
        return "max", *node.args.exprs
    return None


def subscript(node, iterators: dict[str, Affine], sizes: dict[str, int]) -> Affine:
    """The value of a C index expression, affine in the loops."""
    if isinstance(node, c_ast.Constant):
        return Affine(int(node.value))
    if isinstance(node, c_ast.ID):
        return iterators[node.name] if node.name in iterators else Affine(sizes[node.name])
    if isinstance(node, c_ast.UnaryOp) and node.op == "-":
        return subscript(node.expr, iterators, sizes).times(-1)
    if isinstance(node, c_ast.BinaryOp) and node.op in "+-*":
        left, right = (subscript(side, iterators, sizes) for side in (node.left, node.right))
        if node.op == "*":
            return right.times(left.constant) if not left.terms else left.times(right.constant)
        return left + right if node.op == "+" else left - right
    raise ScopError(f"subscripts must be sums of iterators, got {type(node).__name__}")


def affine(expr: isl.AstExpr, sizes: dict[str, int]) -> Affine:
    """The value of an expression of isl's AST."""
    kinds, ops = isl.ast_expr_type, isl.ast_expr_op_type
    if expr.get_type() == kinds.int:
        return Affine(expr.get_val().to_python())
    if expr.get_type() == kinds.id:
        name = expr.get_id().get_name()
        return Affine(sizes[name]) if name in sizes else Affine(0, {name: 1})
    arguments = [expr.get_op_arg(n) for n in range(expr.get_op_n_arg())]
    op = expr.get_op_type()
    if op == ops.minus:
        return affine(arguments[0], sizes).times(-1)
    if op in (ops.add, ops.sub):
        left, right = (affine(argument, sizes) for argument in arguments)
        return left + right if op == ops.add else left - right
    if op == ops.mul:
        left, right = (affine(argument, sizes) for argument in arguments)
        if not left.terms or not right.terms:
            return right.times(left.constant) if not left.terms else left.times(right.constant)
    return Affine(0, {_text(expr, sizes): 1})


def _text(expr: isl.AstExpr, sizes: dict[str, int]) -> str:
    names = {**sizes, "min": "Least", "max": "Most", "floord": "FloorDivide"}
    text = re.sub(r"\b[A-Za-z_]\w*\b", lambda match: str(names.get(match[0], match[0])), expr.to_C_str())
    return text if re.fullmatch(r"\w+\(.*\)", text) else f"({text})"


@dataclass(frozen=True)
class _Hint:
    """What is known of a loop of the tree: see Loop; `shared`: parallel once every core has its own temporaries."""

    depth: int
    parallel: bool
    shared: bool
    alone: frozenset[str]


def _examine(check: Dependences, tree: isl.Schedule) -> tuple[isl.Schedule, dict[str, _Hint]]:
    """`tree` with one loop a band under a mark of its own, and what each mark says of its loop."""
    hints = {}

    def visit(node):
        if node.get_type() == NODE.mark:
            return visit(node.delete())
        if node.get_type() == NODE.band:
            if node.band_n_member() > 1:
                node = node.band_split(1)
            obstacle, private = check.loop(node)
            alone = frozenset(s.name for s in check.scop.statements if check.loop(node, statements={s.name}) == ("", ()))
            name = f"loop{len(hints)}"
            hints[name] = _Hint(node.get_schedule_depth(), not obstacle and not private, not obstacle, alone)
            node = visit(node.child(0)).parent()
            return node.insert_mark(isl.Id(name))
        for n in range(node.n_children()):
            node = visit(node.child(n)).parent()
        return node

    return visit(tree.get_root()).get_schedule(), hints


def _nests(node):
    """The subtrees that run one after the other."""
    if node.get_type() in (NODE.sequence, NODE.set, NODE.domain, NODE.filter):
        for n in range(node.n_children()):
            yield from _nests(node.child(n))
    elif not node.get_domain().is_empty():
        yield node


def _outer(node, hints: dict[str, _Hint]):
    while True:
        yield node.get_prefix_schedule_union_map().intersect_domain(node.get_domain())
        if node.get_type() != NODE.mark or not hints[node.mark_get_id().get_name()].shared:
            return
        node = node.child(0).child(0)


class _Reader:
    """isl's AST as Loop, Branch and Instance."""

    def __init__(self, scop: Scop, sizes: dict[str, int], hints: dict[str, _Hint]):
        self.scop, self.sizes, self.hints = scop, sizes, hints

    def nodes(self, node, around: tuple[_Hint, ...]) -> list[Node]:
        kind, types = node.get_type(), isl.ast_node_type
        if kind == types.block:
            children = node.block_get_children()
            return [x for n in range(children.n_ast_node()) for x in self.nodes(children.get_at(n), around)]
        if kind == types.mark:
            return self.nodes(node.mark_get_node(), (*around, self.hints[node.mark_get_id().get_name()]))
        if kind == types.if_:
            condition = _text(node.if_get_cond(), self.sizes)
            branches = [Branch(condition, self.nodes(node.if_get_then_node(), around))]
            if node.if_has_else_node():
                branches.append(Branch(f"(!{condition})", self.nodes(node.if_get_else_node(), around)))
            return branches
        if kind == types.user:
            return [self.instance(node.user_get_expr())]
        return [self.loop(node, around)]

    def instance(self, expr) -> Instance:
        statement = self.scop.statement(expr.get_op_arg(0).get_id().get_name())
        values = [affine(expr.get_op_arg(n), self.sizes) for n in range(1, expr.get_op_n_arg())]
        return Instance(statement, dict(zip(statement.iterators, values)))

    def loop(self, node, around: tuple[_Hint, ...]) -> Loop:
        iterator = node.for_get_iterator().get_id().get_name()
        depth = int(iterator[1:])
        hint = next(hint for hint in reversed(around) if hint.depth == depth)
        start, step = affine(node.for_get_init(), self.sizes), node.for_get_inc().get_val().to_python()
        if node.for_is_degenerate():
            count = Affine(1)
        else:
            condition = node.for_get_cond()
            last = affine(condition.get_op_arg(1), self.sizes)
            count = last - start + Affine(condition.get_op_type() == isl.ast_expr_op_type.le)
            if step > 1:
                count = Affine(0, {f"(({count}) + {step - 1}) / {step}": 1})
        return Loop(iterator, start, count, step, hint.parallel, hint.alone, self.nodes(node.for_get_body(), around))
