"""One forward and backward pass on a fixed sample, layer by layer, with nothing left behind."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_one.collect import watch_activations
from lora_one.data.batches import Batch, collate, window_weights
from lora_one.data.encoding import Encoded
from lora_one.losses import weighted_loss

Look = Callable[[str, Tensor, Tensor], None]
# Seeds of the sample, apart from the training order's and the gradient sample's.
_STREAM = (0, 2)


def probe_batch(examples: Sequence[Encoded], n: int, reduction: str, seed: int, pad_id: int) -> Batch:
    """A seeded choice of n training examples (or all, if there are fewer), as one batch on the CPU."""
    order = np.random.default_rng([seed, *_STREAM]).permutation(len(examples))[:n].tolist()
    weights = window_weights(examples, order, reduction)
    slots = [(examples[index], weight) for index, weight in zip(order, weights, strict=True)]
    return collate(slots, pad_id)


def look_at_layers(model: Any, paths: Sequence[str], batch: Batch, look: Look, *, scale: float = 1.0) -> None:
    """Hands every layer's input and output gradient to ``look``, one layer at a time.

    A layer that is called several times in a pass is handed over once, with the positions of all calls.

    Args:
        model: With its adapters; in any mode.
        paths: Names of the layers.
        batch: On the model's device.
        look: Receives the name, the input x (N, in) and the gradient δ (N, out), float32: ``δᵀ x`` is the
            gradient of the weight that the layer computes with.
        scale: Of the loss in the backward pass, where float16 needs one.
    """
    n_calls: Counter[str] = Counter()
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in paths}
    expected: dict[str, int] = {}

    def add(path: str, x_NI: Tensor, delta_NO: Tensor) -> None:
        parts[path].append((x_NI, delta_NO))
        if len(parts[path]) == expected[path]:
            xs, deltas = zip(*parts.pop(path), strict=True)
            look(path, torch.cat(xs), torch.cat(deltas) / scale)

    def count(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any) -> None:
            n_calls[path] += 1

        return hook

    with watch_activations(model, paths, add), ExitStack() as stack, torch.enable_grad():
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(count(path)).remove)
        loss = weighted_loss(model, batch)
        expected.update(n_calls)  # now: checkpointing would call the layers again
        (loss * scale).backward()
