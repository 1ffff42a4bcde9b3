"""Encoding: examples to token ids, with the prompt masked exactly."""

from collections.abc import Sequence
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
) -> EncodedSplit:
    """Encodes ``prompt + joiner + target`` and the end token, cut at ``max_length`` tokens.

    Prompt and target are encoded together, as the model will read them. A token counts as prompt
    only if all its characters lie in the prompt, so nothing of the target goes unlearned where a
    tokenizer merges across the boundary. ``key`` is what set ``max_length``.

    Raises:
        UserError: If no example keeps a target token.
    """
    encoded: list[Encoded] = []
    n_truncated = n_without_target = 0
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        texts = [example.prompt + joiner + example.target for example in chunk]
        rows = tokenizer(texts, return_offsets_mapping=True)
        for example, ids, offsets in zip(chunk, rows["input_ids"], rows["offset_mapping"], strict=True):
            if ids[-1:] == [tokenizer.eos_token_id]:  # some tokenizers end every text themselves
                ids, offsets = ids[:-1], offsets[:-1]
            whole = np.array([*ids, tokenizer.eos_token_id], dtype=np.int32)
            n_prompt = sum(end <= len(example.prompt) for _, end in offsets)
            kept = Encoded(whole[:max_length], n_prompt)
            n_truncated += len(whole) > max_length
            if kept.n_target > 0:
                encoded.append(kept)
            else:
                n_without_target += 1
    if not encoded:
        raise UserError(
            f"{name} split: no example has a target token within {max_length} tokens; raise {key}"
        )
    return EncodedSplit(tuple(encoded), n_truncated, n_without_target)
