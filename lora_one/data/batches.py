"""Batches: micro-batches that carry the exact weight of every example in their optimiser step.

A *window* is the set of examples of one optimiser step (``model.real_batch_size``), or the whole
sample of a gradient estimate, or a validation split. Its loss is a weighted sum over target tokens,
and each example's weight is known before the first forward pass. So any cutting of a window into
micro-batches and processes adds up to the same loss and the same gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lora_one.data.encoding import Encoded

IGNORED = -100
Slot = tuple[int, float]  # index of the example (-1: an empty slot), weight of its target tokens
Batch = dict[str, Tensor]
EMPTY: Slot = (-1, 0.0)


@dataclass(frozen=True)
class Limits:
    """The size of a micro-batch.

    Attributes:
        max_tokens: Its tokens, padding included; a longer example is alone.
        max_examples: Its examples, instead.
        packed: Whether its examples stand in one row, without padding.
    """

    max_tokens: int | None = None
    max_examples: int | None = None
    packed: bool = False

    def __str__(self) -> str:
        what = f"{self.max_tokens:,} tokens" if self.max_tokens else f"{self.max_examples} examples"
        return f"at most {what}" + (", packed" if self.packed else "")


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


def split_window(
    examples: Sequence[Encoded], indices: Sequence[int], *, limits: Limits, reduction: str, world_size: int
) -> list[list[list[Slot]]]:
    """The micro-batches of one window, of every process: all have as many, of about the same size.

    Examples of similar length come together, longest first; packed, what makes equal shares. Empty
    micro-batches fill up the last round, because sharded models and collective steps wait for each other.
    """
    weights = dict(zip(indices, window_weights(examples, indices, reduction), strict=True))
    by_length = sorted(indices, key=lambda index: -len(examples[index].ids))
    if limits.packed and limits.max_tokens is not None:
        shares = _shares_of_tokens(by_length, examples, limits.max_tokens, world_size)
    else:
        shares = _shares_by_length(by_length, examples, limits, world_size)
    return [[[(index, weights[index]) for index in group] or [EMPTY] for group in share] for share in shares]


def _shares_by_length(
    by_length: list[int], examples: Sequence[Encoded], limits: Limits, world_size: int
) -> list[list[list[int]]]:
    """Groups of similar length, the costliest first to the process with the least to do that has room."""
    costed = [
        (_n_padded([examples[index].widths for index in group]), group)
        for group in _even_groups(by_length, examples, limits, world_size)
    ]
    n_batches = -(-len(costed) // world_size)
    shares: list[list[list[int]]] = [[] for _ in range(world_size)]
    to_do = [0] * world_size
    for cost, group in sorted(costed, key=lambda pair: -pair[0]):
        with_room = [rank for rank in range(world_size) if len(shares[rank]) < n_batches]
        idlest = min(with_room, key=lambda rank: to_do[rank])
        shares[idlest].append(group)
        to_do[idlest] += cost
    return [share + [[]] * (n_batches - len(share)) for share in shares]


def _n_padded(widths: Sequence[tuple[int, int]]) -> int:
    return len(widths) * (max(width for width, _ in widths) + max(other for _, other in widths))


def _shares_of_tokens(
    by_length: list[int], examples: Sequence[Encoded], max_tokens: int, world_size: int
) -> list[list[list[int]]]:
    """Packed rows have no padding for equal lengths to spare: all get about as many tokens instead."""
    n_tokens = {index: examples[index].widths[0] for index in by_length}
    shares = _bins(by_length, n_tokens, world_size)
    for n_batches in count(1):
        batches = [_bins(share, n_tokens, n_batches) for share in shares]
        groups = [group for share in batches for group in share]
        if all(len(group) < 2 or sum(n_tokens[index] for index in group) <= max_tokens for group in groups):
            return batches
    raise AssertionError("every example alone fits")


def _bins(by_length: list[int], n_tokens: dict[int, int], n_bins: int) -> list[list[int]]:
    """Bins of about as many tokens: each example, longest first, goes where there are the fewest."""
    bins: list[list[int]] = [[] for _ in range(n_bins)]
    filled = [0] * n_bins
    for index in by_length:
        emptiest = filled.index(min(filled))
        bins[emptiest].append(index)
        filled[emptiest] += n_tokens[index]
    return bins


def _even_groups(
    by_length: list[int], examples: Sequence[Encoded], limits: Limits, world_size: int
) -> list[list[int]]:
    """As few groups as the limits and the number of processes allow, the largest as small as can be."""
    if limits.max_tokens is None:
        assert limits.max_examples is not None
        rounds = -(-len(by_length) // (limits.max_examples * world_size))
        size = -(-len(by_length) // (rounds * world_size))
        return [by_length[start : start + size] for start in range(0, len(by_length), size)]
    widths = [examples[index].widths for index in by_length]
    rounds = -(-len(_cuts(widths, limits.max_tokens)) // world_size)
    low, high = 1, limits.max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_cuts(widths, middle)) <= rounds * world_size:
            high = middle
        else:
            low = middle + 1
    cuts = [*_cuts(widths, high), len(by_length)]
    return [by_length[start:end] for start, end in pairwise(cuts)]


def _cuts(widths: Sequence[tuple[int, int]], max_tokens: int) -> list[int]:
    """Where the groups start if each takes all that it can hold, in the given order."""
    starts, widest = [0], (0, 0)
    for position, (width, other) in enumerate(widths):
        first = starts[-1]
        widest = max(widest[0], width), max(widest[1], other)
        if (position - first + 1) * sum(widest) > max_tokens and position > first:
            starts.append(position)
            widest = width, other
    return starts


def collate(slots: Sequence[tuple[Encoded, float]], pad_id: int, *, packed: bool = False) -> Batch:
    """Makes one batch of examples, each with the weight of its target tokens.

    Returns:
        ``input_ids``, ``attention_mask`` (B, T) int64, right-padded; ``labels`` of the same shape, or with
        pairs (B, T of the decoder); ``positions`` (N,) int64, the places in the flattened output whose
        prediction is judged; ``targets`` (N,) int64, the tokens they should predict; ``weights`` (N,)
        float32. Packed, B is 1, and instead of a mask there are ``position_ids`` (1, T), starting again at
        every example, and ``lengths`` of the examples, int64.
    """
    examples = [example for example, _ in slots]
    is_pair = examples[0].is_pair
    inputs = [example.ids[: example.n_prompt] if is_pair else example.ids for example in examples]
    labels = [_labels(example) for example in examples]
    if packed:
        inputs_BT, labels_BT = np.concatenate(inputs)[None], np.concatenate(labels)[None]
    else:
        inputs_BT, labels_BT = _padded(inputs, pad_id), _padded(labels, IGNORED)
    predicted_BT = labels_BT
    if not is_pair:  # the output at one place predicts the token at the next
        predicted_BT = np.full_like(labels_BT, IGNORED)
        predicted_BT[:, :-1] = labels_BT[:, 1:]
    predicted = predicted_BT.reshape(-1)
    positions = np.flatnonzero(predicted != IGNORED)
    weights = np.repeat([weight for _, weight in slots], [max(0, example.n_target) for example in examples])
    batch = {
        "input_ids": torch.from_numpy(inputs_BT),
        "labels": torch.from_numpy(labels_BT),
        "positions": torch.from_numpy(positions),
        "targets": torch.from_numpy(predicted[positions]),
        "weights": torch.from_numpy(weights.astype(np.float32)),
    }
    lengths = [len(ids) for ids in inputs]
    if packed:
        batch["lengths"] = torch.tensor(lengths)
        batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    else:
        places = np.arange(inputs_BT.shape[1])
        batch["attention_mask"] = torch.from_numpy((places < np.array(lengths)[:, None]).astype(np.int64))
    return batch


def _labels(example: Encoded) -> np.ndarray:
    if example.is_pair:
        return example.ids[example.n_prompt :]
    labels = example.ids.astype(np.int64)
    labels[: max(1, example.n_prompt)] = IGNORED  # nothing predicts the first token
    return labels


def _padded(rows: Sequence[np.ndarray], value: int) -> np.ndarray:
    """The rows, right-padded to the longest, as int64; at least one column."""
    padded = np.full((len(rows), max(1, *(len(row) for row in rows))), value, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


def collate_slots(
    examples: Sequence[Encoded], slots: Sequence[Slot], pad_id: int, *, packed: bool = False
) -> Batch:
    """One batch of examples that are named by their place in the split."""
    chosen = [
        (examples[index] if index >= 0 else examples[0].blank(), weight if index >= 0 else 0.0)
        for index, weight in slots
    ]
    return collate(chosen, pad_id, packed=packed)


def whole_window(
    examples: Sequence[Encoded],
    indices: Sequence[int],
    *,
    batch_size: int,
    reduction: str,
    rank: int = 0,
    world_size: int = 1,
) -> list[list[Slot]]:
    """This process's batches of one window, in its order; over all processes they hold it exactly once."""
    weights = window_weights(examples, indices, reduction)
    slots = list(zip(indices, weights, strict=True))
    batches = [slots[start : start + batch_size] for start in range(0, len(slots), batch_size)]
    return batches[rank::world_size]


