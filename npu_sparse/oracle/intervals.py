"""Bootstrap intervals of a mean."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
LEAST_VALUES = 3


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> list[float] | None:
    """The 95% percentile bootstrap interval of the mean, `[low, high]`; None for fewer than three values."""
    if len(values) < LEAST_VALUES:
        return None
    values = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return [float(low), float(high)]
