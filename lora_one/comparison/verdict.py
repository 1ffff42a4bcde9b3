"""What a comparison came to, in plain words made from its numbers."""

from collections.abc import Callable, Sequence

from lora_one.comparison.analysis import LOSS, Analysis, Test
from lora_one.summaries import Summary


def verdict(analysis: Analysis) -> list[str]:
    """Sentences: who is better than the baseline, worse, not to be told from it, and who is sooner."""
    # Scores before the loss that the settings were chosen by.
    lines = [" ".join(_of_figure(analysis, figure)) for figure in reversed(list(analysis.figures))]
    if speed := _of_speed(analysis):
        lines.append(" ".join(speed))
    missing = [m.name for m in analysis.comparison.methods if m.missing]
    if missing:
        lines.append(f"Runs are missing of {_and(missing)}; what that changes is unknown.")
    return lines


def _of_figure(analysis: Analysis, figure: str) -> list[str]:
    means, baseline = analysis.figures[figure], analysis.comparison.baseline.name
    if baseline not in means:
        return [f"{figure}: {baseline} has no result, so nothing is told."]
    title = analysis.comparison.title(figure)
    sign = -1 if figure == LOSS else 1
    best = max(means, key=lambda name: sign * means[name].mean)
    lines = [
        f"{title}: {best} has the best mean, {text_of(analysis, figure, means[best].mean)}"
        + ("." if best == baseline else f" ({baseline} {text_of(analysis, figure, means[baseline].mean)}).")
    ]
    better = _named(analysis, figure, lambda t: t.is_significant and sign * t.paired.difference.mean > 0)
    worse = _named(analysis, figure, lambda t: t.is_significant and sign * t.paired.difference.mean < 0)
    unclear = _named(analysis, figure, lambda t: not t.is_significant)
    n_tests = sum(test.p_holm is not None for test in analysis.tests[figure].values())
    corrected = f"corrected for {n_tests} test{'s' * (n_tests > 1)}"
    lines.append(f"Better than {baseline}, {corrected}: {_and(better) or 'none'}.")
    lines.append(f"Worse than {baseline}: {_and(worse) or 'none'}.")
    if unclear:
        lines.append(f"Not told from {baseline}: {_and(unclear)}.")
    return lines


def _named(analysis: Analysis, figure: str, holds: Callable[[Test], bool]) -> list[str]:
    named = []
    for name, test in analysis.tests[figure].items():
        if holds(test):
            difference = text_of(analysis, figure, test.paired.difference.mean, signed=True)
            p = "" if test.p_holm is None else f", p {p_text(test.p_holm)}"
            named.append(f"{name} ({difference}{p})")
    return named


def _of_speed(analysis: Analysis) -> list[str]:
    baseline = analysis.comparison.baseline.name
    others = {name: speed for name, speed in analysis.speeds.items() if name != baseline}
    if not others:
        return []
    faster = [
        f"{name} ({ratio_text(speed.step_ratio)} of the steps)"
        for name, speed in others.items()
        if speed.is_faster and speed.step_ratio is not None
    ]
    never = [name for name, speed in others.items() if speed.n_reached < speed.n_seeds]
    lines = [
        f"Steps to the final validation loss of {baseline}: sooner, with an interval below 1: "
        f"{_and(faster) or 'none'}."
    ]
    if never:
        lines.append(f"Not there with every seed by the last step: {_and(never)}.")
    return lines


def text_of(analysis: Analysis, figure: str, value: float, signed: bool = False) -> str:
    """A figure for people: scores that are shares of rights as percentages."""
    sign = "+" if signed else ""
    if figure == LOSS:
        return f"{value:{sign}.4f}"
    return f"{100 * value:{sign}.1f} %" if analysis.comparison.is_share(figure) else f"{value:{sign}.2f}"


def ratio_text(ratio: Summary | None) -> str:
    """A ratio with its interval."""
    if ratio is None:
        return "-"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.mean:.2f}"
    return f"{ratio.mean:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def p_text(p: float) -> str:
    """A p value for people."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _and(names: Sequence[str]) -> str:
    return ", ".join(names)
