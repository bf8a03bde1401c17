"""Subscripts such as `a[i * n + j]`: which rows and columns they mean, where the columns are known to lie within a row."""

from typing import TYPE_CHECKING

from pycparser import c_ast

from npu_sparse.schedule.frontend.forms import Linear, NotAffine, add, isl_text
from npu_sparse.schedule.frontend.syntax import show
from npu_sparse.schedule.frontend.types import Integer, common

if TYPE_CHECKING:
    from npu_sparse.schedule.frontend.expressions import Scope, Symbol

Polynomial = dict[tuple[str, ...], Linear]  # affine forms by the parameters that multiply them, sorted
Layout = tuple[tuple[str, ...], ...]  # products of parameters, from 1 upward: the strides of the dimensions, innermost first


def element(scope: "Scope", node: c_ast.ArrayRef, symbol: "Symbol") -> list[Linear]:
    """The indices of an element of an array that C declares with one dimension, in as many as its subscripts show."""
    try:
        layout = scope.layouts.get(symbol.key)
        if layout is None:
            return [scope.linear(node.subscript)]
    except NotAffine:
        layout = None
    try:
        polynomial, _ = _polynomial(scope, node.subscript)
        layout = layout or _layout(polynomial)
    except NotAffine:
        layout = None
    if layout is None:
        return [scope.affine(node.subscript, "subscript", scope.linear)]
    scope.layouts[symbol.key] = layout
    indices = [dict(polynomial.pop(stride, {})) for stride in layout]
    for at, extent in enumerate(_extents(layout)):
        carried = indices[at].get(extent, 0)
        for factor in dict.fromkeys((0, carried, carried - 1)):  # i * n + j - n is row i - 1, i * n + n - 1 is row i
            part = add(indices[at], {extent: factor}, -1)
            if not scope.possible(scope.close(f"{isl_text(part)} < 0 or {isl_text(part)} >= {extent}", part)):
                indices[at], indices[at + 1] = part, add(indices[at + 1], {"": factor}, 1)
                break
        else:
            scope.refuse(node, f"part {isl_text(indices[at])} of the subscript must be known to lie between 0 and {extent} - 1, "
                               f"got {show(node)}")
    if polynomial:
        scope.refuse(node, f"{symbol.name} must have the same strides in all of its subscripts, got {show(node)}")
    return indices[::-1]


def _extents(layout: Layout) -> list[str]:
    """The parameter by which each stride is longer than the one before."""
    extents = []
    for shorter, longer in zip(layout, layout[1:]):
        rest = list(longer)
        for name in shorter:
            rest.remove(name)
        extents.append(rest[0])
    return extents


def _layout(polynomial: Polynomial) -> Layout | None:
    """Strides of which each is a parameter times the one before, or None where the products are no such chain."""
    strides = sorted({(), *polynomial}, key=len)
    chain = [len(longer) == len(shorter) + 1 and all(shorter.count(name) <= longer.count(name) for name in shorter)
             for shorter, longer in zip(strides, strides[1:])]
    return tuple(strides) if chain and all(chain) else None


def _polynomial(scope: "Scope", node: c_ast.Node) -> tuple[Polynomial, Integer]:
    """A sum of products of parameters and affine forms, and its type; raises NotAffine."""
    try:
        form, kind = scope.typed(node)
        form = scope.settled(form, kind, node)
    except NotAffine:
        if isinstance(node, c_ast.Cast) and (kind := scope.cast_type(node)) and kind.signed and kind.bits == 64:
            return _polynomial(scope, node.expr)[0], kind
        if not isinstance(node, c_ast.BinaryOp) or node.op not in "+-*":
            raise
    else:
        return ({(): form} if form else {}), kind
    (left, a), (right, b) = _polynomial(scope, node.left), _polynomial(scope, node.right)
    kind = common(a, b)
    if not kind.signed and (kind.bits == 32 or a.signed or b.signed):  # such a product may wrap around
        raise NotAffine(show(node))
    if node.op != "*":
        total = dict(left)
        for names, form in right.items():
            total[names] = add(total.get(names, {}), form, 1 if node.op == "+" else -1)
        return {names: form for names, form in total.items() if form}, kind
    for factor, other in ((right, left), (left, right)):
        if list(factor) == [()] and len(factor[()]) == 1 and (name := next(iter(factor[()]))) in scope.used:
            return {tuple(sorted((*names, name))): add({}, form, factor[()][name]) for names, form in other.items()}, kind
    raise NotAffine(show(node))
