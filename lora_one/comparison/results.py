"""What the records of a comparison's runs say, method by method."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_one.comparison.runs import Cell
from lora_one.comparison.search import Plan, Point
from lora_one.comparison.settings import Settings
from lora_one.errors import UserError
from lora_one.reports.reading import init_seconds
from lora_one.tracking import read_metrics

_STARTS = ("gradient", "init")  # the stages between the pretrained model and the first step


@dataclass(frozen=True)
class Tuned:
    """A method's search: where it ended, and all that it tried."""

    plan: Plan
    tried: Mapping[Point, Sequence[Cell]]

    @property
    def best(self) -> Point | None:
        """The setting that is run over seeds; None if no run came to a loss."""
        return self.plan.best


@dataclass(frozen=True)
class Trial:
    """A setting that was tried while tuning; ``loss`` is infinite where it diverged, NaN where it failed."""

    rate: float
    gamma: float | None
    loss: float


@dataclass(frozen=True)
class Final:
    """One reported run.

    Attributes:
        seed: Its seed.
        loss: Final validation loss.
        scores: Figures of the test split and of benchmarks, by name; higher is better.
        curve: Step, validation loss, and seconds since training began.
        init_seconds: From the pretrained model to the first step; a gradient that was read from the cache
            counts with what it took to make.
        init_bytes: The process's peak memory in these stages.
        train_seconds: Of training, its validations included.
        train_bytes: Peak memory in training.
        trainable: Parameters that are trained.
        n_steps: Optimiser steps.
        threads: That the process computed with.
    """

    seed: int
    loss: float
    scores: Mapping[str, Mapping[str, Any]]
    curve: tuple[tuple[float, float, float], ...]
    init_seconds: float
    init_bytes: float
    train_seconds: float
    train_bytes: float
    trainable: int
    n_steps: int
    threads: int

    @property
    def by_step(self) -> list[tuple[float, float]]:
        """Step and validation loss."""
        return [(step, loss) for step, loss, _ in self.curve]

    @property
    def by_seconds(self) -> list[tuple[float, float]]:
        """Seconds, the start's included, and validation loss."""
        return [(self.init_seconds + seconds, loss) for _, loss, seconds in self.curve]


@dataclass(frozen=True)
class Method:
    """All of one method.

    Attributes:
        name: Its name.
        overrides: What makes it.
        best: Its setting.
        tuned_gamma: Whether γ was searched too.
        remarks: What a reader must know of its search.
        trials: Its search, in order of γ and rate.
        n_tuning_runs: Runs of the search.
        finals: Its reported runs, by seed.
        missing: Reported runs without a result, and why.
    """

    name: str
    overrides: Sequence[str]
    best: Point | None
    remarks: Sequence[str]
    trials: Sequence[Trial]
    n_tuning_runs: int
    finals: Mapping[int, Final]
    missing: Sequence[str]

    @property
    def losses(self) -> dict[int, float]:
        """Seed: final validation loss."""
        return {seed: run.loss for seed, run in self.finals.items()}

    def score(self, name: str) -> dict[int, float]:
        """Seed: figure, of the runs that have it."""
        return {seed: run.scores[name]["value"] for seed, run in self.finals.items() if name in run.scores}


@dataclass(frozen=True)
class Comparison:
    """All of a comparison.

    Attributes:
        settings: What was asked for.
        methods: In order.
        setup: Dataset, model and the settings that all share.
    """

    settings: Settings
    methods: Sequence[Method]
    setup: Mapping[str, Any]

    @property
    def baseline(self) -> Method:
        """The method that the others are held against."""
        return next(m for m in self.methods if m.name == self.settings.baseline)

    @property
    def scores(self) -> list[str]:
        """Names of the figures that any run has."""
        names = [name for method in self.methods for run in method.finals.values() for name in run.scores]
        return list(dict.fromkeys(names))

    def title(self, figure: str) -> str:
        """How a figure is called: a score with its metric."""
        runs = (run for method in self.methods for run in method.finals.values() if figure in run.scores)
        run = next(runs, None)
        metric = "" if run is None else str(run.scores[figure].get("metric", "")).replace("_", " ")
        return f"{figure} {metric}".strip()

    def is_share(self, score: str) -> bool:
        """Whether a score is a share of rights."""
        runs = (run for method in self.methods for run in method.finals.values() if score in run.scores)
        return bool(next(runs).scores[score].get("is_share", True))


