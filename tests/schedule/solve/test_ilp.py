import itertools
import random

import pytest

pytest.importorskip("highspy")

from npu_sparse.schedule.solve.ilp import Model, SolverTimeoutError  # noqa: E402


def random_model(seed: int) -> tuple[Model, list[dict[int, int]]]:
    chance = random.Random(seed)
    model = Model()
    columns = [model.column(chance.randint(-3, 0), chance.randint(1, 4)) for _ in range(4)]
    for _ in range(3):
        model.row({column: chance.randint(-2, 2) for column in columns}, chance.randint(-3, 3))
    return model, [{column: chance.randint(-2, 2) for column in columns} for _ in range(3)]


@pytest.mark.parametrize("seed", range(40))
def test_lexmin_agrees_with_enumeration(seed):
    model, objectives = random_model(seed)
    boxes = [range(low, high + 1) for low, high in zip(model.lower, model.upper)]

    def values(solution):
        return [sum(factor * solution[column] for column, factor in terms.items()) for terms in objectives]

    feasible = [list(point) for point in itertools.product(*boxes) if model.holds(list(point))]
    best = min(map(values, feasible), default=None)
    solution = model.lexmin(objectives)
    assert (solution is None) == (best is None)
    if solution is not None:
        assert model.holds(solution) and values(solution) == best


def test_row_without_terms_decides_feasibility():
    model = Model()
    column = model.column(0, 1)
    model.row({column: 0}, 0)
    assert model.lexmin([]) == [0]
    model.row({column: 0}, 1)
    assert model.lexmin([]) is None


def test_solver_without_time_says_so():
    model, objectives = random_model(1)
    with pytest.raises(SolverTimeoutError, match="no solution within 0 s"):
        model.lexmin(objectives, 0)
