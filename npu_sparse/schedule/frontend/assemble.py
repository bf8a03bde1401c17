"""isl's objects from what a walk recorded: parameters, domains, accesses, and which arrays matter afterwards."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import islpy as isl
from pycparser import c_ast

from npu_sparse.schedule.frontend.expressions import Scope, Touch
from npu_sparse.schedule.frontend.forms import NotAffine
from npu_sparse.schedule.frontend.syntax import show
from npu_sparse.schedule.frontend.text import extent_text
from npu_sparse.schedule.frontend.types import LONGEST
from npu_sparse.schedule.scop import Access, Array, Scop, ScopError, Statement


@dataclass(frozen=True)
class Record:
    """A statement before the parameters are known; conditions are isl text."""

    node: c_ast.Node
    line: int
    iterators: tuple[str, ...]
    conditions: tuple[str, ...]
    reads: tuple[Touch, ...]
    writes: tuple[Touch, ...]
    body: str
    position: tuple[int | str, ...]
    reduction: str | None


def assemble(scope: Scope, records: list[Record], region: tuple[int, int], function: c_ast.FuncDef, start: int,
             live_out: Callable[[str, bool], bool], clause: list[str] | None, tail: tuple[str, ...]) -> Scop:
    """The SCoP; `live_out(key, written)` says whether an array's final contents matter."""
    known = _extents(scope)  # may use further parameters
    parameters = tuple(name for name in scope.known if name in scope.used)
    touched = [name for name in scope.known if name in scope.touched and name not in scope.used]
    prefix = f"[{', '.join(parameters)}] -> "
    context = isl.Set(prefix + "{ : " + " and ".join(known or ["true"]) + " }")
    wraps = any("4294967" in definition for definition in scope.terms.values())
    statements = []
    for record in records:
        name = f"S{len(statements)}"
        tuple_text = f"{name}[{', '.join(record.iterators)}]"
        conditions = " and ".join(f"({text})" for text in record.conditions) or "true"
        domain = isl.Set(f"{prefix}{{ {tuple_text} : {conditions} }}").coalesce()
        if domain.intersect_params(context).is_empty():  # never executed
            continue
        reads, writes = ([_access(scope, prefix, tuple_text, touch, domain) for touch in touches if touch.array not in parameters]
                         for touches in (record.reads, record.writes))
        if wraps:
            domain, reads, writes = _unwrapped(scope, record.node, parameters, context, domain, reads, writes)
        reduction = record.reduction
        if reduction and any(not read.relation.intersect(writes[0].relation).is_empty()
                             for read in reads[1:] if read.array == writes[0].array):
            reduction = None
        statements.append(Statement(name, len(statements), domain, record.iterators, tuple(reads), tuple(writes),
                                    record.body, record.position, reduction, record.line))
    if not statements:
        raise ScopError(f"{scope.source}:{region[0]}: scop must execute a statement, got conditions that never hold")
    written = {touch.array for record in records for touch in record.writes}

    def array(key):
        symbol = scope.known[key]
        shape = tuple("" if extent is None else extent_text(symbol, extent) for extent in symbol.shape)
        return Array(key, shape, symbol.ctype, live_out(key, key in written), symbol.local)

    arrays = {name: array(name) for name in touched}
    names = {scope.known[name].name for name in touched}
    if unknown := [name for name in clause or () if name not in names]:
        raise ScopError(f"{scope.source}:{region[0]}: live_out must name arrays of the scop, got {unknown[0]}")
    arguments = [key for key, symbol in scope.known.items() if symbol.argument]
    others = {key: scope.known[key].name for key in (*parameters, *arrays, *arguments) if not scope.known[key].local}
    name = function.decl.name
    return Scop(name, parameters, context, arrays, tuple(statements), scope.source, name, tuple(array(key) for key in arguments),
                region if scope.source != "<python>" else (0, 0), start,
                {key: scope.known[key].kind.text for key in parameters},
                {key: name for key, name in others.items() if key != name and name.isidentifier()}, tail,
                {key: name for key, name in others.items() if not name.isidentifier()})


def _extents(scope: Scope) -> list[str]:
    """What extents say of parameters: an array of variable extent has at least one element."""
    known = []
    for symbol in [scope.known[name] for name in scope.known if name in scope.touched]:
        for extent in symbol.shape:
            try:
                form = scope.linear(extent) if extent is not None else {}
            except (NotAffine, ScopError):  # such as n * n
                continue
            if set(form) - {""}:
                known.append(scope.compare(form, ">=", {"": 1}))
    return list(dict.fromkeys(known + ([scope.context] if scope.context else [])))


def _unwrapped(scope: Scope, node: c_ast.Node, parameters: tuple[str, ...], context: isl.Set, domain: isl.Set,
               reads: list[Access], writes: list[Access]) -> tuple[isl.Set, list[Access], list[Access]]:
    """A statement without the cases in which parameters would lie outside of their types.

    What is left of values around 2**32 comes from unsigned arithmetic that may wrap around: solvers and code stay below.
    """
    kinds = {key: scope.known[key].kind for key in parameters}
    facts = [f"{max(kind.low, -LONGEST)} <= {key} <= {min(kind.high, LONGEST)}" for key, kind in kinds.items()]
    possible = isl.Set(f"[{', '.join(parameters)}] -> {{ : {' and '.join(facts or ['true'])} }}").intersect(context)

    def simplified(points):
        points = points.intersect_params(possible).coalesce().gist_params(possible)
        if any(int(number) >= 2**31 for number in re.findall(r"\d+", str(points))):
            scope.refuse(node, f"unsigned value must be known not to wrap around, got one that may in {show(node)}")
        return points

    return simplified(domain), *([replace(a, relation=simplified(a.relation)) for a in accesses] for accesses in (reads, writes))


def _access(scope: Scope, prefix: str, statement: str, touch: Touch, domain: isl.Set) -> Access:
    guards = [*touch.guards, *([touch.footprint] if touch.footprint else [])]
    depth, name = domain.dim(isl.dim_type.set), domain.get_tuple_name()
    if touch.inner:
        statement = f"{name}[{', '.join([*domain.get_var_names(isl.dim_type.set), *touch.inner])}]"
    text = f"{prefix}{{ {statement} -> {touch.array}[{', '.join(touch.subscripts)}]"
    try:
        relation = isl.Map(text + (" : " + " and ".join(f"({g})" for g in guards) if guards else "") + " }")
    except isl.Error as error:  # only declared footprints come unchecked to here
        got = f"{touch.array}[{', '.join(touch.subscripts)}] : {touch.footprint}"
        raise ScopError(f"{scope.source}: footprint must be affine in iterators and parameters, got {got}") from error
    if touch.inner:
        relation = relation.project_out(isl.dim_type.in_, depth, len(touch.inner)).set_tuple_name(isl.dim_type.in_, name)
    return Access(touch.array, relation.intersect_domain(domain), touch.may)
