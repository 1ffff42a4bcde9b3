"""What happens beside the steps of a training: its bar, its log, its early end."""

import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from lora_one.progress import progress_bar
from lora_one.steps import Steps
from lora_one.tracking import MetricsFile, Tracker


class AdaLora(TrainerCallback):
    """Moves AdaLoRA's rank budget between the layers, while the gradients of the step are there."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Before the gradients go."""
        model.base_model.update_and_allocate(state.global_step)


class EarlyStopping(TrainerCallback):
    """Stops after ``patience`` validation losses without a new best.

    It reads the logged history, which checkpoints hold, and so goes on where it was.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Asks for the end when the patience has run out."""
        if self.is_over(state.log_history):
            control.should_training_stop = control.should_save = True

    def is_over(self, log_history: list[dict[str, float]]) -> bool:
        """Whether the patience has run out."""
        losses = [entry["eval_loss"] for entry in log_history if "eval_loss" in entry]
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= self.patience


class PruneAbove(TrainerCallback):
    """Ends the run at a validation loss above a limit, with a checkpoint: a higher limit goes on from it.

    Attributes:
        reason: Why it did, else None.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.reason: str | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Asks for the end, unless it has come anyway."""
        if metrics["eval_loss"] > self.limit and state.global_step < state.max_steps:
            control.should_training_stop = control.should_save = True
            self.reason = (
                f"pruned after step {state.global_step} of {state.max_steps}: the validation loss "
                f"{metrics['eval_loss']:.4g} is above model.prune_above={self.limit:g}"
            )


class KeepBest(TrainerCallback):
    """Asks for a checkpoint at every new lowest validation loss."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Asks for it."""
        if best_step(state.log_history) == state.global_step:
            control.should_save = True


def best_step(log_history: list[dict[str, Any]]) -> int | None:
    """The step of the lowest validation loss, the first of equals; None without any."""
    evaluated = [entry for entry in log_history if "eval_loss" in entry]
    best = min(evaluated, key=lambda entry: entry["eval_loss"], default=None)
    return best["step"] if best else None


class Progress(TrainerCallback):
    """A bar with loss, learning rate, tokens and steps per second, and time left."""

    def __init__(self, n_steps: int, steps: Steps, enabled: bool) -> None:
        self.n_steps = n_steps
        self.steps = steps
        self.enabled = enabled
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Opens the bar where the training stands."""
        start, total = state.global_step, self.n_steps
        self.bar = progress_bar(shown=self.enabled, total=total, initial=start, desc="train", unit="step")
        self.begin, self.n_tokens = time.perf_counter(), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Moves the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Shows the figures."""
        if self.bar is None or not logs:
            return
        if "loss" in logs:
            self.n_tokens += self.steps.tokens(state.global_step - 1, state.global_step)
            figures = {
                "loss": f"{logs['loss']:.4f}",
                "lr": f"{logs['learning_rate']:.1e}",
                "tokens/s": f"{self.n_tokens / (time.perf_counter() - self.begin):,.0f}",
            }
            self.bar.set_postfix(figures, refresh=False)
        elif "eval_loss" in logs and self.enabled:
            test = f", exact match {logs['eval_exact_match']:.1%}" if "eval_exact_match" in logs else ""
            self.bar.write(f"step {state.global_step}: validation loss {logs['eval_loss']:.4f}{test}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ends the bar."""
        self.close()

    def close(self) -> None:
        """Ends the bar's line: what is printed next, perhaps an error, begins its own."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Log(TrainerCallback):
    """Every step to ``metrics.jsonl``, every ``logging_steps``-th to the tracker."""

    def __init__(self, metrics: MetricsFile, tracker: Tracker, every: int) -> None:
        self.metrics = metrics
        self.tracker = tracker
        self.every = every
        self.start = time.perf_counter() - metrics.kept_seconds

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Writes one point."""
        known = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_exact_match")
        point = {key: float(logs[key]) for key in known if key in logs}
        if not point:
            return
        seconds = round(time.perf_counter() - self.start, 3)
        row = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6), **point, "seconds": seconds}
        self.metrics.append(row)
        if "eval_loss" in point or state.global_step % self.every == 0:
            self.tracker.log(point, step=state.global_step)
