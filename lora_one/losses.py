"""The one training loss, shared by training, gradient estimation and validation."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_one.data.batches import IGNORED, Batch


def weighted_loss(model: Any, batch: Batch) -> Tensor:
    """Next-token cross-entropy of a micro-batch, each target token times its example's weight.

    Args:
        model: A causal language model.
        batch: ``input_ids``, ``attention_mask``, ``labels`` (B, T) and ``weights`` (B,). The
            weights of a whole window make the sum over its micro-batches the window's mean loss.

    Returns:
        A float32 scalar.
    """
    logits_BTV = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    targets_BT = batch["labels"][:, 1:]
    losses_BT = cross_entropy(
        logits_BTV[:, :-1].transpose(1, 2).float(), targets_BT, ignore_index=IGNORED, reduction="none"
    )
    return (losses_BT.sum(dim=1) * batch["weights"]).sum()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
