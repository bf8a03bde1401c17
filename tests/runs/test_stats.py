import numpy as np
import pytest

from npu_sparse.runs import stats
from npu_sparse.runs.stats import macro_difference, macro_mean, ratio_of_medians, summary


def test_summary_of_known_values():
    statistics = summary(range(1, 102))
    assert statistics == {"n": 101, "median": 51, "q1": 26, "q3": 76, "iqr": 50, "p95": 96}


def test_interval_of_a_mean_is_that_of_the_normal_approximation():
    sample = np.random.default_rng(7).normal(3.0, 2.0, 400)
    estimate = macro_mean([sample])
    error = 1.96 * sample.std() / 20
    assert estimate.value == sample.mean()
    assert estimate.low == pytest.approx(estimate.value - error, abs=0.02)
    assert estimate.high == pytest.approx(estimate.value + error, abs=0.02)


def test_intervals_cover_the_true_mean_about_95_times_in_100():
    draws = np.random.default_rng(1).random((300, 60)) < 0.7
    estimates = [macro_mean([draw], seed=n, resamples=800) for n, draw in enumerate(draws)]
    assert 0.90 <= np.mean([estimate.low <= 0.7 <= estimate.high for estimate in estimates]) <= 0.99


def test_macro_mean_weighs_strata_equally_and_resamples_within_them():
    estimate = macro_mean([[1.0] * 50, [0.0] * 5])  # resampling across strata would spread
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.5, 0.5)


def test_pairing_removes_what_prompts_have_in_common():
    before = np.random.default_rng(0).normal(0, 10, 100)
    paired = macro_difference([before], [before - 1])
    assert (paired.low, paired.value, paired.high) == pytest.approx((-1, -1, -1))
    unpaired = macro_difference([before], [np.random.default_rng(1).permutation(before) - 1])
    assert unpaired.high - unpaired.low > 3


def test_difference_is_after_minus_before():
    assert macro_difference([[1, 1], [0, 1]], [[1, 0], [0, 1]]).value == pytest.approx(-0.25)


def test_ratio_of_medians_pairs_rounds():
    dense = np.array([1.0, 2.0, 4.0, 8.0, 16.0])  # a machine that slows down for both
    estimate = ratio_of_medians(dense, dense / 2)
    assert (estimate.low, estimate.value, estimate.high) == (2, 2, 2)


def test_the_same_seed_gives_the_same_interval():
    sample = np.random.default_rng(0).random(20)
    assert macro_mean([sample], seed=3) == macro_mean([sample], seed=3) != macro_mean([sample], seed=4)
    assert stats.RESAMPLES == 10_000


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: summary([]), "at least one value"),
        (lambda: summary([1.0, float("nan")]), "samples must be finite, got nan"),
        (lambda: macro_mean([]), "at least one sample"),
        (lambda: macro_difference([[1, 2]], [[1]]), "paired samples must have the same size, got 2 and 1"),
        (lambda: macro_difference([[1]], [[1], [2]]), "the same strata, got 1 and 2"),
    ],
)
def test_samples_that_mean_nothing_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
