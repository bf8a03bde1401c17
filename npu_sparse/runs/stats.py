"""Order statistics of timings, and paired bootstrap intervals of scores and speed-ups."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% percentile-bootstrap interval.

    A sample without spread gives an interval of no width. That is no certainty: after n equal outcomes, an outcome that
    occurs in up to about 3 / n of all cases may still not have been seen.
    """

    value: float
    low: float
    high: float

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return asdict(self)


def summary(samples: Sequence[float]) -> dict:
    """`{"n", "median", "q1", "q3", "iqr", "p95"}` of a sample, quantiles by linear interpolation."""
    values = _sample("samples", samples)
    q1, median, q3, p95 = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75, 0.95)))
    return {"n": len(values), "median": median, "q1": q1, "q3": q3, "iqr": q3 - q1, "p95": p95}


def macro_mean(strata: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean of the strata's means, prompts being resampled within each stratum (a task). One stratum: a plain
    mean."""
    return _bootstrap([_sample("strata", stratum) for stratum in strata], seed, resamples)


def macro_difference(
    before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """`after - before`, averaged within and then over strata; sample i of both is one prompt and is resampled as a
    pair."""
    if len(before) != len(after):
        raise ValueError(f"before and after must have the same strata, got {len(before)} and {len(after)}")
    return _bootstrap([_paired(b, a)[1] - _paired(b, a)[0] for b, a in zip(before, after)], seed, resamples)


def ratio_of_medians(
    numerator: Sequence[float], denominator: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """`median(numerator) / median(denominator)`; sample i of both is one round and is resampled as a pair."""
    top, bottom = _paired(numerator, denominator)
    drawn = np.random.default_rng(seed).integers(0, len(top), (resamples, len(top)))
    ratios = np.median(top[drawn], axis=1) / np.median(bottom[drawn], axis=1)
    return _estimate(float(np.median(top) / np.median(bottom)), ratios)


def _bootstrap(strata: list[np.ndarray], seed: int, resamples: int) -> Estimate:
    if not strata:
        raise ValueError("strata must hold at least one sample, got none")
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for stratum in strata:
        drawn = rng.integers(0, len(stratum), (resamples, len(stratum)))
        means += stratum[drawn].mean(axis=1)
    return _estimate(float(np.mean([stratum.mean() for stratum in strata])), means / len(strata))


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    low, high = np.quantile(resampled, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Estimate(value, float(low), float(high))


def _paired(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    if len(first) != len(second):
        raise ValueError(f"paired samples must have the same size, got {len(first)} and {len(second)}")
    return _sample("first", first), _sample("second", second)


def _sample(name: str, values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must hold one-dimensional samples of at least one value, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}")
    return array
