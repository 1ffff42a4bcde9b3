"""Figures as PNG files."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from lora_one.files import whole_file
from lora_one.reports.curves import Curve, Figure, figures_of
from lora_one.reports.rows import Row

# More curves than that cannot be told apart; the page of scripts/make_report.py can hide some.
_MOST_CURVES = 20


def write_figures(
    rows: Sequence[Row], folders: dict[str, Path], root: Path, metric: str, prefix: str = ""
) -> list[str]:
    """Writes what says something: loss and accuracy against step and time, final figures against rate.

    Args:
        rows: Of the table; each is one curve, the mean of its seeds with a band from lowest to highest.
        folders: The folder of each run, by its id.
        root: Where the files go.
        metric: What is shown against the learning rate.
        prefix: Of the files' names.

    Returns:
        The files' names.
    """
    names = []
    for figure in figures_of(rows, folders, metric):
        name = f"{prefix}{figure.name}.png"
        _draw(figure, root / name)
        names.append(name)
    return names


def _draw(figure: Figure, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    curves = figure.curves[:_MOST_CURVES]
    canvas, axis = plt.subplots(figsize=(8, 4.5))
    for number, curve in enumerate(curves):
        _line(axis, curve, figure.log_x, f"C{number % 10}", ("-", "--")[number // 10])
    axis.set(xlabel=figure.x_label, ylabel=figure.y_label)
    if figure.log_x:
        axis.set_xscale("log")
    if figure.log_y and _is_positive(curves):
        axis.set_yscale("log")
    if figure.percent:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    if len(figure.curves) > len(curves):
        axis.set_title(f"the first {len(curves)} of {len(figure.curves)} rows", fontsize=9)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.14), frameon=False)
    with whole_file(path) as partial:
        canvas.savefig(partial, format="png", dpi=120, bbox_inches="tight")
    plt.close(canvas)


def _line(axis: Any, curve: Curve, with_marks: bool, color: str, style: str) -> None:
    x = [point.x for point in curve.points]
    label = f"{_shortened(curve.name)}, n = {curve.n}"
    mark = "o" if with_marks or len(x) < 15 else None
    axis.plot(
        x, [point.y for point in curve.points], label=label, color=color, linestyle=style, marker=mark, ms=4
    )
    low, high = [point.low for point in curve.points], [point.high for point in curve.points]
    axis.fill_between(x, low, high, alpha=0.15, color=color)


def _shortened(name: str, most: int = 110) -> str:
    # A dollar sign would begin mathematics.
    return (name if len(name) <= most else f"{name[: most - 1]}…").replace("$", r"\$")


def _is_positive(curves: Sequence[Curve]) -> bool:
    return all(isfinite(point.low) and point.low > 0 for curve in curves for point in curve.points)
