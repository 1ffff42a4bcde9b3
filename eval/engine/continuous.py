"""Generation without waiting: a row that ends leaves its batch, and the next prompt takes its place."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from eval.engine.decoding import StopWatch, not_finite
from eval.engine.row_batch import Decoder, Prompt, RowBatch

# On a CPU 2 to 8 steps, and shares from 1/25 to 1/4 at the end, differed by a few hundredths.
_STEPS = 4  # between two looks at what has ended
_FREE = 1 / 8  # share of the rows that new prompts wait for
_ENDED = 1 / 4  # share of the rows that are dropped together where no prompt is left
_TOKENS_READ = {"cpu": 2_048}  # of prompts, at once
_MOST_TOKENS_READ = 16_384


@dataclass(frozen=True)
class Limits:
    """How large a batch may be.

    Attributes:
        max_tokens: Rows times columns, what may still be generated included.
        max_rows: Rows.
    """

    max_tokens: int
    max_rows: int

    def rows(self, columns: int) -> int:
        """So many rows of ``columns`` are allowed; one in any case."""
        return max(1, min(self.max_rows, self.max_tokens // columns))


class ContinuousBatch:
    """All prompts of one process, the longest first, as many at once as the limits allow."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int],
        prompts: Sequence[Prompt],
        limits: Limits,
    ) -> None:
        """Begins nothing yet.

        Args:
            decoder: The model and how its tokens are chosen.
            tokenizer: Decodes where a text may end an answer.
            ends: Tokens that end an answer.
            prompts: What to continue.
            limits: Of the batch.
        """
        self._decoder, self._decoding, self._limits = decoder, decoder.decoding, limits
        self._queue = sorted(prompts, key=lambda prompt: len(prompt.ids))
        self._ends = list(ends)
        self._end_ids = torch.tensor(self._ends, device=decoder.device)
        self._stop = StopWatch(tokenizer, self._decoding.stop)
        self._batch: RowBatch | None = None

    def __iter__(self) -> Iterator[tuple[Prompt, list[int]]]:
        """Every prompt with the tokens chosen for it, as it ends; what follows its end is not cut off.

        Raises:
            UserError: If the model's logits are not finite.
        """
        while self._queue or self._batch is not None:
            self._admit()
            n_steps = self._steps()
            assert self._batch is not None
            self._batch.step(n_steps)
            yield from self._ended(n_steps + 1)
            self._shrink()

    @property
    def _live(self) -> list[int]:
        rows = [] if self._batch is None else self._batch.rows
        return [number for number, row in enumerate(rows) if not row.has_ended]

    def _columns(self, n_prompt: int) -> int:
        return n_prompt + self._decoding.max_new_tokens

    def _steps(self) -> int:
        """Until a row has its most tokens, or until the next look."""
        assert self._batch is not None
        rows = self._batch.rows
        return max(
            0, min([_STEPS, *(self._decoding.max_new_tokens - rows[number].n_new for number in self._live)])
        )

    def _admit(self) -> None:
        """Takes prompts in where enough rows are free to be worth it."""
        if not self._queue:
            return
        live = self._live
        rows = [] if self._batch is None else self._batch.rows
        longest = max([len(self._queue[-1].ids), *(len(rows[number].prompt.ids) for number in live)])
        allowed = self._limits.rows(self._columns(longest))
        n_free = min(allowed - len(live), len(self._queue))
        if n_free <= 0 or (live and n_free < min(_FREE * allowed, len(self._queue))):
            return
        prompts = [self._queue.pop() for _ in range(n_free)]
        for chunk in _chunks(prompts, _TOKENS_READ.get(self._decoder.device.type, _MOST_TOKENS_READ)):
            self._place(chunk, n_free)
            n_free -= len(chunk)
        assert self._batch is not None
        self._batch.crop()

    def _place(self, prompts: Sequence[Prompt], n_wanted: int) -> None:
        """Reads prompts and gives them rows; there will be ``n_wanted`` of them with those that follow."""
        new = RowBatch(self._decoder, prompts)
        if self._batch is None:
            self._batch = new
            return
        live = self._live
        free = [number for number, row in enumerate(self._batch.rows) if row.has_ended]
        if len(free) < len(prompts):
            # Room for all that follow at once: every growth copies the batch.
            self._batch.keep([*live, *[live[0]] * n_wanted])
            free = list(range(len(live), len(live) + n_wanted))
            self._batch.rest(free)
        self._batch.replace(free[: len(prompts)], new)

    def _ended(self, n_columns: int) -> Iterator[tuple[Prompt, list[int]]]:
        """Those that ended in the last columns."""
        batch = self._batch
        assert batch is not None
        columns = batch.last_columns(n_columns)
        looked = torch.stack([torch.isin(columns, self._end_ids).any(1), (columns < 0).any(1)])
        found, is_broken = looked.tolist()
        ended = []
        for number in self._live:
            if is_broken[number]:
                raise not_finite()
            row = batch.rows[number]
            ids = None
            if not found[number] and row.n_new < self._decoding.max_new_tokens:
                if not self._decoding.stop:
                    continue
                ids = batch.answer(number)
                if not self._stop.has_ended(ids, n_columns):
                    continue
            ended.append(number)
            yield row.prompt, ids or batch.answer(number)
        batch.rest(ended)

    def _shrink(self) -> None:
        """Forgets rows that ended, where no prompt waits for their place."""
        assert self._batch is not None
        live = self._live
        n_ended = len(self._batch.rows) - len(live)
        if not live:
            self._batch = None
        elif not self._queue and n_ended >= _ENDED * len(self._batch.rows):
            self._batch.keep(live)
            self._batch.crop()


def _chunks(prompts: Sequence[Prompt], max_tokens: int) -> Iterator[list[Prompt]]:
    """The prompts, which are sorted from the longest, in lots of at most so many tokens."""
    start = 0
    while start < len(prompts):
        n = max(1, max_tokens // len(prompts[start].ids))
        yield list(prompts[start : start + n])
        start += n