class WindowSampler(Sampler[list[list[Slot]]]):
    """The micro-batches of one process in every window of an epoch.

    The order of the examples is a permutation drawn from (seed, epoch). The last window of an epoch may
    be smaller.
    """

    def __init__(
        self,
        examples: Sequence[Encoded],
        *,
        real_batch_size: int,
        limits: Limits,
        reduction: str,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.examples = examples
        self.real_batch_size = real_batch_size
        self.limits = limits
        self.reduction = reduction
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Selects the permutation of the next iteration; the Trainer calls this when it resumes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.examples) // self.real_batch_size)

    def __iter__(self) -> Iterator[list[list[Slot]]]:
        for indices in self.windows():
            yield split_window(
                self.examples,
                indices,
                limits=self.limits,
                reduction=self.reduction,
                world_size=self.world_size,
            )[self.rank]

    def windows(self) -> Iterator[list[int]]:
        """The windows of the current epoch, as indices into the split."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.examples)).tolist()
        for start in range(0, len(order), self.real_batch_size):
            yield order[start : start + self.real_batch_size]


class WindowLoader(DataLoader):
    """A data loader over a ``WindowSampler``: each item is a list of micro-batches, one optimiser step."""

    def __init__(self, sampler: WindowSampler, pad_id: int) -> None:
        self.windows = sampler
        examples, packed = sampler.examples, sampler.limits.packed
        super().__init__(
            _Themselves(),
            batch_sampler=sampler,
            collate_fn=lambda window: [
                collate_slots(examples, slots, pad_id, packed=packed) for slots in window
            ],
            # Its own generator: iterating must not draw from the one that dropout uses.
            generator=torch.Generator().manual_seed(sampler.seed),
        )

    def set_epoch(self, epoch: int) -> None:
        """Selects the permutation of the next iteration."""
        self.windows.set_epoch(epoch)


class _Themselves(torch.utils.data.Dataset):
    """What the sampler yields is all that the collation needs."""

    def __getitem__(self, slots: list[Slot]) -> list[Slot]:
        return slots
