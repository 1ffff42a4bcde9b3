"""Mean, standard deviation and interval of a few runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

from scipy.special import stdtrit


@dataclass(frozen=True)
class Summary:
    """Of ``n`` runs that differ in the seed alone.

    Attributes:
        std: Standard deviation with n - 1 in the denominator; None of one run.
        half_width: Of the mean's 95 % interval: Student's t, n - 1 degrees of freedom; None of one run.
    """

    n: int
    mean: float
    std: float | None
    half_width: float | None

    @property
    def low(self) -> float | None:
        """The lower end of the interval."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """The upper end of the interval."""
        return None if self.half_width is None else self.mean + self.half_width


def summarise(values: Sequence[float | None]) -> Summary | None:
    """The summary of what was measured; None of nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if len(known) == 1:
        return Summary(1, known[0], None, None)
    std = stdev(known)
    return Summary(
        len(known), mean(known), std, float(stdtrit(len(known) - 1, 0.975)) * std / sqrt(len(known))
    )


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean ± standard deviation; a dash where nothing was measured.

    Args:
        values: One for each run.
        form: Of a number, for example ``"{:.1%}"``.
    """
    summary = summarise(values)
    if summary is None:
        return "-"
    text = form.format(summary.mean)
    return text if summary.std is None else f"{text} ± {form.format(summary.std)}"


def interval(values: Sequence[float | None], form: str) -> str:
    """The 95 % interval of the mean; a dash of fewer than two."""
    summary = summarise(values)
    if summary is None or summary.half_width is None:
        return "-"
    return f"{form.format(summary.low)} … {form.format(summary.high)}"
