"""What a coefficient costs: how an iterator moves through memory, and how long its loop is."""

import islpy as isl

from npu_sparse.schedule.scop import Scop, Statement


def contiguity(statement: Statement) -> list[int]:
    """A cost per iterator, large for one that runs along the last subscript of many accesses and moves nothing else.

    Writes count twice, and every dimension of an array fourfold: jumping through a matrix costs more than through a vector.
    """
    costs = []
    for place in range(len(statement.iterators)):
        cost = 0
        for access, weight in [*((a, 2) for a in statement.writes), *((a, 1) for a in statement.reads)]:
            along = [step(access.relation, place, k) for k in range(access.relation.dim(isl.dim_type.out))]
            weight *= 4 ** (len(along) - 1) if along else 0
            if not any(along):
                cost += weight  # the element stays in a register
            elif abs(along[-1]) == 1 and not any(along[:-1]):
                cost += 4 * weight
        costs.append(cost)
    return costs


def step(relation: isl.Map, place: int, subscript: int) -> int:
    """How far the subscript of an access moves with the iterator at that place."""
    for piece in relation.get_basic_maps():
        for constraint in piece.get_constraints():
            if constraint.is_equality() and constraint.involves_dims(isl.dim_type.out, subscript, 1):
                return constraint.get_coefficient_val(isl.dim_type.in_, place).to_python()
    return 0


def small_loops(statement: Statement, scop: Scop) -> list[int]:
    """A cost per iterator: how many iterators have a larger extent, with every parameter set to 1000."""
    sizes = [_extent(statement.domain.intersect_params(scop.context), place) for place in range(len(statement.iterators))]
    return [sum(other > size for other in sizes) for size in sizes]


def _extent(domain: isl.Set, place: int) -> int:
    for p in range(domain.dim(isl.dim_type.param)):
        domain = domain.fix_val(isl.dim_type.param, p, isl.Val(1000))
    if domain.is_empty():
        return 0
    high, low = domain.dim_max_val(place), domain.dim_min_val(place)
    return high.sub(low).to_python() + 1 if high.is_int() and low.is_int() else 10**9
