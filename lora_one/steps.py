"""Which examples an optimiser step saw, as the sampler deals them."""

import copy
from collections.abc import Sequence

from lora_one.data.batches import WindowSampler


class Steps:
    """The optimiser steps of a training, counted from zero over all epochs."""

    def __init__(self, sampler: WindowSampler) -> None:
        self._sampler = copy.copy(sampler)  # the Trainer sets the epoch of its own
        self._epoch: int | None = None
        self._windows: list[list[int]] = []

    def examples(self, step: int) -> Sequence[int]:
        """Row numbers in the encoded training split, of all processes."""
        epoch, window = divmod(step, len(self._sampler))
        if epoch != self._epoch:
            self._sampler.set_epoch(epoch)
            self._windows = list(self._sampler.windows())
            self._epoch = epoch
        return self._windows[window]

    def tokens(self, first: int, end: int) -> int:
        """Input tokens of the steps from ``first`` to before ``end``, padding not counted."""
        examples = self._sampler.examples
        return sum(len(examples[index].ids) for step in range(first, end) for index in self.examples(step))
