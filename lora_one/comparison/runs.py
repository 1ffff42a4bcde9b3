"""The runs of a comparison: their settings, and what their records say."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one.comparison.search import FAILED, Point
from lora_one.comparison.settings import Settings, format_value
from lora_one.config import ExperimentConfig
from lora_one.overrides import named_keys
from lora_one.records import read_record, run_id

Compose = Callable[[Sequence[str]], ExperimentConfig]
_GRADED = ("task", "limit", "max_new_tokens", "temperature", "top_p")
# Settings that look at validation losses on the way: then tuning measures them as the final runs do.
_LOOK = ("keep_best", "early_stopping_patience", "prune_above")


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        method: Its name in the comparison.
        point: Its setting.
        seed: Its seed.
        overrides: What makes it, as Hydra reads it.
        config: What these overrides come to.
    """

    method: str
    point: Point
    seed: int
    overrides: tuple[str, ...]
    config: ExperimentConfig

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(self.config.results_dir) / run_id(self.config)

    def record(self) -> dict[str, Any] | None:
        """What has been recorded of it."""
        return read_record(self.folder)

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to run: it has all its figures, or has diverged."""
        record = self.record()
        if record is None or record["status"] != "finished":
            return has_diverged(record)
        asked = self.config.eval.model_dump()
        is_same = all(record["config"]["eval"][key] == asked[key] for key in _GRADED)
        return is_same and all(name in record["metrics"] for name in self.config.eval.tasks)

    @property
    def loss(self) -> float:
        """The final validation loss: infinite where the run diverged or was pruned, NaN where it failed."""
        record = self.record()
        if has_diverged(record):
            return math.inf
        return record["metrics"]["validation_loss"] if record and record["status"] == "finished" else FAILED

    def trouble(self, errors: Mapping[str, str]) -> str:
        """Why there is no result.

        Args:
            errors: Run: what its job said; one that was refused leaves no record.
        """
        record = self.record()
        if record is None:
            return f"is missing: {errors.get(run_id(self.config), 'it was not begun')}"
        return f"is {record['status']}" + (f": {record['error']}" if record.get("error") else "")


def has_diverged(record: dict[str, Any] | None) -> bool:
    """Whether a run ended in numbers that are none, or was pruned."""
    return record is not None and (
        record["status"] == "pruned" or bool(record.get("training", {}).get("diverged"))
    )


class Cells:
    """Makes the runs of a comparison; each is composed, and so checked, once."""

    def __init__(self, settings: Settings, arguments: Sequence[str], compose: Compose) -> None:
        """Composes one run of every method.

        Args:
            settings: Of the comparison.
            arguments: Overrides of the command line, for all runs.
            compose: From overrides to a checked configuration.

        Raises:
            UserError: If a method's overrides cannot be.
        """
        self.settings = settings
        self._compose = compose
        self._cells: dict[tuple[str, ...], Cell] = {}
        self._shared: dict[str, list[str]] = {}
        self.examples: dict[str, ExperimentConfig] = {}
        for name, overrides in settings.chosen.items():
            plain = [a for a in arguments if not a.lstrip("+").startswith(("peft.", "init."))]
            kind = compose([*plain, *overrides])
            given = [a for a in arguments if _has_effect(a, kind)]
            self._shared[name] = given
            self.examples[name] = kind if given == plain else compose([*given, *overrides])

    def tuning(self, method: str, point: Point) -> list[Cell]:
        """The runs that find out how good a setting is; they do not see the test split."""
        kept = [a for a in self._shared[method] if not a.lstrip("+").startswith("eval.")]
        looks = any(getattr(self.examples[method].model, key) for key in _LOOK)
        if not looks:
            kept = [a for a in kept if not a.lstrip("+").startswith("model.eval_epochs")]
        extra = ["++eval.task=null", "++eval.tasks=[]"]
        extra += self._cadence(kept) if looks else ["++model.eval_points=1"]
        return [self._cell(method, point, seed, kept, extra) for seed in self.settings.tuning_seeds]

    def final(self, method: str, point: Point) -> list[Cell]:
        """The runs that are reported."""
        kept = self._shared[method]
        return [self._cell(method, point, seed, kept, self._cadence(kept)) for seed in self.settings.seeds]

    def _cadence(self, kept: Sequence[str]) -> list[str]:
        points = self.settings.eval_points
        is_given = "model.eval_epochs" in named_keys(list(kept))
        return [] if points is None or is_given else [f"++model.eval_points={points}"]

    def _cell(self, method: str, point: Point, seed: int, kept: Sequence[str], extra: Sequence[str]) -> Cell:
        own = [f"++model.learning_rate={format_value(point.rate)}", f"++seed={seed}", *extra]
        if point.gamma is not None:
            own.append(f"++init.stable_gamma={format_value(point.gamma)}")
        named = {a.split("=", 1)[0] for a in own}
        shared = [a for a in kept if a.split("=", 1)[0] not in named]
        overrides = (*shared, *self.settings.chosen[method], *own)
        if overrides not in self._cells:
            self._cells[overrides] = Cell(method, point, seed, overrides, self._compose(overrides))
        return self._cells[overrides]


def _has_effect(argument: str, kind: ExperimentConfig) -> bool:
    """Whether an override for all methods is one for this kind of method too."""
    key = argument.lstrip("+")
    if key.startswith("peft."):
        return kind.peft.use_peft
    if key.startswith("init."):
        return kind.peft.use_peft and kind.init.mode == "gradient"
    return True
