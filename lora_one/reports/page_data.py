"""The curves of a page, as small as they can be shown."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

from lora_one.reports.curves import Curve, Figure, Point, thinned

# All curves of a figure together, and each.
_POINTS_OF_FIGURE, _MOST_POINTS, _FEWEST_POINTS = 12_000, 300, 40
# More than that are hidden at first.
_FIRST_SHOWN = 10


def figure_data(figure: Figure) -> dict[str, Any]:
    """What ``page.js`` draws."""
    curves = [curve for curve in map(_finite, figure.curves) if curve.points]
    limit = max(_FEWEST_POINTS, min(_MOST_POINTS, _POINTS_OF_FIGURE // max(1, len(curves))))
    first = _best(curves, figure.percent)
    return {
        "title": figure.title,
        "x": figure.x_label,
        "y": figure.y_label,
        "logX": figure.log_x,
        "logY": figure.log_y,
        "percent": figure.percent,
        "curves": [
            _curve_data(thinned(curve, limit), number in first) for number, curve in enumerate(curves)
        ],
    }


def _finite(curve: Curve) -> Curve:
    points = tuple(point for point in curve.points if isfinite(point.x + point.low + point.y + point.high))
    return Curve(curve.name, points, curve.n, curve.is_whole)


def _best(curves: Sequence[Curve], is_high_good: bool) -> set[int]:
    """The numbers of the curves that end best."""
    ends = sorted(range(len(curves)), key=lambda i: curves[i].points[-1].y, reverse=is_high_good)
    return set(ends[:_FIRST_SHOWN])


def _curve_data(curve: Curve, is_first: bool) -> dict[str, Any]:
    def column(name: str) -> list[float]:
        return [float(f"{getattr(point, name):.5g}") for point in curve.points]

    data: dict[str, Any] = {
        "name": curve.name,
        "n": curve.n,
        "first": is_first,
        "x": column("x"),
        "y": column("y"),
    }
    has_band = any(_width(point) > 0 for point in curve.points)
    return data | ({"low": column("low"), "high": column("high")} if has_band else {})


def _width(point: Point) -> float:
    return point.high - point.low
