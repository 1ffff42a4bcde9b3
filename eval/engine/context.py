"""How much text a model can read, and what is left of a longer one."""

from collections.abc import Sequence
from typing import Any


def context_length(model: Any) -> int | None:
    """Most tokens that the model can read, None where its config names no such number (as T5's)."""
    config = model.config
    side = {"encoder": True} if config.is_encoder_decoder else {"decoder": True}
    found = getattr(config.get_text_config(**side), "max_position_embeddings", None)
    return None if found is None else int(found)


def without_beginning(ids: Sequence[int], limit: int | None, first: int | None) -> list[int]:
    """The last ``limit`` tokens of a text.

    Args:
        ids: The text.
        limit: At least 1; None: nothing is cut.
        first: The token that begins every text. Where it stood at the beginning it does so again, and counts.
    """
    if limit is None or len(ids) <= limit:
        return list(ids)
    begin = list(ids[:1]) if ids[0] == first else []
    return begin + list(ids[len(ids) - limit + len(begin) :])
