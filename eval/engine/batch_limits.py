"""How many tokens a batch may hold, where nobody has said so."""

import torch

from eval.engine.continuous import Limits
from eval.engine.row_batch import Decoder, Prompt, RowBatch
from lora_one.memory import free_host_bytes

# Measured on a CPU with scripts/bench_eval.py: 384 rows at once are a quarter faster than 128 that are
# refilled as they end.
_MOST_ROWS = 512
_MOST_TOKENS = 1_048_576
_SHARE_OF_FREE_MEMORY = 0.6  # the rest is for activations, logits, and copies of single layers
_PROBED = [0] * 8


def batch_limits(decoder: Decoder, max_tokens: int | None, batch_size: int | None) -> Limits:
    """What was asked for, or else what suits the device.

    Without ``max_tokens`` the cache may take six tenths of the memory that is free, which is asked of
    the device, divided by what the cache of a token takes, which is measured. The
    processes of a machine without an accelerator share its memory. ``batch_size`` is a
    further limit; without it there are at most 512 rows.
    """
    rows = batch_size or _MOST_ROWS
    if max_tokens is not None:
        return Limits(max_tokens, rows)
    probe = RowBatch(decoder, [Prompt(0, _PROBED)])
    fits = int(_SHARE_OF_FREE_MEMORY * _free_bytes(decoder.device) / probe.bytes_per_token())
    return Limits(min(fits, _MOST_TOKENS), rows)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return free_host_bytes()
