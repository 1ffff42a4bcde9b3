"""Encoding: examples to token ids, with the prompt masked exactly."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_one.data.specs import Example
from lora_one.errors import UserError

_CHUNK = 1000


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt, target and end token; the first ``n_prompt`` are not learned.

    ``is_pair``: the prompt is for an encoder and the target for its decoder, not one text.
    """

    ids: np.ndarray
    n_prompt: int
    is_pair: bool = False

    @property
    def n_target(self) -> int:
        """Positions that carry a loss. The first token of one text is never predicted."""
        return len(self.ids) - (self.n_prompt if self.is_pair else max(self.n_prompt, 1))

    @property
    def widths(self) -> tuple[int, int]:
        """Its tokens in a batch: those of the encoder and of the decoder, or of the one text and none."""
        if self.is_pair:
            return self.n_prompt, len(self.ids) - self.n_prompt
        return len(self.ids), 0

    def blank(self) -> "Encoded":
        """A short example of the same kind that carries no loss, to fill a batch."""
        ids = self.ids[:2]
        return Encoded(ids, len(ids), self.is_pair)


@dataclass(frozen=True)
class EncodedSplit:
    """An encoded split; examples whose target was cut away entirely are dropped and counted."""

    examples: tuple[Encoded, ...]
    n_truncated: int
    n_without_target: int

    @property
    def n_tokens(self) -> int:
        """Tokens of the split, prompts included, padding not."""
        return sum(len(example.ids) for example in self.examples)


def encode_split(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    joiner: str,
    max_length: int,
    name: str,
    key: str = "model.max_length",
    as_pairs: bool = False,
) -> EncodedSplit:
    """Encodes ``prompt + joiner + target`` and the end token, cut at ``max_length`` tokens.

    Prompt and target are encoded together, as the model will read them. A token counts as prompt
    only if all its characters lie in the prompt, so nothing of the target goes unlearned where a
    tokenizer merges across the boundary. ``key`` is what set ``max_length``. With
    ``as_pairs``, for an encoder with a decoder, they are encoded apart, and each is cut.

    Raises:
        UserError: If no example keeps a target token.
    """
    encoded: list[Encoded] = []
    n_truncated = n_without_target = 0
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        made = (
            _pairs(chunk, tokenizer, max_length) if as_pairs else _texts(chunk, tokenizer, joiner, max_length)
        )
        for example, is_cut in made:
            n_truncated += is_cut
            if example.n_target > 0:
                encoded.append(example)
            else:
                n_without_target += 1
    if not encoded:
        raise UserError(
            f"{name} split: no example has a target token within {max_length} tokens; raise {key}"
        )
    return EncodedSplit(tuple(encoded), n_truncated, n_without_target)


def without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text that goes on: some tokenizers end every text themselves."""
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def encoder_input(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[int]:
    """What an encoder reads of a tokenised prompt: it ends with the end token, cut or not."""
    end = [tokenizer.eos_token_id]
    return without_end(ids, tokenizer)[: None if max_length is None else max_length - 1] + end


def _texts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, joiner: str, max_length: int
) -> Iterator[tuple[Encoded, bool]]:
    """Each example as one text, and whether it was cut."""
    texts = [example.prompt + joiner + example.target for example in examples]
    rows = tokenizer(texts, return_offsets_mapping=True)
    for example, row, offsets in zip(examples, rows["input_ids"], rows["offset_mapping"], strict=True):
        ids = without_end(row, tokenizer)
        whole = np.array([*ids, tokenizer.eos_token_id], dtype=np.int32)
        n_prompt = sum(end <= len(example.prompt) for _, end in offsets[: len(ids)])
        yield Encoded(whole[:max_length], n_prompt), len(whole) > max_length


def _pairs(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[tuple[Encoded, bool]]:
    """Each example as prompt and target, both with an end token, and whether one of them was cut.

    A cut prompt still ends with the end token, as all that the encoder was trained on; a cut target does
    not, because nobody should learn to end there.
    """
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    targets = tokenizer([example.target for example in examples])["input_ids"]
    for prompt, target in zip(prompts, targets, strict=True):
        whole = [*without_end(target, tokenizer), tokenizer.eos_token_id]
        read = encoder_input(prompt, tokenizer, max_length)
        is_cut = max(len(whole), len(encoder_input(prompt, tokenizer))) > max_length
        ids = np.array([*read, *whole[:max_length]], dtype=np.int32)
        yield Encoded(ids, len(read), is_pair=True), is_cut
