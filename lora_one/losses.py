"""The one training loss, shared by training, gradient estimation and validation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_one.data.batches import Batch

# The attention of a model that takes packed rows example by example; ``packing`` has it.
BY_EXAMPLE = "sdpa_by_example"


def weighted_loss(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of a micro-batch, each target token times its weight.

    The head and the loss are computed where there is a target and nowhere else. A causal model gets no
    padding mask: what stands to the right of a token cannot reach it, and padding carries no loss.

    Args:
        model: A causal language model, or an encoder with a decoder; wrapped for several processes or not.
        batch: As ``collate`` makes it. The weights of a whole window make the sum over its micro-batches
            the window's mean loss.

    Returns:
        A float32 scalar.
    """
    inner = getattr(model, "module", model)
    inputs: dict[str, Any] = {
        name: tensor for name, tensor in batch.items() if name in ("input_ids", "position_ids")
    }
    if inner.config.is_encoder_decoder:
        inputs = pair_inputs(inner, batch)
    if "lengths" in batch and inner.config._attn_implementation == BY_EXAMPLE:
        # No mask has to be made: one of four dimensions goes to the attention as it is.
        no_mask = torch.zeros(1, 1, 1, 1, device=batch["input_ids"].device)
        inputs |= {"attention_mask": no_mask, "packed_lengths": batch["lengths"].tolist()}
    positions_N = batch["positions"]
    with _head_only_at(inner.get_output_embeddings(), positions_N) as is_told:
        logits_NV = model(**inputs, use_cache=False).logits.flatten(0, -2)
    if not is_told():
        logits_NV = logits_NV[positions_N]
    losses_N = cross_entropy(logits_NV.float(), batch["targets"], reduction="none")
    return (losses_N * batch["weights"]).sum()


def pair_inputs(model: Any, batch: Batch) -> Batch:
    """What an encoder with a decoder reads of a batch of pairs: prompts, and targets one place later."""
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=batch["labels"]),
    }


@contextmanager
def _head_only_at(head: Any, positions_N: Tensor) -> Iterator[Callable[[], bool]]:
    """Inside, the output head sees one row of the chosen positions instead of the whole batch.

    What it gives tells whether the head, where the model has one, has been called.
    """
    calls: list[None] = []

    def choose(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        calls.append(None)
        hidden, *others = inputs
        # Of a model on several devices the head may be on another than the batch.
        return hidden.flatten(0, -2)[positions_N.to(hidden.device)][None], *others

    # First of all hooks: others that watch the head see the same rows in its inputs as in its outputs.
    handle = None if head is None else head.register_forward_pre_hook(choose, prepend=True)
    try:
        yield lambda: bool(calls)
    finally:
        if handle is not None:
            handle.remove()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``, but for the lengths, which are read by the host."""
    return {name: tensor if name == "lengths" else tensor.to(device) for name, tensor in batch.items()}
