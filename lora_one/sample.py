"""The gradient sample: which training examples, in which batches, on which process."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lora_one.config import ExperimentConfig, InitConfig
from lora_one.data.batches import EMPTY, Batch, Slot, collate_slots, whole_window
from lora_one.data.encoding import Encoded
from lora_one.errors import UserError
from lora_one.losses import to_device
from lora_one.processes import Processes

# Seeds of the sample, apart from the (seed, epoch) of the training order.
_GRADIENT_STREAM = (0, 1)


def sample_indices(n_available: int, config: InitConfig, seed: int) -> list[int]:
    """The examples of the gradient sample: a seeded random choice from the training split.

    Raises:
        UserError: If the sample is larger than the split.
    """
    wanted, key = config.bsz * config.iters, f"init.bsz*init.iters={config.bsz * config.iters}"
    if config.do_subsampling:
        wanted, key = config.sub_size, f"init.sub_size={config.sub_size}"
    if config.do_subsampling is False:
        wanted = n_available
    if wanted > n_available:
        raise UserError(f"{key}: the training split has only {n_available} examples; ask for fewer")
    return np.random.default_rng([seed, *_GRADIENT_STREAM]).permutation(n_available)[:wanted].tolist()


def sample_batches(
    examples: Sequence[Encoded], config: ExperimentConfig, processes: Processes
) -> tuple[list[int], list[list[Slot]]]:
    """The sample's examples, and this process's share of its batches, each example with its weight.

    Every process gets the same number of batches, empty ones if need be: sharded models and collective
    steps wait for each other.
    """
    indices = sample_indices(len(examples), config.init, config.seed)
    batches = whole_window(
        examples,
        indices,
        batch_size=config.init.bsz,
        reduction=config.model.loss_reduction,
        rank=processes.rank,
        world_size=processes.world_size,
    )
    n_batches = -(-len(indices) // config.init.bsz)
    missing = -(-n_batches // processes.world_size) - len(batches)
    return indices, batches + [[EMPTY]] * missing


def gradient_batches(
    examples: Sequence[Encoded], config: ExperimentConfig, pad_id: int, device: torch.device
) -> Iterator[Batch]:
    """The whole sample as batches on ``device``; nothing is read before the first is asked for."""
    alone = Processes(rank=0, world_size=1, device=device)
    for slots in sample_batches(examples, config, alone)[1]:
        yield to_device(collate_slots(examples, slots, pad_id), device)
