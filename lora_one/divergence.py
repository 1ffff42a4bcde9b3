"""A training whose numbers are no numbers any more ends at once."""

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lora_one.checkpoints import name_last
from lora_one.errors import DivergedError
from lora_one.steps import Steps

_FIGURES = {"loss": "training loss", "grad_norm": "gradient norm", "eval_loss": "validation loss"}
_MOST_NAMED = 16  # examples


class StopOnDivergence(TrainerCallback):
    """Ends a run at the first loss or gradient that is not finite, before a checkpoint keeps its weights."""

    def __init__(self, steps: Steps, folder: Path) -> None:
        self.steps = steps
        self.folder = folder

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Raises DivergedError with the step, its examples and the last good checkpoint."""
        for key, name in _FIGURES.items():
            if key == "grad_norm" and (control.should_evaluate or args.fp16):
                continue  # the validation loss that comes now shows what the step did; float16 skips the step
            if not math.isfinite((logs or {}).get(key, 0.0)):
                seen = "" if key == "eval_loss" else f" ({self._examples(state.global_step - 1)})"
                raise DivergedError(
                    f"step {state.global_step}: the {name} is {logs[key]}; lower model.learning_rate, use "
                    f"model.bf16=false, or check the data{seen}; the last good checkpoint is "
                    f"{name_last(self.folder)}; the run is kept as failed"
                )

    def _examples(self, step: int) -> str:
        rows = self.steps.examples(step)
        more = f" and {len(rows) - _MOST_NAMED} more" if len(rows) > _MOST_NAMED else ""
        named = ", ".join(str(row) for row in rows[:_MOST_NAMED])
        return f"examples {named}{more} of the encoded training split"
