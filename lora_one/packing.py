"""Packed micro-batches: several examples in one row without padding, each attending to itself alone."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_one.config import ModelConfig
from lora_one.data.batches import Batch, collate
from lora_one.data.encoding import Encoded
from lora_one.errors import UserError
from lora_one.losses import BY_EXAMPLE, to_device, weighted_loss
from lora_one.modes import in_mode
from lora_one.processes import Processes

# Tokens of a mean example. Much shorter ones cost more in calls, one for each, than padding does.
_WORTH_TOKENS = 64


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
def attending_by_example(model: Any) -> Iterator[None]:
    """Inside, a model with SDPA attention takes packed rows example by example.

    Another attention has its own way: flash attention reads the positions, the others are given a mask.
    """
    has_sdpa = model.config._attn_implementation == "sdpa"
    if has_sdpa:
        model.set_attn_implementation(BY_EXAMPLE)
    try:
        yield
    finally:
        if has_sdpa:
            model.set_attn_implementation("sdpa")


def shall_pack(
    model: Any, config: ModelConfig, examples: Sequence[Encoded], pad_id: int, processes: Processes
) -> bool:
    """What ``model.packing`` says; where it says nothing, whether packing is exact and saves time.

    Raises:
        UserError: If packing is asked for, and a packed example's loss is not its own.
    """
    wanted = config.packing
    if wanted is None:
        wanted = _may_save_time(model, config, examples, processes)
    if not wanted:
        return False
    is_exact = all(processes.gather([_is_exact(model, examples, pad_id, processes.device)]))
    if config.packing and not is_exact:
        kind, attention = model.config.model_type, model.config._attn_implementation
        raise UserError(
            f"model.packing=true: {kind} with {attention} attention does not keep packed examples apart; "
            "use model.packing=false, or another model.attn_implementation"
        )
    return is_exact


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


@torch.no_grad()
def _is_exact(model: Any, examples: Sequence[Encoded], pad_id: int, device: torch.device) -> bool:
    """Whether a packed example's loss is its own, and does not depend on its neighbour."""
    neighbour, example = max(examples, key=lambda example: len(example.ids)), examples[-1]
    backwards = replace(neighbour, ids=neighbour.ids[::-1].copy())
    slot = (example, 1.0 / example.n_target)
    batches: list[Batch] = [
        collate([(first, 0.0), slot], pad_id, packed=True) for first in (neighbour, backwards)
    ]
    with in_mode(model, training=False), attending_by_example(model):
        one, other, alone = (
            weighted_loss(model, to_device(batch, device)).item()
            for batch in (*batches, collate([slot], pad_id))
        )
    rounding = 1e-4 if model.dtype == torch.float32 else 2e-2
    return math.isclose(one, other, rel_tol=1e-6) and math.isclose(one, alone, rel_tol=rounding)
