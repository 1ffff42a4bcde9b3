"""Being asked to stop, by SIGTERM or SIGUSR1, which is how Slurm and other schedulers ask.

Anywhere but in training the first signal ends the program where it is, and nothing is lost. Training first
finishes its optimiser step, and a validation that is due with it, and keeps a checkpoint. Either way the exit
code says that the run is unfinished and that the same command goes on.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from lora_one.processes import Processes

UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h: not an error, try again
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# By which submitit tells its jobs that their time is up; it starts them again when we have stored all.
_SUBMITITS = signal.SIGUSR2
# A scheduler signals every process of a job, and a launcher among them forwards the signal to its workers.
_SAME_REQUEST_SECONDS = 3.0


class Unfinished(BaseException):
    """The program was asked to stop.

    Like ``KeyboardInterrupt`` it is no error, so that nothing that survives errors survives it.

    Attributes:
        reason: What stopped the run, and where.
        together: Whether all processes stop at this place.
        hand_on: What a launcher does with its own signal, to be called when all is stored.
    """

    def __init__(
        self, reason: str, outcome: str = "the same command goes on", together: bool = False
    ) -> None:
        super().__init__(f"{reason}; {outcome}")
        self.reason = reason
        self.together = together
        self.hand_on = _request.hand_on if _request.by == _SUBMITITS.name else None


@dataclass
class _Request:
    """What this process has been asked; signals belong to a whole process, and so does this."""

    by: str | None = None
    at: float = 0.0
    is_deferred: bool = False
    hand_on: Callable[[], None] | None = None
    pass_on: Callable[[], bool] | None = None

    def note(self, by: str) -> None:
        self.by, self.at = by, time.monotonic()


_request = _Request()


@contextmanager
def heeding_signals(pass_on: Callable[[], bool] | None = None) -> Iterator[None]:
    """Within it the signals raise ``Unfinished``; a second one ends the program on the spot.

    A signal that somebody else already takes, such as a launcher, stays theirs; that by which submitit ends
    a job comes to them after us.

    Args:
        pass_on: Sends the request to jobs in other processes, and says whether it did: then this
            one waits for them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may take signals
        return
    taken = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _on_signal)
    if pass_on is not None:
        _request.pass_on = pass_on
    theirs = signal.getsignal(_SUBMITITS)
    is_ours = theirs is _on_signal  # where it is heeded already, further out
    if is_submitits := "SUBMITIT_EXECUTOR" in os.environ and callable(theirs) and not is_ours:
        signal.signal(_SUBMITITS, _on_signal)
        _request.hand_on = lambda: theirs(_SUBMITITS, None)
    try:
        yield
    finally:
        if is_submitits:
            signal.signal(_SUBMITITS, theirs)
            _request.hand_on = None
        if pass_on is not None:
            _request.pass_on = None
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
        if taken or is_submitits:
            _request.by = None


class StopOnSignal(TrainerCallback):
    """Ends training after the optimiser step in which any process was asked to stop.

    Attributes:
        stopped: Whether it did.
    """

    def __init__(self, processes: Processes, keeps_checkpoints: bool) -> None:
        self.processes = processes
        self.keeps_checkpoints = keeps_checkpoints
        self.stopped = False
        self._step = self._n_steps = 0

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Within it signals wait for the end of a step.

        Raises:
            Unfinished: On leaving, if one came.
        """
        _request.is_deferred = True
        try:
            yield
        finally:
            _request.is_deferred = False
        if self.stopped:
            raise Unfinished(
                f"stopped by {_request.by} after step {self._step} of {self._n_steps}",
                "a checkpoint is kept, the same command goes on from it"
                if self.keeps_checkpoints
                else "AdaLoRA keeps no checkpoints, so the same command starts the training over",
                together=True,
            )
        if _request.by is not None:
            raise Unfinished(f"stopped by {_request.by}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All processes learn of a signal that any of them got, and stop at the same step."""
        if self._nobody_was_asked() or state.global_step >= state.max_steps:
            return
        if _request.by is None:
            _request.note("a signal to another process")
        self.stopped = control.should_training_stop = True
        control.should_save = self.keeps_checkpoints
        self._step, self._n_steps = state.global_step, state.max_steps

    def _nobody_was_asked(self) -> bool:
        return not self.processes.sum_(torch.tensor(float(_request.by is not None))).item()


def _on_signal(number: int, _: Any) -> None:
    if _request.pass_on is not None and _request.pass_on():
        return
    if _request.by is None:
        _request.note(signal.Signals(number).name)
        if not _request.is_deferred:
            raise Unfinished(f"stopped by {_request.by}")
    elif time.monotonic() - _request.at > _SAME_REQUEST_SECONDS:
        os._exit(UNFINISHED)
