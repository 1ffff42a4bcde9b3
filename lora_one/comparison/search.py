"""Which settings of a method are tried: a grid of rates that grows towards its best, and γ by coordinates.

Everything here is a function of the losses that are known, so that a comparison that is started again asks
for the same runs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

FAILED = math.nan  # a run that came to no result; one that diverged is infinitely bad


@dataclass(frozen=True)
class Point:
    """A setting of a method.

    Attributes:
        rate: Learning rate.
        gamma: Of a gradient start; None where the method has none, or where it is not tuned.
    """

    rate: float
    gamma: float | None = None

    def __str__(self) -> str:
        return f"rate {self.rate:.2g}" + ("" if self.gamma is None else f", γ {self.gamma:g}")


@dataclass(frozen=True)
class Line:
    """Values on a log scale, by number; those beyond the ends follow by the same factor.

    Attributes:
        values: The first ones, rising.
        factor: Between two values beyond the ends.
        digits: Significant ones of what ``value`` returns; None: all.
        given: Whether the first ones are a person's, and stay as they are.
    """

    values: tuple[float, ...]
    factor: float
    digits: int | None = None
    given: bool = False

    def value(self, number: int) -> float:
        """That of a number, which may be negative."""
        inside = min(max(number, 0), len(self.values) - 1)
        exact = self.values[inside] * self.factor ** (number - inside)
        if self.digits is None or (self.given and inside == number):
            return exact
        return float(f"{exact:.{self.digits - 1}e}")


def log_grid(centre: float, n: int, per_decade: int) -> Line:
    """``n`` values of 10^(k / per_decade) around the one that is next to ``centre``."""
    middle = round(per_decade * math.log10(centre))
    numbers = range(middle - n // 2, middle - n // 2 + n)
    return Line(tuple(10 ** (k / per_decade) for k in numbers), 10 ** (1 / per_decade), digits=2)


@dataclass(frozen=True)
class Walk:
    """Where a search along a line stands.

    Attributes:
        asks: Numbers to try now; empty when the search has ended.
        best: The number of the lowest loss; None before the end, or where no run came to a loss.
        edge: ``lowest`` or ``highest``, where the best is the last value that may be tried.
    """

    asks: tuple[int, ...] = ()
    best: int | None = None
    edge: str | None = None


def walk(losses: Callable[[int], float | None], first: Sequence[int], bounds: range) -> Walk:
    """Tries the first numbers, then goes on beyond an end as long as the best lies there.

    Args:
        losses: The loss of a number: infinite where it diverged, NaN where it failed, None where unknown.
        first: Numbers without gaps, rising.
        bounds: Numbers that may be tried.

    Returns:
        What to try, or what was found.
    """
    if unknown := tuple(number for number in first if losses(number) is None):
        return Walk(asks=unknown)
    low, high = first[0], first[-1]
    while True:
        known = {number: _known(losses, number) for number in range(low, high + 1)}
        best = min(known, key=lambda number: (_rank(known[number]), number))
        none_finite = not math.isfinite(known[best])
        if none_finite and not any(math.isinf(loss) for loss in known.values()):
            return Walk()  # nothing but failures: other rates would fail too
        if best == low or none_finite:  # what diverges everywhere wants a lower rate
            step, is_last, edge = -1, low <= bounds[0], "lowest"
        elif best == high:
            step, is_last, edge = 1, high >= bounds[-1], "highest"
        else:
            return Walk(best=best)
        if is_last:
            return Walk() if none_finite else Walk(best=best, edge=edge)
        low, high = (low - 1, high) if step < 0 else (low, high + 1)
        new = low if step < 0 else high
        if losses(new) is None:
            return Walk(asks=(new,))


def _known(losses: Callable[[int], float | None], number: int) -> float:
    loss = losses(number)
    assert loss is not None
    return loss


def _rank(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


@dataclass(frozen=True)
class Space:
    """What is searched for one method.

    Attributes:
        rates: Its line of learning rates.
        gammas: Its line of γ; None where it has none.
        gamma_start: The number of γ's default on that line.
        widest: So many values at most beyond each end of a line's first ones.
    """

    rates: Line
    gammas: Line | None = None
    gamma_start: int = 0
    widest: int = 8

    @property
    def first_gamma(self) -> float | None:
        """γ while the first rate is looked for."""
        return None if self.gammas is None else self.gammas.value(self.gamma_start)

    def bounds(self, line: Line) -> range:
        """The numbers of a line's values that may be tried."""
        return range(-self.widest, len(line.values) + self.widest)


@dataclass(frozen=True)
class Plan:
    """Where the search of a method stands.

    Attributes:
        asks: Settings to try now; empty when the search has ended.
        best: The setting of the lowest loss of all that were tried, at the end.
        remarks: What a reader must know: a bound that was hit.
    """

    asks: tuple[Point, ...] = ()
    best: Point | None = None
    remarks: tuple[str, ...] = field(default=())


def plan(space: Space, losses: Mapping[Point, float]) -> Plan:
    """Coordinate search: the rate at the default γ, γ at that rate, and the rate once more around it.

    Args:
        space: Of the method.
        losses: The validation loss of every setting tried: infinite where it diverged, NaN where it failed.

    Returns:
        The settings to try next, or the best of all.
    """

    def along_rates(gamma: float | None, first: Sequence[int]) -> tuple[Walk, tuple[Point, ...]]:
        def at(number: int) -> Point:
            return Point(space.rates.value(number), gamma)

        found = walk(lambda number: losses.get(at(number)), first, space.bounds(space.rates))
        return found, tuple(at(number) for number in found.asks)

    found, asks = along_rates(space.first_gamma, range(len(space.rates.values)))
    if asks or found.best is None:
        return Plan(asks)
    remarks: tuple[str, ...] = ()
    if (gammas := space.gammas) is not None:
        rate = space.rates.value(found.best)
        by_gamma = walk(
            lambda number: losses.get(Point(rate, gammas.value(number))),
            range(len(gammas.values)),
            space.bounds(gammas),
        )
        if by_gamma.asks:
            return Plan(tuple(Point(rate, gammas.value(number)) for number in by_gamma.asks))
        assert by_gamma.best is not None  # the default γ has a loss
        remarks = _at_bound("γ", by_gamma, gammas)
        bounds = space.bounds(space.rates)
        near = range(max(bounds[0], found.best - 1), min(bounds[-1], found.best + 1) + 1)
        found, asks = along_rates(gammas.value(by_gamma.best), near)
        if asks:
            return Plan(asks)
    remarks += _at_bound("rate", found, space.rates)
    finite = {point: loss for point, loss in losses.items() if math.isfinite(loss)}
    best = min(finite, key=lambda point: (finite[point], point.rate))
    return Plan(best=best, remarks=remarks)


def _at_bound(name: str, found: Walk, line: Line) -> tuple[str, ...]:
    if found.edge is None or found.best is None:
        return ()
    value = line.value(found.best)
    return (f"its best {name}, {value:.3g}, is the {found.edge} that was allowed: the best may lie beyond",)
