"""The probes of a training: looked at before chosen optimiser steps, kept in ``probes.jsonl``.

A step is looked at after it was taken: the weights that it began from are put back for a moment, so that the
gradient there can be set beside what the step did. Nothing that the training reads is changed.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from lora_one.combinations import FACTOR_PROBES
from lora_one.config import ExperimentConfig
from lora_one.data.encoding import Encoded
from lora_one.inits import AdapterInit
from lora_one.losses import to_device
from lora_one.probes.layers import Held
from lora_one.probes.looks import Looker, States
from lora_one.probes.passes import probe_batch
from lora_one.processes import Processes
from lora_one.tracking import MetricsFile, Tracker

FILE = "probes.jsonl"


class Probes(TrainerCallback):
    """Looks before step 0, every ``probes.every`` steps, and after the last.

    A step that moves nothing, as the first of a warm-up, is followed by a look at the next.

    Args:
        looker: Looks at the model.
        every: Steps between two looks.
        folder: The run's folder.
        tracker: Receives the figures over all layers.
    """

    def __init__(self, looker: Looker, every: int, folder: Path, tracker: Tracker) -> None:
        self.looker, self.every, self.path, self.tracker = looker, every, folder / FILE, tracker
        self._file: MetricsFile | None = None
        self._held: Held | None = None
        self._again = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Goes on where the training does; looks at steps that are taken again are made again."""
        self._file = MetricsFile(self.path, keep_through_step=state.global_step - 1)
        if state.global_step > 0:
            self.looker.go_on()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keeps the weights where a look is due."""
        if state.global_step % self.every == 0 or self._again:
            self._held = Held(self.looker.model)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Looks at the step that was taken, from where it began."""
        if self._held is None:
            return
        after = self.looker.states()
        with self._held.in_place():
            self._look(state.global_step - 1, after, optimizer, _clipped_to(args, state))
        self._held = None

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Looks at the weights that the training ends with; no step follows."""
        if state.global_step == state.max_steps:
            self._look(state.global_step, None, optimizer, _clipped_to(args, state))

    def _look(self, step: int, after: States | None, optimizer: Any, clipped_to: float) -> None:
        assert self._file is not None
        begin = time.perf_counter()
        try:
            rows = self.looker.look(step, after, optimizer, clipped_to)
        except torch.linalg.LinAlgError:
            return  # of numbers that are none; the training itself ends with the step's name
        self._again = rows.is_still("update/cosine_gradient")
        totals, seconds = rows.over_layers(), round(time.perf_counter() - begin, 3)
        self._file.append({"step": step, "seconds": seconds, "totals": totals, "layers": rows.by_layer()})
        points = {f"probes/{key}": value for key, value in totals.items() if value is not None}
        self.tracker.log(points, step=step)


def _clipped_to(args: Any, state: Any) -> float:
    """The share that clipping left of the last logged gradient."""
    norms = (entry["grad_norm"] for entry in reversed(state.log_history) if "grad_norm" in entry)
    norm = next(norms, 0.0)
    return min(1.0, args.max_grad_norm / norm) if norm > 0 else 1.0


def start_probes(
    config: ExperimentConfig,
    model: Any,
    starts: Mapping[str, AdapterInit],
    examples: tuple[Encoded, ...],
    *,
    pad_id: int,
    processes: Processes,
    folder: Path,
    tracker: Tracker,
) -> Probes | None:
    """The probes that the configuration asks for, on the main process: all have the same weights.

    Args:
        config: The experiment.
        model: As it will be trained.
        starts: The adapters' starts.
        examples: The encoded training split, from which the fixed sample is drawn.
        pad_id: Padding token.
        processes: Who trains together.
        folder: The run's folder.
        tracker: Receives the figures over all layers.

    Raises:
        UserError: If ``probes.reference`` cannot be compared with.
    """
    asked = config.probes
    if not asked.is_on or not processes.is_main:
        return None
    left_out = sorted(FACTOR_PROBES & set(asked.names))
    if left_out and not config.peft.use_peft:
        print(f"note: full fine-tuning has no factors, so these probes are left out: {', '.join(left_out)}")
    batch = probe_batch(examples, asked.n_examples, config.model.loss_reduction, config.seed, pad_id)
    looker = Looker(config, model, starts, to_device(batch, processes.device), folder)
    return Probes(looker, asked.every, folder, tracker)
