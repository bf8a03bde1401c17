"""One scheduling dimension as numbers: an affine form per statement, and what it does to a dependence."""

from dataclasses import dataclass, replace

import islpy as isl

from npu_sparse.schedule.solve.farkas import Dependence


@dataclass(frozen=True)
class Form:
    """phi of one statement: coefficients of iterators and parameters, and a constant."""

    it: tuple[int, ...]
    par: tuple[int, ...]
    cst: int


@dataclass(frozen=True)
class Row:
    """One dimension: a form per statement; whether it is zero on every dependence active where its band starts, and whether
    it is so on all that are not about the storage of temporaries."""

    forms: dict[str, Form]
    parallel: bool = False
    private: bool = False

    def __getitem__(self, name: str) -> Form:
        return self.forms[name]


def difference(dependence: Dependence, row: Row, lifted: int = 0) -> tuple[int, ...]:
    """Coefficients of phi_sink - phi_source, in the columns of the dependence's cone."""
    source, sink = row[dependence.source], row[dependence.sink]
    if dependence.own:
        return (0, *[0] * (len(source.par) + lifted), *source.it)
    parameters = [b - a for a, b in zip(source.par, sink.par)]
    return (sink.cst - source.cst, *parameters, *[0] * lifted, *[-a for a in source.it], *sink.it)


def is_zero(dependence: Dependence, row: Row) -> bool:
    vector = difference(dependence, row, len(dependence.lifted))
    return not any(vector) or (dependence.cone.contains(vector) and dependence.cone.contains(tuple(-x for x in vector)))


def remainder(dependence: Dependence, row: Row) -> Dependence | None:
    """What the row does not carry of a dependence that it respects, or, for a relaxed one, that it does not separate."""
    vector = difference(dependence, row, len(dependence.lifted))
    if is_zero(dependence, row):
        return dependence
    if dependence.cone.contains((vector[0] - 1, *vector[1:])):
        return None
    relation = dependence.relation.add_constraint(_constraint(dependence, row, 0, equality=True))
    return None if relation.is_empty() else replace(dependence, relation=relation, _cone=None)


def _constraint(dependence: Dependence, row: Row, constant: int, equality: bool = False, sign: int = 1) -> isl.Constraint:
    """sign * (phi_sink - phi_source) + constant = 0 or >= 0, over the pairs of the dependence."""
    space = isl.LocalSpace.from_space(dependence.relation.get_space())
    result = (isl.Constraint.equality_alloc if equality else isl.Constraint.inequality_alloc)(space)
    source, sink = row[dependence.source], row[dependence.sink]
    result = result.set_constant_val(isl.Val(sign * (sink.cst - source.cst) + constant))
    for kind, values in (
        (isl.dim_type.param, [b - a for a, b in zip(source.par, sink.par)]),
        (isl.dim_type.in_, [-a for a in source.it]),
        (isl.dim_type.out, sink.it),
    ):
        for place, value in enumerate(values):
            if value:
                result = result.set_coefficient_val(kind, place, isl.Val(sign * value))
    return result


def text(form: Form, iterators: tuple[str, ...], parameters: tuple[str, ...]) -> str:
    """The form in isl's notation: "2t + i + 1"."""
    result = ""
    for factor, name in [*zip(form.it, iterators), *zip(form.par, parameters), (form.cst, "")]:
        if factor:
            size = str(abs(factor)) if abs(factor) != 1 or not name else ""
            result += (" - " if factor < 0 else " + ") + size + name
    if not result:
        return "0"
    return result[3:] if result.startswith(" + ") else "-" + result[3:]
