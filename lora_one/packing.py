"""Packed micro-batches: several examples in one row without padding, each attending to itself alone."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_one.config import ModelConfig
from lora_one.data.batches import collate
from lora_one.data.encoding import Encoded
from lora_one.errors import UserError
from lora_one.losses import BY_EXAMPLE, to_device, weighted_loss
from lora_one.modes import in_mode
from lora_one.processes import Processes

# Tokens of a mean example. Much shorter ones cost more in calls, one for each, than padding does.
_WORTH_TOKENS = 64


class Packing(Enum):
    """How the examples of a micro-batch stand together.

    Attributes:
        NONE: One below the other, padded.
        BY_EXAMPLE: In one row, each given to SDPA on its own.
        BY_MODEL: In one row, which the model's attention finds out from the positions.
    """

    NONE = "padded"
    BY_EXAMPLE = "by example"
    BY_MODEL = "by model"


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_lengths: list[int] | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Transformers' own SDPA: of the whole batch, or of each example of a packed row, without a mask."""
    if packed_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    window, attended = settings.get("sliding_window"), []
    parts = (part.split(packed_lengths, dim=2) for part in (query, key, value))
    for own_query, own_key, own_value in zip(*parts, strict=True):
        mask = _band(own_query, window)
        attended.append(sdpa_attention_forward(module, own_query, own_key, own_value, mask, **settings)[0])
    return torch.cat(attended, dim=1), None


def _band(query: Tensor, window: int | None) -> Tensor | None:
    """The mask of sliding windows, where an example is longer than one."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    is_seen_TT = torch.ones(length, length, dtype=torch.bool, device=query.device).tril_()
    return is_seen_TT.triu_(1 - window)[None, None]


AttentionInterface.register(BY_EXAMPLE, _attend)
AttentionMaskInterface.register(BY_EXAMPLE, sdpa_mask)


@contextmanager
def attending(model: Any, packing: Packing) -> Iterator[None]:
    """Inside, a model with SDPA attention takes packed rows example by example, where that is the packing."""
    if packing is not Packing.BY_EXAMPLE:
        yield
        return
    before = {"": model.config._attn_implementation} | {
        name: getattr(model.config, name)._attn_implementation
        for name in model.config.sub_configs
        if getattr(model.config, name, None) is not None
    }
    model.set_attn_implementation(BY_EXAMPLE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def choose_packing(
    model: Any, config: ModelConfig, examples: Sequence[Encoded], pad_id: int, processes: Processes
) -> Packing:
    """The packing of ``model.packing``; where it says nothing, what is exact and saves time.

    Raises:
        UserError: If packing is asked for, and in no way a packed example's loss is its own.
    """
    if config.packing is None:
        if _may_save_time(model, config, examples, processes) and _is_exact_everywhere(
            model, Packing.BY_EXAMPLE, examples, pad_id, processes
        ):
            return Packing.BY_EXAMPLE
        return Packing.NONE
    if not config.packing:
        return Packing.NONE
    for packing in _ways(model, config):
        if _is_exact_everywhere(model, packing, examples, pad_id, processes):
            return packing
    raise UserError(
        f"model.packing=true: {model.config.model_type} with {model.config._attn_implementation} attention "
        "does not keep packed examples apart; use model.packing=false, or another model.attn_implementation"
    )


def _ways(model: Any, config: ModelConfig) -> list[Packing]:
    """The ways that may pack, the cheapest first."""
    # Compiled blocks would be compiled for each set of lengths.
    by_example = model.config._attn_implementation == "sdpa" and not config.compile
    return [Packing.BY_EXAMPLE] * by_example + [Packing.BY_MODEL]


def _may_save_time(
    model: Any, config: ModelConfig, examples: Sequence[Encoded], processes: Processes
) -> bool:
    return (
        processes.device.type == "cpu"  # where it was measured
        and not config.compile  # each set of lengths would be compiled
        and not examples[0].is_pair
        and getattr(model, "_supports_attention_backend", False)
        and model.config._attn_implementation == "sdpa"
        and sum(len(example.ids) for example in examples) >= _WORTH_TOKENS * len(examples)
    )


def _is_exact_everywhere(
    model: Any, packing: Packing, examples: Sequence[Encoded], pad_id: int, processes: Processes
) -> bool:
    try:
        with attending(model, packing):
            is_exact = _is_exact(model, examples, pad_id, processes.device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError):  # the model takes no such rows
        is_exact = False
    return all(processes.gather([is_exact]))


@torch.no_grad()
def _is_exact(model: Any, examples: Sequence[Encoded], pad_id: int, device: torch.device) -> bool:
    """Whether a packed example's loss is its own, and does not depend on its neighbour; the longest's too."""
    longest, last = max(examples, key=lambda example: len(example.ids)), examples[-1]
    rounding = 1e-4 if model.dtype == torch.float32 else 2e-2
    with in_mode(model, training=False):
        for neighbour, example in ((longest, last), (last, longest)):
            backwards = replace(neighbour, ids=neighbour.ids[::-1].copy())
            slot = (example, 1.0 / example.n_target)
            batches = [collate([(first, 0.0), slot], pad_id, packed=True) for first in (neighbour, backwards)]
            one, other, alone = (
                weighted_loss(model, to_device(batch, device)).item()
                for batch in (*batches, collate([slot], pad_id))
            )
            is_own = math.isclose(one, alone, rel_tol=rounding)
            if not (is_own and math.isclose(one, other, rel_tol=1e-6)):
                return False
    return True
