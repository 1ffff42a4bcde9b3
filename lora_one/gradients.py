"""The gradient estimate: the mean full fine-tuning gradient of each target, and its singular triplets."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_one.config import ExperimentConfig, InitConfig
from lora_one.data.batches import Slot, collate, whole_window
from lora_one.data.encoding import Encoded
from lora_one.errors import UserError
from lora_one.losses import to_device, weighted_loss
from lora_one.processes import Processes
from lora_one.progress import progress_bar

# Above this a full SVD takes minutes a layer; the randomised one then finds the leading triplets of a
# spectrum that decays, as those of gradients do.
_FULL_SVD_LIMIT = 1024
# Seeds of the sample, apart from the (seed, epoch) of the training order.
_GRADIENT_STREAM = (0, 1)
_ANNOUNCE_AFTER = 5  # batches


@dataclass(frozen=True)
class Triplets:
    """Leading singular triplets of one gradient, float32 on the CPU; ``norm`` is ‖G‖_F."""

    U_OK: Tensor
    S_K: Tensor
    V_IK: Tensor
    norm: float


@dataclass(frozen=True)
class GradientEstimate:
    """The estimate for all targets, and the sample that it is the mean over."""

    triplets: dict[str, Triplets]
    loss: float
    n_examples: int
    n_tokens: int
    seconds: float

    def summary(self) -> dict[str, Any]:
        """What the record keeps: the sample, and how much of each gradient the triplets hold."""
        kept = [float((t.S_K**2).sum()) / t.norm**2 for t in self.triplets.values()]
        return {
            "loss": self.loss,
            "n_examples": self.n_examples,
            "n_tokens": self.n_tokens,
            "seconds": round(self.seconds, 3),
            "n_triplets": max(t.S_K.numel() for t in self.triplets.values()),
            "energy_kept_mean": sum(kept) / len(kept),
            "energy_kept_worst": min(kept),
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


def estimate_gradient(
    model: Any,
    targets: Sequence[str],
    examples: Sequence[Encoded],
    config: ExperimentConfig,
    *,
    n_triplets: int,
    pad_id: int,
    processes: Processes,
) -> GradientEstimate:
    """Estimates the gradient of the training loss at the pretrained weights, exactly and in float32.

    The model runs without dropout. The processes share the sample's batches.

    Args:
        model: The pretrained model, without adapters.
        targets: Names of the layers whose weight gradient is wanted; no other is computed.
        examples: The training split, cut at ``init.max_length``.
        config: ``init`` names the sample, ``model.loss_reduction`` the loss.
        n_triplets: Leading singular triplets to keep for each target.
        pad_id: Padding token.
        processes: Who shares the work.

    Raises:
        UserError: If a target's gradient is zero or not finite.
    """
    start = time.perf_counter()
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
    progress: Iterable[list[Slot]] = progress_bar(
        batches, shown=processes.is_main, desc="gradient", unit="batch"
    )
    if config.init.do_subsampling is False:
        progress = _announced(progress, len(batches), len(indices), processes)
    gradients, loss = accumulate_gradients(model, targets, examples, progress, pad_id, processes.device)
    for name in targets:
        processes.sum_(gradients[name])
    triplets = {
        name: decompose(name, gradients.pop(name).to(processes.device), n_triplets) for name in targets
    }
    return GradientEstimate(
        triplets=triplets,
        loss=float(processes.sum_(torch.tensor(loss))),
        n_examples=len(indices),
        n_tokens=sum(len(examples[index].ids) for index in indices),
        seconds=time.perf_counter() - start,
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
        Per target ``G_OI`` in float32 on the CPU, and the summed loss. A weight's own gradient lives
        on the device only until it is added up.
    """
    gradients: dict[str, Tensor] = {}
    total = 0.0
    with _only_target_gradients(model, targets, gradients):
        for slots in batches:
            batch = collate([(examples[index], weight) for index, weight in slots], pad_id)
            loss = weighted_loss(model, to_device(batch, device))
            loss.backward()
            total += loss.item()
    return gradients, total


def decompose(name: str, G_OI: Tensor, n_triplets: int) -> Triplets:
    """Leading singular triplets of a gradient, computed on its device.

    The sign is fixed once, here: the entry of largest magnitude in each column of U is positive.

    Raises:
        UserError: If the gradient is zero or not finite, naming the target.
    """
    norm = float(torch.linalg.norm(G_OI))
    if not np.isfinite(norm):
        raise UserError(f"{name}: its gradient is not finite; check the data, or use model.bf16=false")
    if norm == 0.0:
        raise UserError(
            f"{name}: its gradient is zero; leave it out of peft.lora_target_modules, or check the data"
        )
    if min(G_OI.shape) <= _FULL_SVD_LIMIT:
        U_OK, S_K, Vt_KI = torch.linalg.svd(G_OI, full_matrices=False)
        V_IK = Vt_KI.T
    else:
        with torch.random.fork_rng(devices=[G_OI.device] if G_OI.is_cuda else []):
            torch.manual_seed(0)  # svd_lowrank takes no generator
            U_OK, S_K, V_IK = torch.svd_lowrank(G_OI, q=max(4 * n_triplets, 64), niter=8)
    U_OK, S_K, V_IK = U_OK[:, :n_triplets], S_K[:n_triplets], V_IK[:, :n_triplets]
    largest_K = U_OK.abs().argmax(dim=0)
    sign_K = U_OK[largest_K, torch.arange(U_OK.shape[1], device=G_OI.device)].sign()
    return Triplets((U_OK * sign_K).cpu(), S_K.cpu(), (V_IK * sign_K).cpu(), norm)


@contextmanager
def _only_target_gradients(
    model: Any, targets: Sequence[str], gradients: dict[str, Tensor]
) -> Iterator[None]:
    """Lets only the targets' weights take gradients, and moves each to ``gradients`` as it is made."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    _without_dropout(model)
    model.requires_grad_(False)
    handles = []
    for name in targets:
        layer = model.get_submodule(name)
        gradients[name] = torch.zeros(layer.weight.shape, dtype=torch.float32)
        handles.append(_collect(layer.weight, gradients[name]))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _without_dropout(model: Any) -> None:
    """Eval mode; with gradient checkpointing, which works in train mode only, just where dropout is."""
    checkpoints = getattr(model, "is_gradient_checkpointing", False)
    model.train(checkpoints)
    for module in model.modules():
        if isinstance(module, nn.Dropout) or hasattr(module, "attention_dropout"):
            module.eval()


def _collect(weight: nn.Parameter, G_OI: Tensor) -> Any:
    def move(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None  # the hook runs when it has just been made
        G_OI.add_(parameter.grad.to(device="cpu", dtype=torch.float32))
        parameter.grad = None

    weight.requires_grad_(True)
    return weight.register_post_accumulate_grad_hook(move)


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
