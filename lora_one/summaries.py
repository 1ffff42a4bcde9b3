"""Mean, standard deviation and interval over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Figures over seeds.

    Attributes:
        n: Seeds.
        mean: Their mean.
        std: Sample standard deviation; None of one seed.
        low: Lower end of the 95 % t interval of the mean; None of one seed.
        high: Its upper end.
    """

    n: int
    mean: float
    std: float | None = None
    low: float | None = None
    high: float | None = None


def summarise(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and t interval of at least one figure."""
    mean = fmean(values)
    if len(values) < 2:
        return Summary(len(values), mean)
    std = stdev(values)
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * std / sqrt(len(values))
    return Summary(len(values), mean, std, mean - half, mean + half)
