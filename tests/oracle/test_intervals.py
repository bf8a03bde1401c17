import pytest

from npu_sparse.oracle.intervals import bootstrap_interval


def test_two_values_have_no_interval():
    assert bootstrap_interval([1.0, 2.0]) is None


def test_equal_values_have_an_interval_of_no_width():
    assert bootstrap_interval([2.0] * 5) == [2.0, 2.0]


def test_interval_is_that_of_the_normal_theory_for_many_values():
    values = [float(i % 2) for i in range(400)]  # mean 0.5, standard error 0.025
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.01)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.01)


def test_same_seed_gives_the_same_interval():
    assert bootstrap_interval([1.0, 2.0, 4.0], seed=3) == bootstrap_interval([1.0, 2.0, 4.0], seed=3)
