"""Generation by transformers' own ``generate``: beams, encoders with a decoder, caches of other kinds."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from eval.engine.decoding import Decoding, next_tokens, not_finite, uniforms
from eval.engine.row_batch import Prompt

# Fixed, whatever the device: sampled beams depend on their batch, and are to be the same everywhere.
_TOKENS = 16_384


class Sound(LogitsProcessor):
    """Refuses to go on with logits that are no numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: D102
        if scores.isnan().any():
            raise not_finite()
        return scores


class Chosen(LogitsProcessor):
    """Leaves only the token that the prompt's own random numbers choose."""

    def __init__(self, decoding: Decoding, draws_BT: Tensor, n_before: int) -> None:
        self._decoding, self._draws_BT, self._n_before = decoding, draws_BT, n_before

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: D102
        step = input_ids.shape[1] - self._n_before
        tokens_B = next_tokens(scores, self._decoding, self._draws_BT[:, step])
        if (tokens_B < 0).any():
            raise not_finite()
        alone = torch.full_like(scores, -torch.inf)
        return alone.scatter_(1, tokens_B[:, None], 0.0)


class WholeBatches:
    """Batches that are made of all prompts, whoever answers them, and go on until their last row ends."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        seed: int,
        ends: Sequence[int],
        device: torch.device,
    ) -> None:
        """Holds what every batch needs.

        Args:
            model: Itself, adapters inside its layers.
            tokenizer: Its padding token is used.
            decoding: How tokens are chosen.
            seed: Of the sampling.
            ends: Tokens that end an answer.
            device: Where the model is.
        """
        self._model, self._decoding, self._seed, self._device = model, decoding, seed, device
        self._pad = tokenizer.pad_token_id
        self._is_pair = model.config.is_encoder_decoder
        self._settings = {
            "max_new_tokens": decoding.max_new_tokens,
            "eos_token_id": list(ends),
            "pad_token_id": self._pad,
            "use_cache": True,
            "num_beams": decoding.num_beams,
            "decoder_start_token_id": _start_token(model),
        }

    def split(
        self, prompts: Sequence[Prompt], max_tokens: int | None, max_rows: int | None, *, padded: bool
    ) -> list[list[Prompt]]:
        """All prompts in batches of like length, the longest first.

        Args:
            prompts: All of them.
            max_tokens: Of a batch, all beams and what is to be generated included; None: 16,384.
            max_rows: Prompts of a batch; None: no other limit.
            padded: Whether prompts of different lengths may stand together.
        """
        batches: list[list[Prompt]] = []
        for prompt in sorted(prompts, key=lambda prompt: -len(prompt.ids)):
            columns = self._decoding.max_new_tokens + len(prompt.ids)
            last = batches[-1] if batches else []
            # The first prompt of a batch is its longest.
            columns = self._decoding.max_new_tokens + len(last[0].ids) if last else columns
            n_rows = (max_tokens or _TOKENS) // (columns * self._decoding.num_beams)
            is_full = len(last) >= max(1, min(n_rows, max_rows or n_rows))
            if not last or is_full or not (padded or len(last[0].ids) == len(prompt.ids)):
                batches.append([])
            batches[-1].append(prompt)
        return batches

    def answer(self, batch: Sequence[Prompt]) -> Iterator[tuple[Prompt, list[int], bool]]:
        """Every prompt with its tokens, and whether greedy beams stood in for sampled ones that failed."""
        ids, mask = self._inputs(batch)
        fell_back = False
        if self._decoding.is_sampled and self._decoding.num_beams > 1:
            try:
                out = self._sampled_beams(ids, mask, batch)
            except RuntimeError as error:
                if not _is_bad_distribution(error):
                    raise
                fell_back = True
                out = self._generate(ids, mask, do_sample=False)
        elif self._decoding.is_sampled:
            n_before = 1 if self._is_pair else ids.shape[1]
            out = self._generate(ids, mask, self._chosen(batch, n_before), do_sample=False)
        else:
            out = self._generate(ids, mask, do_sample=False)
        begin = 1 if self._is_pair else ids.shape[1]
        for prompt, row in zip(batch, out[:, begin:].tolist(), strict=True):
            yield prompt, row, fell_back

    def _inputs(self, batch: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """A decoder's new tokens follow the prompt's last; an encoder counts places from the first."""
        width = max(len(prompt.ids) for prompt in batch)
        rows = [(prompt.ids, [1] * len(prompt.ids)) for prompt in batch]

        def padded(row: list[int], value: int) -> list[int]:
            filling = [value] * (width - len(row))
            return row + filling if self._is_pair else filling + row

        ids = torch.tensor([padded(row, self._pad) for row, _ in rows], device=self._device)
        return ids, torch.tensor([padded(row, 0) for _, row in rows], device=self._device)

    def _generate(
        self, ids: Tensor, mask: Tensor, processors: LogitsProcessorList | None = None, **settings: Any
    ) -> Tensor:
        config = GenerationConfig(**self._settings, **settings)
        own = self._model.generation_config
        # transformers fills what is not set from the model's own: penalties, least lengths, forbidden words.
        self._model.generation_config = GenerationConfig()
        try:
            return self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([Sound(), *(processors or ())]),
            )
        finally:
            self._model.generation_config = own

    def _chosen(self, batch: Sequence[Prompt], n_before: int) -> LogitsProcessorList:
        n = self._decoding.max_new_tokens
        draws = [torch.from_numpy(uniforms(self._seed, prompt.index, n)) for prompt in batch]
        return LogitsProcessorList([Chosen(self._decoding, torch.stack(draws).to(self._device), n_before)])

    def _sampled_beams(self, ids: Tensor, mask: Tensor, batch: Sequence[Prompt]) -> Tensor:
        decoding = self._decoding
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(uniforms(self._seed, batch[0].index, 1)[0] * 2**53))
            return self._generate(
                ids,
                mask,
                do_sample=True,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                top_k=decoding.top_k,
            )


def _start_token(model: Any) -> int | None:
    """Where a decoder begins; None for a model without an encoder."""
    places = (model.config, model.generation_config)
    found = (getattr(place, "decoder_start_token_id", None) for place in places)
    return next((token for token in found if token is not None), None)


def _is_bad_distribution(error: RuntimeError) -> bool:
    """Whether nothing could be drawn: torch's own words for infinities, and for too few choices."""
    return "probability tensor contains" in str(error) or "invalid multinomial distribution" in str(error)
