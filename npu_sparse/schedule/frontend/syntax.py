"""What the front end asks of pycparser's trees: their text, the names in them, what they assign."""

import re
from collections.abc import Callable, Iterator
from itertools import zip_longest

from pycparser import c_ast, c_generator


class Printer(c_generator.CGenerator):
    """C text; names may be replaced."""

    def __init__(self, names: Callable[[c_ast.ID], str] = lambda node: node.name):
        super().__init__()
        self.names = names

    def visit_ID(self, node):
        return self.names(node)

    def visit_FuncCall(self, node):  # the function's own name stays
        arguments = ", ".join(self.visit(argument) for argument in node.args.exprs) if node.args else ""
        return f"{node.name.name if isinstance(node.name, c_ast.ID) else self.visit(node.name)}({arguments})"

    def visit_ArrayRef(self, node):
        base, indices = node, []
        while isinstance(base, c_ast.ArrayRef):
            indices.insert(0, f"[{self.visit(base.subscript)}]")
            base = base.name
        if not isinstance(base, c_ast.ID) or "[]" not in base.name:
            return super().visit_ArrayRef(node)
        parts = base.name.split("[]")  # a field of an element: its subscripts are inside of its path
        return "".join(part + index for part, index in zip_longest(parts, indices, fillvalue=""))


def show(node: c_ast.Node) -> str:
    """The first line of a node's C text."""
    return Printer().visit(node).strip().split("\n")[0]


def nodes(node: c_ast.Node, kind: type | tuple = c_ast.Node) -> Iterator[c_ast.Node]:
    if isinstance(node, kind):
        yield node
    for _, child in node.children():
        yield from nodes(child, kind)


def step_assignment(node: c_ast.UnaryOp) -> c_ast.Assignment:
    """x++ as x += 1."""
    return c_ast.Assignment(f"{node.op[-1]}=", node.expr, c_ast.Constant("int", "1", node.coord), node.coord)


def loop_steps(node: c_ast.Node) -> Iterator[c_ast.Node]:
    for loop in nodes(node, c_ast.For):
        yield from (part for part in (loop.init, loop.next) if part is not None)


def assigned(node: c_ast.Node) -> Iterator[tuple[str, c_ast.Node]]:
    """Names that are assigned, incremented or have their address taken, with the node that does so."""
    for item in nodes(node, (c_ast.Assignment, c_ast.UnaryOp)):
        target = item.lvalue if isinstance(item, c_ast.Assignment) else \
            item.expr if item.op in ("p++", "++", "p--", "--", "&") else None
        if isinstance(target, c_ast.ID):
            yield target.name, item


def rewritten(node: c_ast.Node, rule: Callable[[c_ast.Node], c_ast.Node]) -> c_ast.Node:
    """The expression or statement with the rule applied to all of its nodes, the inner ones first."""
    for name, child in node.children():
        new = rewritten(child, rule)
        if new is not child:
            field, _, index = name.partition("[")
            if index:
                getattr(node, field)[int(index[:-1])] = new
            else:
                setattr(node, field, new)
    return rule(node)


def subscripted(node: c_ast.Node) -> c_ast.Node:
    """*(a + i) written as a[i], and *(a - i) as a[-i], which C defines to be the same; other nodes as they are."""
    if isinstance(node, c_ast.UnaryOp) and node.op == "*":
        base, moves = node.expr, []
        while isinstance(base, c_ast.BinaryOp) and base.op in ("+", "-"):
            base, moves = base.left, [(base.op, base.right), *moves]
        if isinstance(base, (c_ast.ID, c_ast.ArrayRef)):
            index = c_ast.Constant("int", "0", node.coord)
            for at, (op, other) in enumerate(moves):  # a pointer moves by each in turn, and not by a sum in their own types
                first = at == 0 and op == "+"
                index = other if first else c_ast.BinaryOp(op, _long(index), _long(other), node.coord)
            return c_ast.ArrayRef(base, index, node.coord)
    return node


def _long(node: c_ast.Node) -> c_ast.Node:
    kind = c_ast.TypeDecl(None, [], None, c_ast.IdentifierType(["long"]))
    return c_ast.Cast(c_ast.Typename(None, [], None, kind), node, node.coord)


def declarations(body: c_ast.Node) -> dict[int, int]:
    """The id of the declaration that each name (by the id of its node) refers to, where that is one in the function's body."""
    declared: dict[int, int] = {}

    def visit(node, known):
        if isinstance(node, (c_ast.Compound, c_ast.For)):
            known = dict(known)
        name = re.match(r"\w*", node.name)[0] if isinstance(node, c_ast.ID) else ""  # of a path, the variable
        if name in known:
            declared[id(node)] = known[name]
        for _, child in node.children():
            visit(child, known)
        if isinstance(node, c_ast.Decl):
            known[node.name] = id(node)

    visit(body, {})
    return declared


def first_use(node: c_ast.Node, name: str) -> str | None:
    """"read" where code may read a variable before it surely writes it, "write" where it surely writes it first, else None."""
    if isinstance(node, c_ast.Assignment) and node.op == "=" and isinstance(node.lvalue, c_ast.ID) and node.lvalue.name == name:
        return first_use(node.rvalue, name) or "write"
    if isinstance(node, c_ast.ID):
        return "read" if node.name == name else None
    if isinstance(node, c_ast.DeclList) and any(item.name == name for item in node.decls):
        return "write"
    sure, perhaps = list(node.children()), []  # what runs in any case, then what may run
    if isinstance(node, c_ast.If):
        use, branches = first_use(node.cond, name), [node.iftrue, node.iffalse]
        uses = {first_use(branch, name) if branch is not None else None for branch in branches}
        return use or ("read" if "read" in uses else "write" if uses == {"write"} else None)
    if isinstance(node, c_ast.For):
        sure, perhaps = [("", part) for part in (node.init, node.cond) if part is not None], [node.stmt, node.next]
    elif isinstance(node, c_ast.While):
        sure, perhaps = [("", node.cond)], [node.stmt]
    elif isinstance(node, c_ast.Switch):
        sure, perhaps = [("", node.cond)], [node.stmt]
    elif isinstance(node, c_ast.TernaryOp):
        sure, perhaps = [("", node.cond)], [node.iftrue, node.iffalse]
    elif isinstance(node, c_ast.BinaryOp) and node.op in ("&&", "||"):
        sure, perhaps = [("", node.left)], [node.right]
    for _, child in sure:
        if use := first_use(child, name):
            return use
    return "read" if any(first_use(child, name) == "read" for child in perhaps if child is not None) else None


def reduction_of(node: c_ast.Assignment) -> str | None:
    """The operator of x op= e, x = x op e or x = fmax(x, e), where x is written as on the left and only once."""
    x = show(node.lvalue)
    uses = [show(part) for part in nodes(node.rvalue, (c_ast.ID, c_ast.ArrayRef))]
    if node.op != "=":
        return {"+=": "+", "-=": "+", "*=": "*", "/=": "*"}.get(node.op) if x not in uses else None
    value = node.rvalue
    if uses.count(x) != 1:
        return None
    if isinstance(value, c_ast.FuncCall) and value.args and len(value.args.exprs) == 2:
        operator = {"fmax": "max", "fmaxf": "max", "max": "max", "fmin": "min", "fminf": "min", "min": "min"}
        return operator.get(show(value.name)) if x in map(show, value.args.exprs) else None
    for operator, others in (("+", "+-"), ("*", "*/")):
        part = value
        while isinstance(part, c_ast.BinaryOp) and part.op in others:
            if show(part.left) == x or part.op == operator and show(part.right) == x:
                return operator
            part = part.left
    return None
