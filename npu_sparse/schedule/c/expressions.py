"""C text of isl's AST expressions, and what its loops say of themselves."""

import re
from dataclasses import dataclass, field

import islpy as isl


@dataclass
class Names:
    """Names that the surrounding program does not use."""

    iterator: str
    minimum: str
    maximum: str
    floor: str
    function: str
    part: str  # of a sum, product, maximum or minimum
    elements: dict[str, str] = field(default_factory=dict)
    updates: dict[str, str] = field(default_factory=dict)
    macros: dict[str, str] = field(default_factory=dict)


class Expressions:
    """Texts of expressions; `substituted` are iterators that another text stands for."""

    def __init__(self, names: Names):
        self.names = names
        self.substituted: dict[str, str] = {}

    def text(self, expr, outer: int = 0) -> str:
        """C of an expression; `outer` is the precedence around it."""
        if expr.get_type() == isl.ast_expr_type.id:
            name = expr.get_id().get_name()
            text = self.substituted.get(name, name)
            return f"({text})" if outer and not re.fullmatch(r"\w+", text) else text
        if expr.get_type() == isl.ast_expr_type.int:
            value = expr.get_val().to_str()
            return f"({value})" if value.startswith("-") and outer else value
        op, ops = expr.get_op_type(), isl.ast_expr_op_type
        args = [expr.get_op_arg(n) for n in range(expr.get_op_n_arg())]
        if op in (ops.min, ops.max, ops.fdiv_q):
            name = {ops.min: self.names.minimum, ops.max: self.names.maximum, ops.fdiv_q: self.names.floor}[op]
            text = self.text(args[0])
            for a in args[1:]:
                text = f"{name}({text}, {self.text(a)})"
            return text
        if op in (ops.cond, ops.select):
            return "(" + f"{self.text(args[0], 9)} ? {self.text(args[1], 9)} : {self.text(args[2], 9)}" + ")"
        if op == ops.minus:
            return f"(-{self.text(args[0], 9)})"
        symbol, level = {
            ops.or_: ("||", 1), ops.or_else: ("||", 1), ops.and_: ("&&", 2), ops.and_then: ("&&", 2),
            ops.eq: ("==", 3), ops.le: ("<=", 4), ops.lt: ("<", 4), ops.ge: (">=", 4), ops.gt: (">", 4),
            ops.add: ("+", 5), ops.sub: ("-", 5), ops.mul: ("*", 6), ops.div: ("/", 6),
            ops.pdiv_q: ("/", 6), ops.pdiv_r: ("%", 6), ops.zdiv_r: ("%", 6),
        }[op]  # fmt: skip
        text = f"{self.text(args[0], level)} {symbol} {self.text(args[1], level + 1)}"
        return f"({text})" if level < outer or (outer and level <= 2) else text


def constant_extent(node) -> int:
    """Iterations of an AST loop of step 1 where its bounds tell, otherwise 0."""
    condition, step = node.for_get_cond(), node.for_get_inc().get_val()
    (base, first), (end, last) = split_constant(node.for_get_init()), split_constant(condition.get_op_arg(1))
    strict = condition.get_op_type() == isl.ast_expr_op_type.lt
    return last - first + (0 if strict else 1) if step.is_one() and base.is_equal(end) else 0


def split_constant(expr):
    """`(base, n)` with expr = base + n."""
    ops, integer = isl.ast_expr_op_type, isl.ast_expr_type.int
    if expr.get_type() == integer:
        return isl.AstExpr.from_val(isl.Val(0)), expr.get_val().to_python()
    if expr.get_type() == isl.ast_expr_type.op and expr.get_op_type() in (ops.add, ops.sub):
        first, second = expr.get_op_arg(0), expr.get_op_arg(1)
        if second.get_type() == integer:
            n = second.get_val().to_python()
            return first, n if expr.get_op_type() == ops.add else -n
    return expr, 0


def _deepest(node):
    """The child of an AST node that leads to the deepest loop, or None."""
    types = isl.ast_node_type
    kind = node.get_type()
    if kind == types.for_:
        return node.for_get_body()
    if kind == types.mark:
        return node.mark_get_node()
    if kind == types.if_:
        return node.if_get_then_node()
    if kind == types.block:
        children = node.block_get_children()
        return max((children.get_at(n) for n in range(children.n_ast_node())), key=loops_below)
    return None


def loops_below(node) -> int:
    deepest = _deepest(node)
    return (node.get_type() == isl.ast_node_type.for_) + (loops_below(deepest) if deepest is not None else 0)


def users(node) -> list[str]:
    """Names of the statements below a node, as often as they are there."""
    types, kind = isl.ast_node_type, node.get_type()
    if kind == types.user:
        return [node.user_get_expr().get_op_arg(0).get_id().get_name()]
    if kind == types.for_:
        return users(node.for_get_body())
    if kind == types.mark:
        return users(node.mark_get_node())
    if kind == types.if_:
        return users(node.if_get_then_node()) + (users(node.if_get_else_node()) if node.if_has_else_node() else [])
    children = node.block_get_children()
    return [name for n in range(children.n_ast_node()) for name in users(children.get_at(n))]
