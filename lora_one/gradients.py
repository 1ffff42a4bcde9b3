"""The gradient estimate: the mean full fine-tuning gradient of each target, and what is kept of it."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_one.collect import collect_gradients
from lora_one.config import ExperimentConfig, InitConfig
from lora_one.data.batches import Batch, Slot, collate, whole_window
from lora_one.data.encoding import Encoded
from lora_one.errors import UserError
from lora_one.losses import to_device, weighted_loss
from lora_one.objectives import AdamFactors
from lora_one.processes import Processes
from lora_one.progress import progress_bar
from lora_one.sketch import SketchedGradient, SketchSize
from lora_one.starts import LayerEstimate, reduce_gradient
from lora_one.streaming import stream_gradients
from lora_one.triplets import Triplets, check_norm, with_signs

# Seeds of the sample, apart from the (seed, epoch) of the training order.
_GRADIENT_STREAM = (0, 1)
_ANNOUNCE_AFTER = 5  # batches
# The gradient of so many examples already points where the whole sample's does.
_WARM_UP_EXAMPLES = 8


@dataclass(frozen=True)
class GradientEstimate:
    """What is known of the targets' gradients, and the sample that they are the mean over."""

    layers: dict[str, LayerEstimate]
    loss: float
    n_examples: int
    n_tokens: int
    seconds: float
    estimator: str = "exact"
    errors: tuple[float, ...] = ()

    def summary(self) -> dict[str, Any]:
        """What the record keeps: the sample, and how well the layers' factors hold what they aim at."""
        known: dict[str, Any] = {}
        triplets = [layer for layer in self.layers.values() if isinstance(layer, Triplets)]
        if triplets:
            kept = [float((t.S_K**2).sum()) / t.norm**2 for t in triplets]
            known = {
                "n_triplets": max(t.S_K.numel() for t in triplets),
                "energy_kept_mean": sum(kept) / len(kept),
                "energy_kept_worst": min(kept),
            }
        fitted = [layer for layer in self.layers.values() if isinstance(layer, AdamFactors)]
        if fitted:
            known = {
                "adam_objective_before_mean": sum(f.before for f in fitted) / len(fitted),
                "adam_objective_after_mean": sum(f.after for f in fitted) / len(fitted),
            }
        return {
            "loss": self.loss,
            "n_examples": self.n_examples,
            "n_tokens": self.n_tokens,
            "seconds": round(self.seconds, 3),
            "estimator": self.estimator,
            **known,
            **({"error_estimate_worst": max(self.errors)} if self.errors else {}),
        }


def sample_indices(n_available: int, config: InitConfig, seed: int) -> list[int]:
    """The examples of the gradient sample: a seeded random choice from the training split.

    Raises:
        UserError: If the sample is larger than the split.
    """
    if config.do_subsampling is False:
        return list(range(n_available))
    wanted, key = config.bsz * config.iters, f"init.bsz*init.iters={config.bsz * config.iters}"
    if config.do_subsampling:
        wanted, key = config.sub_size, f"init.sub_size={config.sub_size}"
    if wanted > n_available:
        raise UserError(f"{key}: the training split has only {n_available} examples; ask for fewer")
    return np.random.default_rng([seed, *_GRADIENT_STREAM]).permutation(n_available)[:wanted].tolist()


def sample_batches(
    examples: Sequence[Encoded], config: ExperimentConfig, pad_id: int, processes: Processes
) -> tuple[list[int], list[list[Slot]]]:
    """The sample's examples, and this process's share of its batches, each example with its weight."""
    indices = sample_indices(len(examples), config.init, config.seed)
    batches = whole_window(
        examples,
        indices,
        batch_size=config.init.bsz,
        reduction=config.model.loss_reduction,
        pad_id=pad_id,
        rank=processes.rank,
        world_size=processes.world_size,
    )
    return indices, batches


def gradient_batches(
    examples: Sequence[Encoded], config: ExperimentConfig, pad_id: int, device: torch.device
) -> Iterator[Batch]:
    """The whole sample as batches on ``device``; nothing is read before the first is asked for."""
    alone = Processes(rank=0, world_size=1, device=device)
    for slots in sample_batches(examples, config, pad_id, alone)[1]:
        yield to_device(collate([(examples[index], weight) for index, weight in slots], pad_id), device)


