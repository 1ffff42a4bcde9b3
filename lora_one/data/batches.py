"""Batches: micro-batches that carry the exact weight of every example in their optimiser step.

A *window* is the set of examples of one optimiser step (``model.real_batch_size``), or the whole
sample of a gradient estimate, or a validation split. Its loss is a weighted sum over target tokens,
and each example's weight is known before the first forward pass. So any cutting of a window into
micro-batches and processes adds up to the same loss and the same gradient.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lora_one.data.encoding import Encoded

IGNORED = -100
Slot = tuple[int, float]  # index of the example (-1: an empty slot), weight of its target tokens
Batch = dict[str, Tensor]


def window_weights(examples: Sequence[Encoded], indices: Sequence[int], reduction: str) -> list[float]:
    """Weight of each target token of each example in the loss of the window ``indices``.

    Args:
        examples: The split.
        indices: The window's examples.
        reduction: ``sample``, the mean over examples of each example's mean token loss (what the
            published programs compute at batch size 1), or ``token``, the mean over all tokens.
    """
    if reduction == "sample":
        return [1 / (examples[index].n_target * len(indices)) for index in indices]
    total = sum(examples[index].n_target for index in indices)
    return [1 / total] * len(indices)


def collate(slots: Sequence[tuple[Encoded | None, float]], pad_id: int) -> Batch:
    """Right-pads examples into one batch.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels`` (B, T) int64 and ``weights`` (B,) float32.
    """
    ids_per_slot = [np.array([pad_id, pad_id]) if example is None else example.ids for example, _ in slots]
    length = max(len(ids) for ids in ids_per_slot)
    input_ids = np.full((len(slots), length), pad_id, dtype=np.int64)
    attention = np.zeros((len(slots), length), dtype=np.int64)
    labels = np.full((len(slots), length), IGNORED, dtype=np.int64)
    for row, ((example, _), ids) in enumerate(zip(slots, ids_per_slot, strict=True)):
        input_ids[row, : len(ids)] = ids
        attention[row, : len(ids)] = 1
        if example is not None:
            labels[row, example.n_prompt : len(ids)] = ids[example.n_prompt :]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention),
        "labels": torch.from_numpy(labels),
        "weights": torch.tensor([weight for _, weight in slots], dtype=torch.float32),
    }


def whole_window(
    examples: Sequence[Encoded],
    indices: Sequence[int],
    *,
    batch_size: int,
    reduction: str,
    pad_id: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[list[Slot]]:
    """This process's micro-batches of one window; over all processes they hold it exactly once."""
    weights = window_weights(examples, indices, reduction)
    slots = list(zip(indices, weights, strict=True))
    batches = [slots[start : start + batch_size] for start in range(0, len(slots), batch_size)]
    return batches[rank::world_size]


class WindowSampler(Sampler[list[Slot]]):
    """Micro-batches of the training windows of one epoch, for one process.

    The order is a permutation drawn from (seed, epoch). Every window is dealt out to the processes
    in turn; the last window of an epoch may be smaller, its empty slots carry no loss.
    """

    def __init__(
        self,
        examples: Sequence[Encoded],
        *,
        real_batch_size: int,
        per_device_batch_size: int,
        reduction: str,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.examples = examples
        self.real_batch_size = real_batch_size
        self.per_device_batch_size = per_device_batch_size
        self.reduction = reduction
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Selects the permutation of the next iteration; the Trainer calls this when it resumes."""
        self.epoch = epoch

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one process in one optimiser step."""
        return self.real_batch_size // (self.per_device_batch_size * self.world_size)

    @property
    def n_windows(self) -> int:
        """Optimiser steps of one epoch."""
        return -(-len(self.examples) // self.real_batch_size)

    def __len__(self) -> int:
        return self.n_windows * self.accumulation_steps

    def __iter__(self) -> Iterator[list[Slot]]:
        for indices in self.windows():
            weights = window_weights(self.examples, indices, self.reduction)
            mine = list(zip(indices, weights, strict=True))[self.rank :: self.world_size]
            for step in range(self.accumulation_steps):
                start = step * self.per_device_batch_size
                yield mine[start : start + self.per_device_batch_size] or [(-1, 0.0)]

    def windows(self) -> Iterator[list[int]]:
        """The windows of the current epoch, as indices into the split."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.examples)).tolist()
        for start in range(0, len(order), self.real_batch_size):
            yield order[start : start + self.real_batch_size]


class WindowLoader(DataLoader):
    """A data loader over a ``WindowSampler``."""

    def __init__(self, sampler: WindowSampler, pad_id: int) -> None:
        self.windows = sampler
        super().__init__(
            _Slots(sampler.examples),
            batch_sampler=sampler,
            collate_fn=lambda slots: collate(slots, pad_id),
            # Its own generator: iterating must not draw from the one that dropout uses.
            generator=torch.Generator().manual_seed(sampler.seed),
        )

    def set_epoch(self, epoch: int) -> None:
        """Selects the permutation of the next iteration."""
        self.windows.set_epoch(epoch)


class _Slots(torch.utils.data.Dataset):
    def __init__(self, examples: Sequence[Encoded]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, slot: Slot) -> tuple[Encoded | None, float]:
        index, weight = slot
        return (None if index < 0 else self.examples[index]), weight
