"""Everything about data that one experiment needs, in one object."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_one.config import ExperimentConfig
from lora_one.data.chat import chat_renderer
from lora_one.data.custom import spec_of
from lora_one.data.encoding import EncodedSplit, encode_split
from lora_one.data.loading import CHUNK, Splits, load_splits
from lora_one.data.token_cache import TokenCache


@dataclass(frozen=True)
class Data:
    """The splits as text and as tokens.

    Attributes:
        texts: The examples.
        train: Encoded training split.
        validation: Encoded validation split.
        gradient: The training split cut at ``init.max_length``, for the gradient estimate.
        pad_id: Padding token.
        n_damaged: Files of the token cache that were broken.
    """

    texts: Splits
    train: EncodedSplit
    validation: EncodedSplit
    gradient: EncodedSplit
    pad_id: int
    n_damaged: int = 0

    def remarks(self) -> list[str]:
        """What happened to examples that a person should know of."""
        counts = {
            "training examples left out: in another split too, or rewritings": self.texts.n_overlapping,
            "training examples left out: over the dataset's token limit": self.texts.n_too_long,
            "training examples cut at model.max_length": self.train.n_truncated,
            "validation examples cut at model.max_length": self.validation.n_truncated,
            "examples left out: no target token within model.max_length": self.train.n_without_target
            + self.validation.n_without_target,
            "damaged files of the token cache: made again": self.n_damaged,
        }
        if self.gradient is not self.train:
            counts |= {
                "examples cut at init.max_length for the gradient": self.gradient.n_truncated,
                "examples left out of the gradient: no target token within init.max_length": (
                    self.gradient.n_without_target
                ),
            }
        return [f"{count:,} {what}" for what, count in counts.items() if count]

    def summary(self) -> dict[str, Any]:
        """What the record keeps."""
        return {
            "fingerprint": self.texts.fingerprint,
            "sources": self.texts.sources,
            "rows": {
                "train": len(self.train.examples),
                "validation": len(self.validation.examples),
                "test": len(self.texts.test),
            },
            "train_tokens": self.train.n_tokens,
            "left_out": {
                "in_another_split": self.texts.n_overlapping,
                "over_the_token_limit": self.texts.n_too_long,
                "no_target_token_left": self.train.n_without_target + self.validation.n_without_target,
            },
            "truncated": {"train": self.train.n_truncated, "validation": self.validation.n_truncated},
        }


def prepare_data(
    config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase, *, writes: bool = True
) -> Data:
    """Loads the splits of ``config.dataset`` and encodes them for ``config.model``.

    Args:
        config: All settings.
        tokenizer: The model's.
        writes: Whether this process may write to ``config.token_cache_dir``.

    Raises:
        UserError: For data that cannot be read, or nothing of which can be learned.
    """
    folder = config.token_cache_dir
    cache = TokenCache(Path(folder) if folder else None, tokenizer, writes=writes)
    render = chat_renderer(tokenizer) if config.dataset.chat else None
    counter = _token_counter(tokenizer, cache, with_special=render is None)
    texts = load_splits(config.dataset, counter, render)
    joiner = spec_of(config.dataset).joiner

    def encode(name: str, max_length: int, key: str = "model.max_length") -> EncodedSplit:
        return encode_split(
            getattr(texts, name),
            tokenizer,
            joiner=joiner,
            max_length=max_length,
            name=name,
            key=key,
            as_pairs=config.model.is_pair,
            cache=cache,
        )

    train = encode("train", config.model.max_length)
    same = config.gradient_max_length == config.model.max_length
    return Data(
        texts=texts,
        train=train,
        validation=encode("validation", config.model.max_length),
        gradient=train if same else encode("train", config.gradient_max_length, "init.max_length"),
        pad_id=tokenizer.pad_token_id,
        n_damaged=len(cache.damaged),
    )


def _token_counter(
    tokenizer: PreTrainedTokenizerBase, cache: TokenCache, *, with_special: bool
) -> Callable[[list[str]], list[int]]:
    def count(texts: list[str]) -> list[int]:
        def make() -> dict[str, np.ndarray]:
            rows = tokenizer(texts, add_special_tokens=with_special)["input_ids"]
            return {"lengths": np.array([len(ids) for ids in rows], dtype=np.int32)}

        # Small files are counted sooner than a cache is worth.
        arrays = cache.get(texts, ["lengths", with_special], make) if len(texts) == CHUNK else make()
        return [int(length) for length in arrays["lengths"]]

    return count