def estimate_gradient(
    model: Any,
    targets: Sequence[str],
    examples: Sequence[Encoded],
    config: ExperimentConfig,
    *,
    ranks: Mapping[str, int],
    pad_id: int,
    processes: Processes,
) -> GradientEstimate:
    """Estimates the gradient of the training loss at the pretrained weights, exactly and in float32.

    The model runs without dropout. The processes share the sample's batches.

    Args:
        model: The pretrained model, without adapters; quantised or not.
        targets: Names of the layers whose weight gradient is wanted; no other is computed.
        examples: The training split, cut at ``init.max_length``.
        config: ``init`` names the sample and what is made of it, ``model.loss_reduction`` the loss.
        ranks: Adapter rank of each target.
        pad_id: Padding token.
        processes: Who shares the work.

    Raises:
        UserError: If a target's gradient is zero or not finite.
    """
    begin = time.perf_counter()
    indices, batches = sample_batches(examples, config, pad_id, processes)

    def shown_batches() -> Iterable[list[Slot]]:
        shown = progress_bar(batches, shown=processes.is_main, desc="gradient", unit="batch")
        if config.init.do_subsampling is False:
            return _announced(shown, len(batches), len(indices), processes)
        return shown

    errors: list[float] = []
    if config.init.estimator == "exact":
        gradients, loss = accumulate_gradients(
            model, targets, examples, shown_batches(), pad_id, processes.device
        )
        layers = _reduce(gradients, targets, config, ranks, processes)
    else:
        first = sample_batches(examples, config, pad_id, replace(processes, rank=0, world_size=1))[1]
        warm_up = first[: -(-_WARM_UP_EXAMPLES // config.init.bsz)]
        needed = {name: config.gradient_start().triplets_needed(ranks[name]) for name in targets}
        streamed = stream_gradients(
            model,
            targets,
            shown_batches,
            warm_up,
            lambda slots: _run_batch(model, examples, slots, pad_id, processes.device),
            size=sketch_size(max(needed.values())),
            two_passes=config.init.estimator == "sketch_two_pass",
            seed=config.seed,
            processes=processes,
        )
        loss, errors = streamed.loss, [sketched.error for sketched in streamed.layers.values()]
        layers = {name: _triplets(name, part, needed[name]) for name, part in streamed.layers.items()}
    return GradientEstimate(
        layers=layers,
        estimator=config.init.estimator,
        errors=tuple(errors),
        loss=float(processes.sum_(torch.tensor(loss))),
        n_examples=len(indices),
        n_tokens=sum(len(examples[index].ids) for index in indices),
        seconds=time.perf_counter() - begin,
    )


def accumulate_gradients(
    model: Any,
    targets: Sequence[str],
    examples: Sequence[Encoded],
    batches: Iterable[list[Slot]],
    pad_id: int,
    device: torch.device,
) -> tuple[dict[str, Tensor], float]:
    """Sums the weighted gradients of the targets' weights over ``batches``.

    Returns:
        Per target ``G_OI`` in float32 on the CPU, and the summed loss.
    """
    with collect_gradients(model, targets) as sums:
        total = sum(_run_batch(model, examples, slots, pad_id, device) for slots in batches)
    return sums.G_OI, total


def sketch_size(n_triplets: int) -> SketchSize:
    """Columns of the sketches that find ``n_triplets`` triplets well: twice as many, at least 32."""
    right = max(32, 2 * n_triplets)
    return SketchSize(right=right, left=2 * right)


def _run_batch(
    model: Any, examples: Sequence[Encoded], slots: list[Slot], pad_id: int, device: torch.device
) -> float:
    batch = collate([(examples[index], weight) for index, weight in slots], pad_id)
    loss = weighted_loss(model, to_device(batch, device))
    loss.backward()
    return loss.item()


def _reduce(
    gradients: dict[str, Tensor],
    targets: Sequence[str],
    config: ExperimentConfig,
    ranks: Mapping[str, int],
    processes: Processes,
) -> dict[str, LayerEstimate]:
    """Sums over the processes, and keeps of each gradient what its start needs."""
    for G_OI in {id(tensor): tensor for tensor in gradients.values()}.values():
        processes.sum_(G_OI)
    start, generator = config.gradient_start(), torch.Generator().manual_seed(config.seed)
    return {
        name: reduce_gradient(name, gradients.pop(name).to(processes.device), start, ranks[name], generator)
        for name in targets
    }


def _triplets(name: str, part: SketchedGradient, n_triplets: int) -> Triplets:
    norm = check_norm(name, part.norm)
    return with_signs(part.U_OK[:, :n_triplets], part.S_K[:n_triplets], part.V_IK[:, :n_triplets], norm)


def _announced(
    batches: Iterable[list[Slot]], n_batches: int, n_examples: int, processes: Processes
) -> Iterator[list[Slot]]:
    """Passes the batches on, and after a few says how long all of them will take."""
    measured = min(_ANNOUNCE_AFTER, n_batches)
    start = time.perf_counter()
    for number, batch in enumerate(batches):
        if number == measured:
            expected = (time.perf_counter() - start) / measured * n_batches / 60
            processes.say(
                f"init.do_subsampling=false: gradient of the whole training split, {n_examples:,} examples, "
                f"expected {expected:.1f} min"
            )
        yield batch