def collect(
    settings: Settings,
    tuned: Mapping[str, Tuned],
    finals: Mapping[str, Sequence[Cell]],
    errors: Mapping[str, str],
) -> Comparison:
    """Reads the records.

    Args:
        settings: Of the comparison.
        tuned: The searches, by method.
        finals: The reported runs, by method.
        errors: Run: what its job said, where that ended with an error.

    Raises:
        UserError: If no reported run left a record.
    """
    methods = [_method(settings, name, found, finals.get(name, ()), errors) for name, found in tuned.items()]
    first = settings.baseline  # the header speaks of its runs
    order = sorted(finals, key=lambda name: name != first)
    records = [r for name in order for c in finals[name] if (r := c.record()) is not None]
    if not records:
        raise UserError("no final run left a record; the jobs' errors stand above")
    return Comparison(settings, methods, _setup(records))


def _method(
    settings: Settings, name: str, found: Tuned, cells: Sequence[Cell], errors: Mapping[str, str]
) -> Method:
    trials = [
        Trial(point.rate, point.gamma, sum(cell.loss for cell in tried) / len(tried))
        for point, tried in found.tried.items()
    ]
    failed = [
        f"tuning, {point}, seed {cell.seed} {cell.trouble(errors)}"
        for point, tried in found.tried.items()
        for cell in tried
        if math.isnan(cell.loss)
    ]
    done = {cell.seed: run for cell in cells if (run := _final(cell)) is not None}
    missing = [f"seed {cell.seed} {cell.trouble(errors)}" for cell in cells if cell.seed not in done]
    if found.best is None:
        missing = ["no setting of its search came to a validation loss"]
    return Method(
        name=name,
        overrides=settings.methods[name],
        best=found.best,
        remarks=found.plan.remarks,
        trials=sorted(trials, key=lambda trial: (trial.gamma or 0.0, trial.rate)),
        n_tuning_runs=sum(len(tried) for tried in found.tried.values()),
        finals=done,
        missing=[*failed, *missing],
    )


def _final(cell: Cell) -> Final | None:
    record = cell.record()
    if record is None or record["status"] != "finished":
        return None
    rows = [row for row in read_metrics(cell.folder / "metrics.jsonl") if "eval_loss" in row]
    stages, training = record["stages"], record["training"]
    scores = {
        name: figures
        for name, figures in record["metrics"].items()
        if isinstance(figures, dict) and name != "test_before"
    }
    return Final(
        seed=cell.seed,
        loss=record["metrics"]["validation_loss"],
        scores=scores,
        curve=tuple((row["step"], row["eval_loss"], row["seconds"]) for row in rows),
        init_seconds=init_seconds(record),
        init_bytes=max((_peak(stages[name]) for name in _STARTS if name in stages), default=0.0),
        train_seconds=training["seconds"],
        train_bytes=_peak(stages["training"]),
        trainable=training["trainable_parameters"],
        n_steps=training["n_steps"],
        threads=record["hardware"]["threads"],
    )


def _peak(stage: Mapping[str, float]) -> float:
    return stage.get("peak_gpu_bytes", stage["peak_resident_bytes"])


def _setup(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    record = next((r for r in records if r["status"] == "finished"), records[0])
    config = record["config"]
    commits = {str(r["code"].get("commit"))[:10] + "+" * bool(r["code"].get("dirty")) for r in records}
    return {
        "dataset": config["dataset"]["name"],
        "model": config["model"]["name"],
        "rank": config["peft"]["lora_r"],
        "batch": config["model"]["real_batch_size"],
        "steps": record["training"].get("n_steps"),
        "rows": record["data"].get("rows", {}),
        "hardware": record["hardware"],
        "commits": sorted(commits),
        "packages": record["packages"],
    }
