"""Curves of runs: each run's own, their mean over seeds, and the final figure against the learning rate."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from lora_one.plots import smoothed
from lora_one.reports.reading import init_seconds, settings_key
from lora_one.reports.rows import Row, form_of
from lora_one.reports.summary import summarise
from lora_one.tracking import read_metrics


@dataclass(frozen=True)
class Point:
    """A mean over seeds, and the lowest and highest of them."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """One line of a figure.

    Attributes:
        name: For the legend.
        points: By x.
        n: Runs that it is the mean of.
        is_whole: Whether its runs are finished.
    """

    name: str
    points: tuple[Point, ...]
    n: int
    is_whole: bool = True


@dataclass(frozen=True)
class Figure:
    """Curves with the axes they share; ``percent`` where y is a share of rights."""

    name: str
    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    log_x: bool = False
    log_y: bool = False
    percent: bool = False


def figures_of(rows: Sequence[Row], folders: dict[str, Path], metric: str) -> list[Figure]:
    """All figures that have something to show.

    Args:
        rows: Of the table.
        folders: The folder of each run, by its id.
        metric: What the figure against the learning rate shows.
    """
    points = {
        run["run_id"]: read_metrics(folders[run["run_id"]] / "metrics.jsonl")
        for row in rows
        for run in row.runs
    }
    share = "exact match on the validation split"
    figures = [
        Figure("loss", "training loss", "optimiser step", "training loss, smoothed",
               _all(rows, points, "loss", "step"), log_y=True),
        Figure("loss_time", "training loss against time", "seconds, start of the adapters included",
               "training loss, smoothed", _all(rows, points, "loss", "seconds"), log_y=True),
        Figure("validation", "validation loss", "optimiser step", "validation loss",
               _several(_all(rows, points, "eval_loss", "step")), log_y=True),
        Figure("accuracy", share, "optimiser step", share,
               _all(rows, points, "eval_exact_match", "step"), percent=True),
        Figure("accuracy_time", f"{share} against time", "seconds, start of the adapters included", share,
               _all(rows, points, "eval_exact_match", "seconds"), percent=True),
        *_against_rate(rows, metric),
    ]  # fmt: skip
    return [figure for figure in figures if figure.curves]


def _several(curves: tuple[Curve, ...]) -> tuple[Curve, ...]:
    # A validation loss at the end alone is in the table.
    return tuple(curve for curve in curves if len(curve.points) > 1)


def _all(rows: Sequence[Row], points: dict[str, list[dict[str, Any]]], y: str, x: str) -> tuple[Curve, ...]:
    curves = []
    for row in rows:
        runs = row.finished or row.unfinished
        of_runs = [_of_run(points[run["run_id"]], y, x, init_seconds(run)) for run in runs]
        averaged = mean_curve([curve for curve in of_runs if curve])
        if averaged:
            name = f"{row.label(rows)}, lr {row.rate:g}" + (
                f" ({runs[0]['status']})" if not row.finished else ""
            )
            curves.append(Curve(name, averaged, len(runs), bool(row.finished)))
    return tuple(curves)


def _of_run(rows: Sequence[dict[str, Any]], y: str, x: str, before: float) -> dict[int, tuple[float, float]]:
    """Of each step at which y was noted, x and y; seconds count from the pretrained model."""
    noted = [row for row in rows if row.get(y) is not None]
    values = [(row["step"], row[y]) for row in noted]
    if y == "loss":
        values = smoothed(values)
    return {
        step: (row["seconds"] + before if x == "seconds" else float(step), value)
        for row, (step, value) in zip(noted, values, strict=True)
    }


def mean_curve(curves: Sequence[dict[int, tuple[float, float]]]) -> tuple[Point, ...]:
    """The mean of x and of y over runs at each step that all of them have.

    Args:
        curves: For each run the x and y of its steps.
    """
    if not curves:
        return ()
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    points = []
    for step in steps:
        values = [curve[step][1] for curve in curves]
        points.append(Point(mean(curve[step][0] for curve in curves), mean(values), min(values), max(values)))
    return tuple(points)


def _against_rate(rows: Sequence[Row], metric: str) -> list[Figure]:
    """The final figure of settings that were run at several learning rates."""
    figures = []
    for name, path in (("rates", metric), ("rates_loss", "validation_loss")):
        curves = tuple(_rate_curves(rows, path))
        if curves and (name, path) != ("rates", "validation_loss"):
            percent = form_of([run for row in rows for run in row.finished], path).endswith("%}")
            label = path.replace("_", " ")
            figures.append(
                Figure(name, f"{label} against learning rate", "learning rate", label, curves,
                       log_x=True, log_y=not percent, percent=percent)
            )  # fmt: skip
    return figures


def _rate_curves(rows: Sequence[Row], path: str) -> list[Curve]:
    families: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.finished and row.rate > 0 and summarise(row.values(path)):
            config = row.finished[0]["config"]
            families[(row.label(rows), settings_key(config, ["model.learning_rate"]))].append(row)
    curves = []
    for (name, _), members in families.items():
        if len({row.rate for row in members}) < 2:
            continue
        points = []
        for row in sorted(members, key=lambda row: row.rate):
            values = [value for value in row.values(path) if value is not None]
            points.append(Point(row.rate, mean(values), min(values), max(values)))
        curves.append(Curve(name, tuple(points), max(len(row.finished) for row in members)))
    return curves


def thinned(curve: Curve, limit: int) -> Curve:
    """At most about ``limit`` points: of each stretch the lowest and the highest, so that spikes stay."""
    points = curve.points
    if len(points) <= limit:
        return curve
    inner, n_stretches = points[1:-1], max(1, (limit - 2) // 2)
    kept = [points[0]]
    for number in range(n_stretches):
        stretch = inner[number * len(inner) // n_stretches : (number + 1) * len(inner) // n_stretches]
        if stretch:
            ends = {stretch.index(min(stretch, key=_height)), stretch.index(max(stretch, key=_height))}
            kept += [stretch[i] for i in sorted(ends)]
    return replace(curve, points=(*kept, points[-1]))


def _height(point: Point) -> float:
    return point.y
