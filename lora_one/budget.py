"""How many tokens one micro-batch should hold, where nobody has said so."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lora_one.config import ModelConfig
from lora_one.data.batches import Limits, collate
from lora_one.data.encoding import Encoded
from lora_one.losses import to_device, weighted_loss
from lora_one.modes import in_mode
from lora_one.packing import Packing, attending
from lora_one.processes import Processes

# A thousand or two on two cores are faster than half or twice as many: scripts/bench_training.py --budgets.
_TOKENS_PER_THREAD = 512
_PACKED_TOKENS_PER_THREAD = 1_024  # without padding there is no price for more
# More tokens make no GPU faster; they only make the micro-batches of a window uneven.
_MOST_TOKENS = 16_384
_UNMEASURED_TOKENS = 4_096
_SHARE_OF_FREE_MEMORY = 0.8
_OPTIMISER_BYTES = 8  # AdamW's two moments of a trained number


def micro_batch_limits(
    model: Any,
    config: ModelConfig,
    examples: Sequence[Encoded],
    pad_id: int,
    processes: Processes,
    *,
    packing: Packing = Packing.NONE,
) -> Limits:
    """What ``model.per_device_batch_size`` or ``model.max_tokens_per_device`` say, or else what fits.

    Args:
        model: The model as it will be trained, on its device, not yet wrapped for several processes.
        config: Its settings.
        examples: The training split.
        pad_id: Padding token.
        processes: All use the smallest of what they find.
        packing: How the examples of a micro-batch will stand together.
    """
    packed = packing is not Packing.NONE
    if config.per_device_batch_size is not None:
        return Limits(max_examples=config.per_device_batch_size, packed=packed)
    found = config.max_tokens_per_device or _what_suits(
        model, config, examples, pad_id, processes.device, packing
    )
    return Limits(max_tokens=min(processes.gather([found])), packed=packed)


def _what_suits(
    model: Any,
    config: ModelConfig,
    examples: Sequence[Encoded],
    pad_id: int,
    device: torch.device,
    packing: Packing,
) -> int:
    packed = packing is not Packing.NONE
    if device.type == "cpu":
        per_thread = _PACKED_TOKENS_PER_THREAD if packed else _TOKENS_PER_THREAD
        return min(_MOST_TOKENS, per_thread * torch.get_num_threads())
    # Several devices fill up differently, and the mask of a packed row grows with its square.
    has_mask = packing is Packing.BY_MODEL and "flash" not in model.config._attn_implementation
    if device.type != "cuda" or config.device_map is not None or has_mask:
        return _UNMEASURED_TOKENS
    longest = max(examples, key=lambda example: len(example.ids))
    if not longest.is_pair:
        longest = replace(longest, n_prompt=1)  # the head takes most where all tokens are targets
    with in_mode(model, training=True), attending(model, packing):
        _peak_bytes(
            model, longest, 1, config, pad_id, device, packed
        )  # libraries take memory of their own once
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        return tokens_that_fit(
            lambda n: _peak_bytes(model, longest, n, config, pad_id, device, packed),
            len(longest.ids),
            int(_SHARE_OF_FREE_MEMORY * free) - _OPTIMISER_BYTES * _n_trained(model),
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
    model: Any,
    example: Encoded,
    n: int,
    config: ModelConfig,
    pad_id: int,
    device: torch.device,
    packed: bool,
) -> int:
    batch = to_device(collate([(example, 1.0)] * n, pad_id, packed=packed), device)
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
