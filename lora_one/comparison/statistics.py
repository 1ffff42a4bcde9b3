"""Intervals, paired tests and crossings of a comparison over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy import stats

from lora_one.summaries import Summary, summarise


def geometric(values: Sequence[float]) -> Summary:
    """The same of positive figures on the log scale: of ratios; ``std`` stays that of the logarithms."""
    logs = summarise([math.log(value) for value in values])
    if logs.low is None or logs.high is None:
        return Summary(logs.n, math.exp(logs.mean))
    return Summary(logs.n, math.exp(logs.mean), logs.std, math.exp(logs.low), math.exp(logs.high))


@dataclass(frozen=True)
class Paired:
    """One method against the baseline, seed by seed.

    Attributes:
        difference: Method minus baseline.
        p: Of the two-sided paired t-test; None with fewer than two pairs.
    """

    difference: Summary
    p: float | None


def compare(mine: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
    """The paired comparison over the seeds that both have; None without any.

    Args:
        mine: Seed: figure.
        baseline: The same of the baseline.
    """
    seeds = sorted(mine.keys() & baseline.keys())
    if not seeds:
        return None
    differences = [mine[seed] - baseline[seed] for seed in seeds]
    summary = summarise(differences)
    if summary.std is None:
        return Paired(summary, None)
    if summary.std == 0:  # the t statistic is 0/0, or infinite
        return Paired(summary, 1.0 if summary.mean == 0 else 0.0)
    t = summary.mean / (summary.std / math.sqrt(summary.n))
    return Paired(summary, 2 * float(stats.t.sf(abs(t), summary.n - 1)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction for as many tests as there are.

    Args:
        p_values: Name: p of its test.

    Returns:
        Name: adjusted p, to be held against the level itself.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def first_at_or_below(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Where a curve first comes to a target.

    Args:
        curve: Places (steps, seconds), rising, and losses.
        target: A loss.

    Returns:
        The place on the straight line between the two neighbours, the first place itself if that is low
        enough already (it may have been reached earlier), or None if the curve never comes there.
    """
    before: tuple[float, float] | None = None
    for place, loss in curve:
        if loss <= target:
            if before is None or before[1] == loss:
                return place
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (place - before[0])
        before = (place, loss)
    return None


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean loss at each place that all curves have."""
    common = set.intersection(*({place for place, _ in curve} for curve in curves)) if curves else set()
    values = [dict(curve) for curve in curves]
    return [(place, fmean(curve[place] for curve in values)) for place in sorted(common)]
