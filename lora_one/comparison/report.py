"""The report of a comparison: Markdown for people, JSON for programs, figures for both."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_one.comparison.analysis import Analysis, analyse
from lora_one.comparison.figures import draw
from lora_one.comparison.results import Comparison, Method, Trial
from lora_one.comparison.verdict import p_text, ratio_text, text_of, verdict
from lora_one.files import write_text
from lora_one.summaries import Summary
from lora_one.tables import markdown_table

_SPLITS = {"train": "train on", "validation": "validate", "test": "test"}
CLAIM = "The LoRA-GA paper claims that it converges 2 to 4 times as fast as LoRA: a ratio of 0.25 to 0.5."


def write_report(comparison: Comparison, folder: Path) -> str:
    """Writes ``report.md``, ``report.json`` and the figures.

    Args:
        comparison: What the records say.
        folder: Made where it is missing.

    Returns:
        What is printed at the end: the verdict, and where the report is.
    """
    analysis = analyse(comparison)
    folder.mkdir(parents=True, exist_ok=True)
    figures = draw(analysis, folder)
    write_text(folder / "report.md", markdown(analysis, figures))
    write_text(folder / "report.json", json.dumps(as_tree(analysis), indent=2, allow_nan=False) + "\n")
    return "\n".join([*verdict(analysis), f"report: {folder / 'report.md'}"])


def markdown(analysis: Analysis, figures: Sequence[str]) -> str:
    """The report for people.

    Args:
        analysis: Its numbers.
        figures: File names of the figures, beside it.
    """
    comparison = analysis.comparison
    parts = [
        f"# Methods at their own best learning rates: {comparison.setup['dataset']}, "
        f"{comparison.setup['model']}",
        _protocol(comparison),
        "## Verdict\n\n" + "\n".join(f"- {line}" for line in verdict(analysis)),
        "## Figures over seeds\n\nMean ± standard deviation (95 % t interval).\n\n"
        + _figures_table(analysis),
        f"## Against {comparison.baseline.name}\n\nPaired over seeds: mean difference (95 % t interval), and "
        "p of the t-test after Holm's correction for the number of methods.\n\n" + _tests_table(analysis),
        f"## Steps to the loss of {comparison.baseline.name}\n\n" + _speed_text(analysis),
        "## Cost\n\nMeans over seeds. A gradient from the cache counts with what it took to make.\n\n"
        + _cost_table(comparison),
        "## Tuning\n\n" + _tuning(comparison),
        "## Methods\n\nWhat each has of its own.\n\n" + _own_settings(comparison),
        "\n\n".join(f"![{name}]({name})" for name in figures),
    ]
    if missing := [f"- {m.name}: {what}" for m in comparison.methods for what in m.missing]:
        parts.insert(2, "## Missing\n\n" + "\n".join(missing))
    return "\n\n".join(parts) + "\n"


def _protocol(comparison: Comparison) -> str:
    setup, settings = comparison.setup, comparison.settings
    machine = setup["hardware"]
    where = ", ".join(machine["gpus"]) or f"{machine['threads']} CPU threads"
    rows = setup["rows"]
    counts = ", ".join(f"{rows.get(split, '?')} to {use}" for split, use in _SPLITS.items())
    return (
        f"Rank {setup['rank']}, {setup['steps']} steps of {setup['batch']} examples, where a method has no "
        f"others of its own (listed below); rows: {counts}. "
        f"Learning rates ({settings.per_decade} a decade) and γ of the gradient starts were chosen by the "
        f"validation loss of {_seeds(settings.tuning_seeds)}, from a grid that grows while its best is at an "
        f"edge; then {_seeds(settings.seeds)} ran at the best setting, and nothing was chosen by their "
        f"results. {where}, code {', '.join(setup['commits'])}."
    )


def _own_settings(comparison: Comparison) -> str:
    methods = comparison.settings.methods
    names = [method.name for method in comparison.methods]
    return "\n".join(
        f"- {name}: `{' '.join(methods[name])}`" if methods[name] else f"- {name}" for name in names
    )


def _figures_table(analysis: Analysis) -> str:
    names, comparison = list(analysis.figures), analysis.comparison
    rows = [["method", "rate", "γ", "runs tuned", "n", *(comparison.title(name) for name in names)]]
    for method in analysis.comparison.methods:
        cells = [
            _spread(analysis, name, found) if (found := analysis.figures[name].get(method.name)) else "-"
            for name in names
        ]
        rows.append(
            [method.name, *_setting(method), str(method.n_tuning_runs), str(len(method.finals)), *cells]
        )
    return markdown_table(rows)


def _spread(analysis: Analysis, figure: str, found: Summary) -> str:
    text = text_of(analysis, figure, found.mean)
    if found.std is None or found.low is None or found.high is None:
        return text
    low, high = (text_of(analysis, figure, value) for value in (found.low, found.high))
    return f"{text} ± {text_of(analysis, figure, found.std)} ({low} to {high})"


def _setting(method: Method) -> list[str]:
    if method.best is None:
        return ["-", "-"]
    return [f"{method.best.rate:.2g}", "-" if method.best.gamma is None else f"{method.best.gamma:g}"]


def _tests_table(analysis: Analysis) -> str:
    figures = [name for name in analysis.tests if analysis.tests[name]]
    rows = [["method", *(column for name in figures for column in (analysis.comparison.title(name), "p"))]]
    for method in analysis.comparison.methods:
        if method is analysis.comparison.baseline:
            continue
        cells = []
        for name in figures:
            test = analysis.tests[name].get(method.name)
            if test is None:
                cells += ["-", "-"]
                continue
            difference = test.paired.difference
            text = text_of(analysis, name, difference.mean, signed=True)
            if difference.low is not None and difference.high is not None:
                ends = (
                    text_of(analysis, name, end, signed=True) for end in (difference.low, difference.high)
                )
                text += f" ({' to '.join(ends)})"
            cells += [text, "-" if test.p_holm is None else p_text(test.p_holm)]
        rows.append([method.name, *cells])
    return markdown_table(rows)


def _speed_text(analysis: Analysis) -> str:
    baseline = analysis.comparison.baseline
    if analysis.target is None:
        return f"{baseline.name} has no result."
    rows = [
        ["method", "steps", "seeds there", "steps / those of the baseline", "seconds / those of the baseline"]
    ]
    for method in analysis.comparison.methods:
        speed = analysis.speeds[method.name]
        rows.append(
            [
                method.name,
                "-" if speed.steps is None else f"{speed.steps:.0f}",
                f"{speed.n_reached} of {speed.n_seeds}",
                ratio_text(speed.step_ratio),
                ratio_text(speed.time_ratio),
            ]
        )
    return (
        f"Steps: where the mean curve first comes to {analysis.target:.4f}, the mean final validation loss "
        f"of {baseline.name}. Ratios: seed by seed to the final loss of {baseline.name} with the same seed, "
        "geometric mean (95 % t interval of the logarithms); seconds hold the start, and the validations. "
        f"Between two measurements a curve is a straight line. {CLAIM}\n\n" + markdown_table(rows)
    )


def _cost_table(comparison: Comparison) -> str:
    rows = [["method", "trainable parameters", "init s", "init peak GB", "train s", "train peak GB"]]
    for method in comparison.methods:
        runs = list(method.finals.values())
        if not runs:
            rows.append([method.name])
            continue
        rows.append(
            [
                method.name,
                f"{runs[0].trainable:,}",
                f"{fmean(run.init_seconds for run in runs):.1f}",
                _gigabytes([run.init_bytes for run in runs]),
                f"{fmean(run.train_seconds for run in runs):.1f}",
                _gigabytes([run.train_bytes for run in runs]),
            ]
        )
    return markdown_table(rows)


def _gigabytes(peaks: Sequence[float]) -> str:
    return f"{fmean(peaks) / 1e9:.2f}" if any(peaks) else "-"


def _tuning(comparison: Comparison) -> str:
    lines = []
    for method in comparison.methods:
        gammas = list(dict.fromkeys(trial.gamma for trial in method.trials))
        for gamma in gammas:
            mine = [trial for trial in method.trials if trial.gamma == gamma]
            tried = ", ".join(f"{trial.rate:.2g}: {_loss_text(trial)}" for trial in mine)
            lines.append(f"- {method.name}{'' if gamma is None else f', γ {gamma:g}'}: {tried}")
        lines += [f"- {method.name}: {remark}" for remark in method.remarks]
    return "Validation loss by learning rate.\n\n" + "\n".join(lines)


def _loss_text(trial: Trial) -> str:
    if math.isnan(trial.loss):
        return "failed"
    return "diverged" if math.isinf(trial.loss) else f"{trial.loss:.4f}"


def as_tree(analysis: Analysis) -> dict[str, Any]:
    """The report for programs; what diverged or failed has that word for its loss."""
    comparison = analysis.comparison
    return {
        "setup": dict(comparison.setup),
        "settings": comparison.settings.model_dump(),
        "verdict": verdict(analysis),
        "target_validation_loss": analysis.target,
        "figures": {f: {n: asdict(s) for n, s in of.items()} for f, of in analysis.figures.items()},
        "against_baseline": {f: {n: asdict(t) for n, t in of.items()} for f, of in analysis.tests.items()},
        "speed": {name: asdict(speed) for name, speed in analysis.speeds.items()},
        "methods": [_method_tree(method) for method in comparison.methods],
    }


def _method_tree(method: Method) -> dict[str, Any]:
    trials = [
        asdict(trial) | {"loss": trial.loss if math.isfinite(trial.loss) else _loss_text(trial)}
        for trial in method.trials
    ]
    return asdict(method) | {"trials": trials, "finals": [asdict(run) for run in method.finals.values()]}


def _seeds(numbers: Sequence[int]) -> str:
    return f"seed{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
