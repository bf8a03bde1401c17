"""Affine forms that are non-negative on a dependence (Farkas' lemma), as exact integer constraints on their coefficients."""

from dataclasses import dataclass, field

import islpy as isl

_DIMS = (isl.dim_type.set, isl.dim_type.div, isl.dim_type.param, isl.dim_type.cst)


@dataclass(frozen=True)
class Cone:
    """All coefficient vectors c with c0 + c_N . N + c_x . x >= 0 on a dependence: equalities . c = 0, inequalities . c >= 0.

    Columns are the constant, the parameters, then the variables x: source iterators and sink iterators, or, for a dependence
    of a statement on itself, only their differences sink - source.
    """

    equalities: tuple[tuple[int, ...], ...]
    inequalities: tuple[tuple[int, ...], ...]

    def contains(self, vector: tuple[int, ...]) -> bool:
        """Whether the form with these coefficients is non-negative at every rational point of the dependence."""
        return not any(_dot(row, vector) for row in self.equalities) and all(_dot(row, vector) >= 0 for row in self.inequalities)


@dataclass
class Dependence:
    """A dependence as the scheduler uses it: the part of `relation` that no outer dimension has carried yet.

    Attributes:
        source, sink: statement names.
        relation: from source to sink instances, parameters in the scop's order.
        label: for messages, such as "RAW on A from S0 (line 3) to S1 (line 5)".
        array, flow: what it is about, and whether a value flows along it (RAW).
        relaxed: between updates of one reduction that may run in any order, though not in parallel.
        lifted: extents that act as parameters, see `constant_to_parameter`: ascending values.
    """

    source: str
    sink: str
    relation: isl.BasicMap
    label: str
    lifted: tuple[int, ...] = ()
    array: str = ""
    flow: bool = True
    relaxed: bool = False
    _cone: Cone | None = field(default=None, repr=False)

    @property
    def own(self) -> bool:
        return self.source == self.sink

    @property
    def cone(self) -> Cone:
        if self._cone is None:
            points = self.relation.deltas() if self.own else self.relation.wrap().flatten()
            self._cone = cone(points, self.lifted)
        return self._cone


def cone(points: isl.BasicSet, lifted: tuple[int, ...] = ()) -> Cone:
    """The cone of a basic set. Existential variables must get coefficient zero, so they become set dimensions first."""
    points = points.remove_redundancies()
    keep = points.dim(isl.dim_type.set)
    if points.dim(isl.dim_type.div):
        points = points.lift().flatten()
    if lifted:
        points = lift_constants(points, lifted)
    dual = points.coefficients()
    width = 1 + points.dim(isl.dim_type.param) + keep
    equalities = _rows(dual.equalities_matrix(*_DIMS), width)
    inequalities = _rows(dual.inequalities_matrix(*_DIMS), width)
    return Cone(equalities, inequalities)


def _rows(matrix: isl.Mat, width: int) -> tuple[tuple[int, ...], ...]:
    rows = set()
    for i in range(matrix.rows()):
        row = tuple(matrix.get_element_val(i, j).to_python() for j in range(width))
        if any(row):
            rows.add(row)
    return tuple(sorted(rows))


def lift_constants(points: isl.BasicSet, extents: tuple[int, ...]) -> isl.BasicSet:
    """The basic set with large constants written over new parameters, K >= value for each extent: 239 becomes K240 - 1.

    The set with K = value is a slice of the result, so whatever holds on the result holds on the set. A solver cannot use the
    parameter's value as a skewing factor, which it does with the constant.
    """
    new = len(extents)
    space = points.get_space()
    first = space.dim(isl.dim_type.param)
    wide = space.add_dims(isl.dim_type.param, new)
    for place, extent in enumerate(extents):
        wide = wide.set_dim_name(isl.dim_type.param, first + place, f"extent{extent}")
    order = (isl.dim_type.cst, isl.dim_type.param, isl.dim_type.set, isl.dim_type.div)
    matrices = []
    for matrix, equality in ((points.equalities_matrix(*order), True), (points.inequalities_matrix(*order), False)):
        rows = []
        for i in range(matrix.rows()):
            row = [matrix.get_element_val(i, j).to_python() for j in range(matrix.cols())]
            factors, rest = _split(row[0], extents)
            rows.append([rest, *row[1 : 1 + first], *factors, *row[1 + first :]])
        if not equality:
            rows += [
                [-extent, *[0] * first, *[int(k == place) for k in range(new)], *[0] * (matrix.cols() - 1 - first)]
                for place, extent in enumerate(extents)
            ]
        matrices.append(_matrix(points.get_ctx(), rows, matrix.cols() + new))
    return isl.BasicSet.from_constraint_matrices(wide, *matrices, *order)


def _split(constant: int, extents: tuple[int, ...]) -> tuple[list[int], int]:
    """The constant as a multiple (1, 2 or their negatives) of the nearest extent plus a remainder below a quarter of it."""
    factors = [0] * len(extents)
    best = min(
        ((abs(abs(constant) - times * extent), times, place) for place, extent in enumerate(extents) for times in (1, 2)),
        default=None,
    )
    if best is None or best[0] * 4 > extents[best[2]]:
        return factors, constant
    sign = 1 if constant > 0 else -1
    factors[best[2]] = sign * best[1]
    return factors, constant - sign * best[1] * extents[best[2]]


def _matrix(context: isl.Context, rows: list[list[int]], width: int) -> isl.Mat:
    matrix = isl.Mat.alloc(context, len(rows), width)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            matrix = matrix.set_element_val(i, j, isl.Val(value))
    return matrix


def _dot(row: tuple[int, ...], vector: tuple[int, ...]) -> int:
    return sum(a * b for a, b in zip(row, vector))
