"""What several videos say together."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean of values, and the interval around it.

    Args:
        mean: Mean of the values, in their unit.
        half_width: Half-width of the interval, in the same unit.
    """

    mean: float
    half_width: float

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} ± {self.half_width:{spec.lstrip('+')}}"


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values and its 95 % interval by Student's t; nan for a single value.

    To compare two methods on the same videos, take the interval of their differences, because
    videos differ more than methods do.

    Args:
        values: Values, one per video, at least one.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("there are no values to take the mean of")
    from scipy.stats import t  # it takes a second, and most who come by here want none

    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, float("nan"))
    error = statistics.stdev(values) / len(values) ** 0.5
    return Interval(mean, float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error)
