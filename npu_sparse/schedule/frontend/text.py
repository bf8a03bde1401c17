"""C text of statements: names of the SCoP in place of the program's, constants and iterators with the types that C gives them."""

from collections.abc import Iterator

from pycparser import c_ast

from npu_sparse.schedule.frontend import types
from npu_sparse.schedule.frontend.calls import MATH
from npu_sparse.schedule.frontend.expressions import Scope, Symbol
from npu_sparse.schedule.frontend.syntax import Printer, nodes

EXACT = ("+", "-", "*")  # of 64 bits, these give a subscript whatever the types of the original were


def statement_text(scope: Scope, node: c_ast.Node, typed: bool = True) -> str:
    """A statement whose iterators may be replaced by any expression of type long.

    Iterators are in parentheses, and where it is `typed` converted to their own type wherever the type could change a result.
    """
    converted = {id(part) for part in _typed_uses(scope, node, True)} if typed else set()
    return Printer(lambda part: _name(scope.symbols.get(part.name), part, converted)).visit(node)


def extent_text(array: Symbol, node: c_ast.Node) -> str:
    """An extent of an array, by the names of the SCoP."""
    return Printer(lambda part: _name(array.names.get(part.name), part, set())).visit(node)


def _name(symbol: Symbol | None, node: c_ast.ID, converted: set[int]) -> str:
    if symbol is None:
        return node.name
    if symbol.iterator:
        return f"(({symbol.kind.text}) ({symbol.key}))" if id(node) in converted else f"({symbol.key})"
    if symbol.value is not None and not symbol.shape:
        return types.spelled(symbol.value, symbol.kind)
    return symbol.text or symbol.key


def _typed_uses(scope: Scope, node: c_ast.Node, any_type: bool) -> Iterator[c_ast.ID]:
    """Uses of iterators that are not of type long, where a long of the same value could give another result."""
    if isinstance(node, c_ast.ID):
        symbol = scope.symbols.get(node.name)
        if symbol and symbol.iterator and not any_type and (symbol.kind.bits, symbol.kind.signed) != (64, True):
            yield node
    elif isinstance(node, c_ast.ArrayRef):
        yield from _typed_uses(scope, node.name, any_type)
        if not _exact(scope, node.subscript):
            yield from _typed_uses(scope, node.subscript, True)
    elif isinstance(node, c_ast.Cast):
        yield from _typed_uses(scope, node.expr, isinstance(node.expr, c_ast.ID))
    elif isinstance(node, c_ast.Assignment):
        yield from _typed_uses(scope, node.lvalue, any_type)
        yield from _typed_uses(scope, node.rvalue, node.op == "=" or node.op in ("+=", "-=", "*=", "/=") and
                               _floats(scope, node.lvalue))
    elif isinstance(node, c_ast.BinaryOp):
        arithmetic = node.op in ("+", "-", "*", "/", "<", "<=", ">", ">=", "==", "!=")
        for part, other in ((node.left, node.right), (node.right, node.left)):
            yield from _typed_uses(scope, part, node.op in ("&&", "||") or arithmetic and _floats(scope, other))
    elif isinstance(node, c_ast.FuncCall):
        known = isinstance(node.name, c_ast.ID) and node.name.name in MATH
        for argument in node.args.exprs if node.args else ():
            yield from _typed_uses(scope, argument, known)
    else:
        free = isinstance(node, c_ast.UnaryOp) and node.op == "!" or isinstance(node, (c_ast.Compound, c_ast.If))
        for _, child in node.children():
            yield from _typed_uses(scope, child, free)


def _exact(scope: Scope, subscript: c_ast.Node) -> bool:
    """Whether computing a subscript in long gives what C computes in its own types."""
    operators = [part.op for part in nodes(subscript, (c_ast.BinaryOp, c_ast.UnaryOp))]
    others = list(nodes(subscript, (c_ast.Cast, c_ast.TernaryOp, c_ast.FuncCall)))
    if not others and all(op in EXACT for op in operators):
        return True
    constants = [types.literal(part.value) for part in nodes(subscript, c_ast.Constant)]
    symbols = [scope.symbols.get(part.name) for part in nodes(subscript, c_ast.ID)]
    signed = all(c and c[1].signed for c in constants) and all(s is None or s.kind and s.kind.signed for s in symbols)
    kinds = [types.integer(part.to_type, scope.typedefs) for part in others if isinstance(part, c_ast.Cast)]
    return signed and all(kind and kind.signed and kind.bits == 64 for kind in kinds)


def _floats(scope: Scope, node: c_ast.Node) -> bool:
    """Whether an expression is surely of a floating type."""
    if isinstance(node, c_ast.Constant):
        return node.type in ("float", "double", "long double")
    if isinstance(node, (c_ast.ID, c_ast.ArrayRef)):
        while isinstance(node, c_ast.ArrayRef):
            node = node.name
        symbol = scope.symbols.get(node.name) if isinstance(node, c_ast.ID) else None
        return bool(symbol and symbol.floats)
    if isinstance(node, c_ast.Cast):
        return isinstance(node.to_type.type, c_ast.TypeDecl) and types.floating(node.to_type, scope.typedefs)
    if isinstance(node, c_ast.BinaryOp):
        return node.op in ("+", "-", "*", "/") and (_floats(scope, node.left) or _floats(scope, node.right))
    if isinstance(node, c_ast.UnaryOp):
        return node.op in ("-", "+") and _floats(scope, node.expr)
    if isinstance(node, c_ast.TernaryOp):
        return _floats(scope, node.iftrue) or _floats(scope, node.iffalse)
    return isinstance(node, c_ast.FuncCall) and isinstance(node.name, c_ast.ID) and node.name.name in MATH
