"""The pictures of a comparison."""

import math
from pathlib import Path
from typing import Any

from lora_one.comparison.analysis import LOSS, Analysis
from lora_one.comparison.results import Method
from lora_one.comparison.statistics import mean_curve
from lora_one.files import whole_file

_MARKERS = "osD^vP<>Xph*"


def draw(analysis: Analysis, folder: Path) -> list[str]:
    """Writes the figures; returns their file names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = []
    for name, make in (("scores", _scores), ("sensitivity", _sensitivity), ("curves", _curves)):
        figure = make(plt, analysis)
        with whole_file(folder / f"{name}.png") as partial:
            figure.savefig(partial, format="png", dpi=100)
        plt.close(figure)
        names.append(f"{name}.png")
    return names


def _styles(analysis: Analysis) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each method; the baseline is black."""
    styles: dict[str, dict[str, Any]] = {}
    for number, method in enumerate(analysis.comparison.methods):
        is_baseline = method is analysis.comparison.baseline
        styles[method.name] = {
            "color": "black" if is_baseline else f"C{len(styles) % 10}",
            "marker": _MARKERS[number % len(_MARKERS)],
            "zorder": 3 if is_baseline else 2,
        }
    return styles


def _scores(plt: Any, analysis: Analysis) -> Any:
    """Every figure's mean and interval, method by method."""
    figures = list(analysis.figures)
    methods = analysis.comparison.methods
    size = (4.5 * len(figures) + 1.5, 0.35 * len(methods) + 1.2)
    figure, axes = plt.subplots(
        1, len(figures), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    styles = _styles(analysis)
    for axis, name in zip(axes[0], figures, strict=True):
        scale = 100 if name != LOSS and analysis.comparison.is_share(name) else 1
        for place, method in enumerate(methods):
            found = analysis.figures[name].get(method.name)
            if found is None:
                continue
            low, high = found.low or found.mean, found.high or found.mean
            ends = [[scale * (found.mean - low)], [scale * (high - found.mean)]]
            axis.errorbar(scale * found.mean, place, xerr=ends, capsize=3, **styles[method.name])
        mean = analysis.figures[name].get(analysis.comparison.baseline.name)
        if mean is not None:
            axis.axvline(scale * mean.mean, color="black", linewidth=0.8, linestyle=":")
        title = analysis.comparison.title(name) + (", %" if scale == 100 else "")
        axis.set(xlabel=f"{title} (mean, 95 % interval)")
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(methods)), [method.name for method in methods])
    axes[0][0].invert_yaxis()
    return figure


def _sensitivity(plt: Any, analysis: Analysis) -> Any:
    """Final validation loss against the learning rate, at the tuning seeds; stars are what was chosen."""
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, style in _styles(analysis).items():
        method = next(m for m in analysis.comparison.methods if m.name == name)
        finite = [(t.rate, t.loss) for t in _best_gammas(method) if math.isfinite(t.loss)]
        if not finite:
            continue
        axis.plot(*zip(*finite, strict=True), label=name, markersize=4, linewidth=1.2, **style)
        if method.best is not None:
            chosen = dict(finite)[method.best.rate]
            axis.plot(method.best.rate, chosen, "*", color=style["color"], markersize=13, zorder=4)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="learning rate",
        ylabel="final validation loss (tuning seeds; best γ tried at each rate)",
    )
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _best_gammas(method: Method) -> list[Any]:
    """At each rate the trial with the lowest loss, by rate."""
    best: dict[float, Any] = {}
    for trial in sorted(method.trials, key=lambda t: (t.rate, math.isnan(t.loss), t.loss)):
        best.setdefault(trial.rate, trial)
    return list(best.values())


def _curves(plt: Any, analysis: Analysis) -> Any:
    """Mean validation loss against step, and against seconds with the start."""
    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    for name, style in _styles(analysis).items():
        method = next(m for m in analysis.comparison.methods if m.name == name)
        runs = list(method.finals.values())
        if not runs:
            continue
        line = {"linewidth": 1.3, "markersize": 3, **style}
        loss = mean_curve([run.by_step for run in runs])
        seconds = dict(mean_curve([[(s, t + run.init_seconds) for s, _, t in run.curve] for run in runs]))
        by_step.plot(*zip(*loss, strict=True), label=name, **line)
        by_time.plot([seconds[step] for step, _ in loss], [value for _, value in loss], **line)
    for axis in (by_step, by_time):
        if analysis.target is not None:
            axis.axhline(analysis.target, color="black", linewidth=0.8, linestyle=":")
        axis.set(yscale="log")
        axis.grid(alpha=0.3, which="both")
    by_step.set(xlabel="optimiser step", ylabel="validation loss, mean over seeds")
    by_time.set(xlabel="seconds, the start included")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
