"""Figures of a few runs, of which some may lack one, as text."""

from collections.abc import Sequence

from lora_one.summaries import Summary
from lora_one.summaries import summarise as summarise_known


def summarise(values: Sequence[float | None]) -> Summary | None:
    """The summary of what was measured; None of nothing."""
    known = [value for value in values if value is not None]
    return summarise_known(known) if known else None


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
    if summary is None or summary.low is None:
        return "-"
    return f"{form.format(summary.low)} … {form.format(summary.high)}"
