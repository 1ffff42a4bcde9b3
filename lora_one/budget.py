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
from lora_one.processes import Processes

# On two cores, micro-batches of 512, 1,024, 2,048 and 4,096 tokens: scripts/bench_training.py --budgets.
_TOKENS_PER_THREAD = 512
# More tokens make no GPU faster; they only make the micro-batches of a window uneven.
_MOST_TOKENS = 16_384
_SHARE_OF_FREE_MEMORY = 0.8
# Gradient, and AdamW's two moments, of a trained float32 number.
_OPTIMISER_BYTES = 12


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
    max_tokens = config.max_tokens_per_device
    if max_tokens is None and processes.device.type == "cuda":
        longest = max(examples, key=lambda example: len(example.ids))
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(processes.device)[0]
        found = tokens_that_fit(
            lambda n: _peak_bytes(model, longest, n, config, pad_id, processes.device),
            len(longest.ids),
            int(_SHARE_OF_FREE_MEMORY * free) - _OPTIMISER_BYTES * _n_trained(model),
        )
        max_tokens = min(processes.gather([found]))
    return Limits(
        max_tokens=max_tokens or _TOKENS_PER_THREAD * torch.get_num_threads(), packed=config.packing
    )


@torch.no_grad()
def check_packing(model: Any, examples: Sequence[Encoded], pad_id: int, device: torch.device) -> None:
    """Raises UserError if packed examples see each other: then the loss of one depends on its neighbour."""
    neighbour, example = examples[0], examples[-1]
    backwards = replace(neighbour, ids=neighbour.ids[::-1].copy())
    was_training = model.training
    model.eval()
    losses = []
    for first in (neighbour, backwards):
        batch = collate([(first, 0.0), (example, 1.0 / example.n_target)], pad_id, packed=True)
        losses.append(weighted_loss(model, to_device(batch, device)).item())
    model.train(was_training)
    if not math.isclose(*losses, rel_tol=1e-6):
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
    with torch.random.fork_rng(devices=[device]), torch.autocast("cuda", dtype, config.bf16 or config.fp16):
        weighted_loss(model, batch).backward()
    model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated(device) - before


def _n_trained(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
