"""A beginning that many prompts share, read once: its keys and values serve them all."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from eval.engine.questions import Question, common_beginning

# A shorter beginning saves less than its own pass costs.
_LEAST = 16


def read_prefix(model: Any, questions: Sequence[Question], device: torch.device) -> DynamicCache | None:
    """Keys and values of the questions' common beginning.

    Returns:
        None where each question has to be read whole: too little in common, an encoder that looks both ways,
        rotary positions that depend on the length, a cache that holds states instead of keys.
    """
    config = model.config
    if len(questions) < 2 or config.is_encoder_decoder or _depends_on_length(config.to_dict()):
        return None
    common = common_beginning([question.context for question in questions])
    # Each keeps a token of its own to read.
    common = common[: min(len(question.context) for question in questions) - 1]
    if len(common) < _LEAST:
        return None
    output = model(input_ids=torch.tensor([common], device=device), use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if not isinstance(cache, DynamicCache) or cache.get_seq_length() != len(common):
        return None
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    return cache if plain else None


def for_rows(prefix: DynamicCache, n: int) -> DynamicCache:
    """The same beginning for ``n`` rows: views, because a layer joins new keys to them in new memory."""
    spread = copy.copy(prefix)
    spread.layers = [copy.copy(layer) for layer in prefix.layers]
    layer: Any
    for layer in spread.layers:
        layer.keys = layer.keys.expand(n, -1, -1, -1)
        layer.values = layer.values.expand(n, -1, -1, -1)
    return spread


def _depends_on_length(config: Any) -> bool:
    """Whether rotary positions do, so that keys of a shorter text do not fit a longer one."""
    if not isinstance(config, dict):
        return False
    return config.get("rope_type") in ("dynamic", "longrope") or any(map(_depends_on_length, config.values()))
