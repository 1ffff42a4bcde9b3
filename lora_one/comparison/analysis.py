"""From the runs of a comparison to its figures: summaries, tests against the baseline, steps to its loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_one.comparison.results import Comparison, Final, Method
from lora_one.comparison.statistics import (
    Paired,
    compare,
    first_at_or_below,
    geometric,
    holm,
    mean_curve,
)
from lora_one.summaries import Summary, summarise

LOSS = "validation loss"
LEVEL = 0.05


@dataclass(frozen=True)
class Test:
    """A method against the baseline in one figure.

    Attributes:
        paired: Difference and p.
        p_holm: p corrected for the number of methods; None where there is no p.
    """

    paired: Paired
    p_holm: float | None

    @property
    def is_significant(self) -> bool:
        """Whether the difference stands after the correction."""
        return self.p_holm is not None and self.p_holm < LEVEL


@dataclass(frozen=True)
class Speed:
    """How soon a method comes to the baseline's final validation loss.

    Attributes:
        steps: Where its mean curve comes to the baseline's mean final loss; None where it does not.
        n_seeds: Seeds that it shares with the baseline.
        n_reached: Of these, seeds in which it comes to the baseline's final loss with the same seed.
        step_ratio: Its steps over the baseline's, seed by seed (geometric mean); None unless all come there.
        time_ratio: The same of seconds, the start's included.
    """

    steps: float | None
    n_seeds: int
    n_reached: int
    step_ratio: Summary | None
    time_ratio: Summary | None

    @property
    def is_faster(self) -> bool:
        """Whether the interval of the steps lies below 1."""
        return self.step_ratio is not None and (self.step_ratio.high or 1.0) < 1


@dataclass(frozen=True)
class Analysis:
    """What is reported.

    Attributes:
        comparison: What it is of.
        figures: Figure (validation loss, then scores): method: summary.
        tests: Figure: method but the baseline: test.
        target: The baseline's mean final validation loss.
        speeds: Method: how soon it comes there.
    """

    comparison: Comparison
    figures: Mapping[str, Mapping[str, Summary]]
    tests: Mapping[str, Mapping[str, Test]]
    target: float | None
    speeds: Mapping[str, Speed]


def analyse(comparison: Comparison) -> Analysis:
    """All figures of a comparison."""
    baseline = comparison.baseline
    by_figure = {
        figure: {method.name: values_of(method, figure) for method in comparison.methods}
        for figure in (LOSS, *comparison.scores)
    }
    target = summarise(list(baseline.losses.values())).mean if baseline.finals else None
    return Analysis(
        comparison=comparison,
        figures={
            figure: {name: summarise(list(v.values())) for name, v in values.items() if v}
            for figure, values in by_figure.items()
        },
        tests={figure: _tests(values, baseline.name) for figure, values in by_figure.items()},
        target=target,
        speeds={m.name: _speed(m, baseline, target) for m in comparison.methods if target is not None},
    )


def values_of(method: Method, figure: str) -> dict[int, float]:
    """Seed: figure."""
    return method.losses if figure == LOSS else method.score(figure)


def _tests(values: Mapping[str, Mapping[int, float]], baseline: str) -> dict[str, Test]:
    pairs = {
        name: paired
        for name, mine in values.items()
        if name != baseline and (paired := compare(mine, values[baseline])) is not None
    }
    corrected = holm({name: paired.p for name, paired in pairs.items() if paired.p is not None})
    return {name: Test(paired, corrected.get(name)) for name, paired in pairs.items()}


def _speed(method: Method, baseline: Method, target: float) -> Speed:
    seeds = sorted(method.finals.keys() & baseline.finals.keys())
    pairs = [(method.finals[seed], baseline.finals[seed]) for seed in seeds]
    steps = [_ratio(mine.by_step, theirs.by_step, theirs.loss) for mine, theirs in pairs]
    times = [_ratio(mine.by_seconds, theirs.by_seconds, theirs.loss) for mine, theirs in pairs]
    return Speed(
        steps=first_at_or_below(_mean(list(method.finals.values())), target),
        n_seeds=len(seeds),
        n_reached=sum(ratio is not None for ratio in steps),
        step_ratio=_over_seeds(steps),
        time_ratio=_over_seeds(times),
    )


def _ratio(
    mine: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]], target: float
) -> float | None:
    reached, needed = first_at_or_below(mine, target), first_at_or_below(theirs, target)
    return None if reached is None or not needed else reached / needed


def _over_seeds(ratios: Sequence[float | None]) -> Summary | None:
    known = [ratio for ratio in ratios if ratio is not None]
    return geometric(known) if known and len(known) == len(ratios) else None


def _mean(runs: Sequence[Final]) -> list[tuple[float, float]]:
    return mean_curve([run.by_step for run in runs])
