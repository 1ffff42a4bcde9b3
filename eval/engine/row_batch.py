"""A batch of prompts that are continued together, from which those that ended leave."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eval.engine.decoding import Decoding, next_tokens, uniforms
from eval.engine.row_cache import Columns, RowCache


@dataclass(frozen=True)
class Prompt:
    """A prompt to continue.

    Attributes:
        index: Its place among all prompts.
        ids: Its tokens, at least one.
        is_cut: Whether it lost its beginning.
    """

    index: int
    ids: list[int]
    is_cut: bool = False


class Decoder:
    """A decoder-only model as the batches use it."""

    def __init__(
        self, model: Any, n_layers: int, decoding: Decoding, seed: int, device: torch.device
    ) -> None:
        """Holds what every batch needs.

        Args:
            model: The model itself, adapters inside its layers.
            n_layers: Of its cache.
            decoding: How tokens are chosen.
            seed: Of the sampling.
            device: Where it is.
        """
        self.model, self.n_layers, self.decoding = model, n_layers, decoding
        self.seed, self.device = seed, device
        known = inspect.signature(model.forward).parameters
        self._takes_places = "position_ids" in known
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def logits(self, ids: Tensor, mask: Tensor, places: Tensor, cache: RowCache) -> Tensor:
        """Of the token after the last column; the cache grows by the columns of ``ids``."""
        extras = {"position_ids": places} if self._takes_places else {}
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **self._last_only,
            **extras,
        )
        return out.logits[:, -1].to(self.device)  # layers may lie on several


@dataclass
class Row:
    """A prompt and how far it has come."""

    prompt: Prompt
    n_new: int = 1
    has_ended: bool = False

    @property
    def n_tokens(self) -> int:
        """Of prompt and answer."""
        return len(self.prompt.ids) + self.n_new


class RowBatch:
    """Rows that end in the same column, the last of which the model has not read yet."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Prompt]) -> None:
        """Reads the prompts and chooses the first token of each."""
        self._decoder = decoder
        self.rows = [Row(prompt) for prompt in prompts]
        self._cache = RowCache(decoder.n_layers)
        ids = _left_padded([prompt.ids for prompt in prompts], decoder.device)
        mask = _left_padded([[1] * len(prompt.ids) for prompt in prompts], decoder.device)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        self._draws = self._drawn(prompts)
        self._steps = torch.zeros(len(prompts), 1, dtype=torch.long, device=decoder.device)
        self._places = places[:, -1:]
        logits = decoder.logits(ids, mask, places, self._cache)
        self._ids, self._mask = Columns(ids, 1), Columns(mask, 1)
        self._choose(logits)

    def step(self, n: int) -> None:
        """Continues all rows by ``n`` tokens."""
        # Else they would count on, beyond the random numbers and the positions that there are.
        self.rest([number for number, row in enumerate(self.rows) if row.has_ended])
        for _ in range(n):
            self._choose(self._decoder.logits(self._last, self._mask.whole, self._places, self._cache))
        for row in self.rows:
            row.n_new += n

    def last_columns(self, n: int) -> Tensor:
        """The last tokens of every row; -1 where the model gave none."""
        return self._ids.whole[:, -n:]

    def answer(self, number: int) -> list[int]:
        """All tokens that were chosen for a row."""
        return self._ids.whole[number, -self.rows[number].n_new :].tolist()

    def keep(self, numbers: Sequence[int]) -> None:
        """Forgets all rows but these; a number that comes again makes a free row."""
        rows = torch.tensor(numbers, device=self._decoder.device)
        for part in (self._cache, self._ids, self._mask):
            part.select(rows)
        for name in ("_last", "_places", "_steps", "_draws"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor[rows])
        # Copies: a free row has a state of its own.
        self.rows = [replace(self.rows[number]) for number in numbers]

    def replace(self, numbers: Sequence[int], others: "RowBatch") -> None:
        """Puts the rows of another batch, which is not to be used again, in the places of some."""
        rows = torch.tensor(numbers, device=self._decoder.device)
        self._cache.put(rows, others._cache)
        self._ids.put(rows, others._ids.whole)
        before = self._mask.width
        self._mask.put(rows, others._mask.whole)
        mask = self._mask.whole
        mask[rows, : -others._mask.width] = 0  # what their predecessors left
        if self._mask.width > before:
            stayed = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
            stayed[rows] = False
            mask[stayed, : self._mask.width - before] = 0
        for name in ("_last", "_places", "_steps", "_draws"):
            tensor = getattr(self, name)
            if tensor is not None:
                tensor[rows] = getattr(others, name)
        for number, row in zip(numbers, others.rows, strict=True):
            self.rows[number] = row

    def rest(self, numbers: Sequence[int]) -> None:
        """Rows that have ended start counting again: they are computed until another takes their place."""
        if not numbers:
            return
        rows = torch.tensor(numbers, dtype=torch.long, device=self._decoder.device)
        self._places[rows] = 0
        self._steps[rows] = 0
        for number in numbers:
            self.rows[number].has_ended = True

    def crop(self) -> None:
        """Forgets the columns that no row needs that goes on."""
        width = max(row.n_tokens for row in self.rows if not row.has_ended)
        self._ids.crop(width)
        self._mask.crop(width)
        self._cache.crop_left(width - 1)

    def bytes_per_token(self) -> float:
        """Of the cache."""
        return self._cache.n_bytes / (len(self.rows) * (self._mask.width - 1))  # the last one is not read yet

    def _choose(self, logits: Tensor) -> None:
        draws = None if self._draws is None else self._draws.gather(1, self._steps)[:, 0]
        chosen = next_tokens(logits, self._decoder.decoding, draws)[:, None]
        self._ids.append(chosen)
        self._last = chosen.clamp(min=0)  # the model can read no -1
        self._mask.append(torch.ones_like(self._last))
        self._places = self._places + 1
        self._steps = self._steps + 1

    def _drawn(self, prompts: Sequence[Prompt]) -> Tensor | None:
        decoding = self._decoder.decoding
        if not decoding.is_sampled:
            return None
        draws = [uniforms(self._decoder.seed, prompt.index, decoding.max_new_tokens) for prompt in prompts]
        return torch.stack([torch.from_numpy(row) for row in draws]).to(self._decoder.device)


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
