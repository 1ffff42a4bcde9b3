"""Encoding: examples to token ids, with the prompt masked exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_one.data.chat import Rendered, turn_end
from lora_one.data.example import Example
from lora_one.data.token_cache import NO_CACHE, TokenCache
from lora_one.errors import UserError

_CHUNK = 1000
# Fewer are tokenised sooner than files are worth.
_WORTH_KEEPING = 20_000


@dataclass(frozen=True, slots=True)
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
    cache: TokenCache = NO_CACHE,
) -> EncodedSplit:
    """Encodes ``prompt + joiner + target`` and the end token, cut at ``max_length`` tokens.

    Prompt and target are encoded together, as the model will read them. A token counts as prompt
    only if all its characters lie in the prompt, so nothing of the target goes unlearned where a
    tokenizer merges across the boundary. ``key`` is what set ``max_length``. With
    ``as_pairs``, for an encoder with a decoder, they are encoded apart, and each is cut. A prompt
    that a chat template wrote is encoded as it is: it has its special tokens, and its target an end.

    Raises:
        UserError: If no example keeps a target token.
    """
    encoded: list[Encoded] = []
    n_truncated = n_without_target = 0
    kept = cache if len(examples) >= _WORTH_KEEPING else NO_CACHE
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        texts = [part for example in chunk for part in (example.prompt, example.target)]
        is_rendered = isinstance(chunk[0].prompt, Rendered)
        settings = ["pairs", max_length] if as_pairs else ["texts", joiner, max_length, is_rendered]

        def make(chunk: Sequence[Example] = chunk) -> dict[str, np.ndarray]:
            if as_pairs:
                return _packed(_pairs(chunk, tokenizer, max_length))
            return _packed(_texts(chunk, tokenizer, joiner, max_length))

        arrays = kept.get(texts, settings, make)
        n_truncated += int(arrays["is_cut"].sum())
        ends = np.cumsum(arrays["lengths"])
        for end, length, n_prompt in zip(ends, arrays["lengths"], arrays["n_prompt"], strict=True):
            example = Encoded(arrays["ids"][end - length : end], int(n_prompt), as_pairs)
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


def prompt_ids(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, for_encoder: bool = False
) -> list[list[int]]:
    """Tokens of prompts that are to be continued, as training saw them: those of a chat template too."""
    if not prompts:
        return []
    if isinstance(prompts[0], Rendered):
        rows = tokenizer([str(prompt) for prompt in prompts], add_special_tokens=False)["input_ids"]
        return [list(row) for row in rows]
    as_read = encoder_input if for_encoder else without_end
    return [as_read(row, tokenizer) for row in tokenizer(list(prompts))["input_ids"]]


def stop_ids(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a continuation: the end of texts, and of a turn after a chat template's prompt."""
    stops = [tokenizer.eos_token_id]
    if prompts and isinstance(prompts[0], Rendered):
        stops.append(turn_end(tokenizer).token)
    return list(dict.fromkeys(stops))


_Made = list[tuple[list[int], int, bool]]  # ids, how many are the prompt's, whether it was cut


def _texts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, joiner: str, max_length: int
) -> _Made:
    """Each example as one text."""
    is_rendered = isinstance(examples[0].prompt, Rendered)
    between, end = ("", []) if is_rendered else (joiner, [tokenizer.eos_token_id])
    texts = [str(example.prompt) + between + example.target for example in examples]
    rows = tokenizer(texts, return_offsets_mapping=True, add_special_tokens=not is_rendered)
    made: _Made = []
    for example, row, offsets in zip(examples, rows["input_ids"], rows["offset_mapping"], strict=True):
        ids = row if is_rendered else without_end(row, tokenizer)
        n_prompt = sum(last <= len(example.prompt) for _, last in offsets[: len(ids)])
        whole = [*ids, *end]
        made.append((whole[:max_length], n_prompt, len(whole) > max_length))
    return made


def _pairs(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> _Made:
    """Each example as prompt and target, both with an end token.

    A cut prompt still ends with the end token, as all that the encoder was trained on; a cut target does
    not, because nobody should learn to end there.
    """
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    targets = tokenizer([example.target for example in examples])["input_ids"]
    made: _Made = []
    for prompt, target in zip(prompts, targets, strict=True):
        whole = [*without_end(target, tokenizer), tokenizer.eos_token_id]
        read = encoder_input(prompt, tokenizer, max_length)
        is_cut = max(len(whole), len(encoder_input(prompt, tokenizer))) > max_length
        made.append(([*read, *whole[:max_length]], len(read), is_cut))
    return made


def _packed(made: _Made) -> dict[str, np.ndarray]:
    """Their arrays: one of all ids, and one number for each example."""
    return {
        "ids": np.array([token for ids, _, _ in made for token in ids], dtype=np.int32),
        "lengths": np.array([len(ids) for ids, _, _ in made], dtype=np.int32),
        "n_prompt": np.array([n_prompt for _, n_prompt, _ in made], dtype=np.int32),
        "is_cut": np.array([is_cut for _, _, is_cut in made], dtype=np.uint8),
    }
