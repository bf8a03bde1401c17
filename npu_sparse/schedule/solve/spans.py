"""Exact linear algebra on small integer vectors: what a set of rows spans, and what it leaves."""

from math import gcd, prod


def outside(rows: list[tuple[int, ...]], vector: tuple[int, ...]) -> bool:
    """Whether the vector is not in the span of the rows."""
    return any(_reduce(list(vector), _echelon(rows)))


def null_space(rows: list[tuple[int, ...]], width: int) -> list[tuple[int, ...]]:
    """A basis of the vectors orthogonal to the rows."""
    pivots = _echelon(rows)
    fixed = {place for place, _ in pivots}
    basis = []
    for free in (k for k in range(width) if k not in fixed):
        scale = prod(abs(row[place]) for place, row in pivots)
        vector = [0] * width
        vector[free] = scale
        for place, row in pivots:
            vector[place] = -scale * row[free] // row[place]
        basis.append(tuple(_primitive(vector)))
    return basis


def _echelon(rows: list[tuple[int, ...]]) -> list[tuple[int, list[int]]]:
    """Reduced rows with the places of their leading entries, by exact elimination."""
    pivots: list[tuple[int, list[int]]] = []
    for row in rows:
        reduced = _reduce(list(row), pivots)
        lead = next((k for k, value in enumerate(reduced) if value), None)
        if lead is not None:
            pivots = [(place, _eliminate(old, reduced, lead)) for place, old in pivots] + [(lead, reduced)]
    return pivots


def _reduce(row: list[int], pivots: list) -> list[int]:
    for place, other in pivots:
        row = _eliminate(row, other, place)
    return row


def _eliminate(row: list[int], other: list[int], place: int) -> list[int]:
    if not row[place]:
        return row
    return _primitive([other[place] * a - row[place] * b for a, b in zip(row, other)])


def _primitive(row: list[int]) -> list[int]:
    divisor = gcd(*row)
    return [value // divisor for value in row] if divisor > 1 else row
