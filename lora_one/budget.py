"""How many tokens one micro-batch should hold, where nobody has said so."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lora_one.config import ModelConfig
from lora_one.data.batches import Limits, collate
from lora_one.data.encoding import Encoded
from lora_one.errors import UserError
from lora_one.losses import to_device, weighted_loss
from lora_one.modes import in_mode
from lora_one.processes import Processes

# A thousand or two on two cores are faster than half or twice as many: scripts/bench_training.py --budgets.
_TOKENS_PER_THREAD = 512
# More tokens make no GPU faster; they only make the micro-batches of a window uneven.
_MOST_TOKENS = 16_384
_UNMEASURED_TOKENS = 4_096
_SHARE_OF_FREE_MEMORY = 0.8
_OPTIMISER_BYTES = 8  # AdamW's two moments of a trained number


def micro_batch_limits(
    model: Any, config: ModelConfig, examples: Sequence[Encoded], pad_id: int, processes: Processes
) -> Limits:
    """What ``model.per_device_batch_size`` or ``model.max_tokens_per_device`` say, or else what fits.

    Args:
        model: The model as it will be trained, on its device, not yet wrapped for several processes.
        config: Its settings.
        examples: The training split.
        pad_id: Padding token.
        processes: All use the smallest of what they find.
    """
    if config.per_device_batch_size is not None:
        return Limits(max_examples=config.per_device_batch_size, packed=config.packing)
    found = config.max_tokens_per_device or _what_suits(model, config, examples, pad_id, processes.device)
    return Limits(max_tokens=min(processes.gather([found])), packed=config.packing)


def _what_suits(
    model: Any, config: ModelConfig, examples: Sequence[Encoded], pad_id: int, device: torch.device
) -> int:
    if device.type == "cpu":
        return min(_MOST_TOKENS, _TOKENS_PER_THREAD * torch.get_num_threads())
    # Several devices fill up differently, and the mask of a packed row grows with its square.
    grows_evenly = not config.packing or "flash" in model.config._attn_implementation
    if device.type != "cuda" or config.device_map is not None or not grows_evenly:
        return _UNMEASURED_TOKENS
    longest = max(examples, key=lambda example: len(example.ids))
    if not longest.is_pair:
        longest = replace(longest, n_prompt=1)  # the head takes most where all tokens are targets
    with in_mode(model, training=True):
        _peak_bytes(model, longest, 1, config, pad_id, device)  # libraries take memory of their own once
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        return tokens_that_fit(
            lambda n: _peak_bytes(model, longest, n, config, pad_id, device),
            len(longest.ids),
            int(_SHARE_OF_FREE_MEMORY * free) - _OPTIMISER_BYTES * _n_trained(model),
        )


@torch.no_grad()
def check_packing(model: Any, examples: Sequence[Encoded], pad_id: int, device: torch.device) -> None:
    """Raises UserError if a packed example's loss is not its own, or depends on its neighbour."""
    neighbour, example = max(examples, key=lambda example: len(example.ids)), examples[-1]
    backwards = replace(neighbour, ids=neighbour.ids[::-1].copy())
    slot = (example, 1.0 / example.n_target)
    batches = [collate([(first, 0.0), slot], pad_id, packed=True) for first in (neighbour, backwards)]
    with in_mode(model, training=False):
        one, other, alone = (
            weighted_loss(model, to_device(batch, device)).item()
            for batch in (*batches, collate([slot], pad_id))
        )
    rounding = 1e-4 if model.dtype == torch.float32 else 2e-2
    if not (math.isclose(one, other, rel_tol=1e-6) and math.isclose(one, alone, rel_tol=rounding)):
        kind, attention = model.config.model_type, model.config._attn_implementation
        raise UserError(
            f"model.packing=true: {kind} with {attention} attention does not keep packed examples apart; "
            "use model.packing=false, or another model.attn_implementation"
        )


def tokens_that_fit(peak_bytes: Callable[[int], int], length: int, free: int) -> int:
    """Tokens of the largest micro-batch that fits, from what one and two examples take.

    Args:
        peak_bytes: Peak memory that a forward and backward pass of so many examples adds.
        length: Tokens of each example.
        free: Bytes to stay within.

    Returns:
        At least ``length``: a single example has to be tried in any case.
    """
    one = peak_bytes(1)
    try:
        slope = max(1, peak_bytes(2) - one)
    except torch.OutOfMemoryError:
        return length
    more = max(0, free - one) // slope
    return max(length, min(_MOST_TOKENS, int(length * (1 + more))))


def _peak_bytes(
    model: Any, example: Encoded, n: int, config: ModelConfig, pad_id: int, device: torch.device
) -> int:
    batch = to_device(collate([(example, 1.0)] * n, pad_id, packed=config.packing), device)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    dtype = torch.bfloat16 if config.bf16 else torch.float16
    try:
        with (
            torch.random.fork_rng(devices=[device]),
            torch.autocast("cuda", dtype, config.bf16 or config.fp16),
        ):
            weighted_loss(model, batch).backward()
        return torch.cuda.max_memory_allocated(device) - before
    finally:
        model.zero_grad(set_to_none=True)


def _n_trained(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
