"""From gradients and weights to the start of every adapted layer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_one.inits import (
    ALIASES,
    SCALE_ALIASES,
    AdapterInit,
    clip_to_weight,
    init_factors,
    triplets_needed,
    weight_factors,
)
from lora_one.objectives import AdamFactors, decompose_for, minimise_adam_objective
from lora_one.triplets import Triplets, leading_svd

LayerEstimate = Triplets | AdamFactors
ReadWeight = Callable[[str], Tensor]


@dataclass(frozen=True)
class GradientStart:
    """Which start is made of a gradient; the names are those of ``init_factors`` and ``objectives``."""

    direction: str
    scale: str
    gamma: float
    normalize: str = "spectral"
    objective: str = "gradient"
    norm_clip: bool = False
    seed: int = 0

    @property
    def shifts_base(self) -> bool:
        """Whether the base weight is shifted, so that the model starts as the same function."""
        return self.direction != "LoRA-One"

    def triplets_needed(self, rank: int) -> int:
        """Singular triplets that this start reads at ``rank``."""
        return triplets_needed(ALIASES.get(self.direction, self.direction), rank)

    def conflict(self) -> tuple[str, str] | None:
        """The setting that does not go with another, and why; None where all go together."""
        if self.objective == "adam" and self.direction == "LoRA-One":
            return (
                "objective",
                "adam chooses both factors for the first Adam step, which LoRA-One takes itself; "
                "use sign, or direction LoRA-GA",
            )
        if self.objective == "adam" and SCALE_ALIASES.get(self.scale, self.scale) != "gd":
            return "objective", "adam fixes the size of the factors too; use it with scale gd"
        return None


def reduce_gradient(
    name: str,
    G_OI: Tensor,
    start: GradientStart,
    rank: int,
    generator: torch.Generator,
    n_triplets: int | None = None,
) -> LayerEstimate:
    """What ``start`` needs to know of a gradient (out, in), float32 on the device to compute on.

    Keeps ``n_triplets`` triplets, or as many as ``start`` reads at ``rank``.

    Raises:
        UserError: If the gradient is zero or not finite.
    """
    if start.objective == "adam":
        return minimise_adam_objective(name, G_OI, rank=rank, direction=start.direction, generator=generator)
    return decompose_for(start.objective, name, G_OI, n_triplets or start.triplets_needed(rank))


def gradient_starts(
    estimates: Mapping[str, LayerEstimate],
    start: GradientStart,
    *,
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    read_weight: ReadWeight,
) -> dict[str, AdapterInit]:
    """The start of every target from what is known of its gradient.

    Args:
        estimates: Full layer name to singular triplets, or to factors with objective ``adam``.
        start: The settings.
        ranks: Adapter rank of each layer.
        scalings: The adapter's s of each layer.
        read_weight: Gives the pretrained weight (out, in) of a layer, float32; called only where the
            scale or ``norm_clip`` asks for it.
    """
    generator = torch.Generator().manual_seed(start.seed)
    inits = {}
    for name, estimate in estimates.items():
        rank, scaling = ranks[name], scalings[name]
        if isinstance(estimate, AdamFactors):
            init = AdapterInit(estimate.A_RI / scaling, estimate.B_OR / scaling, shifts_base=True)
        else:
            init = init_factors(
                estimate.U_OK,
                estimate.S_K,
                estimate.V_IK,
                rank=rank,
                direction=start.direction,
                scale=start.scale,
                gamma=start.gamma,
                scaling=scaling,
                normalize=start.normalize,
                weight_sigma_K=_weight_sigma(start, read_weight, name, rank),
                generator=generator,
            )
        if start.norm_clip:
            init = clip_to_weight(init, read_weight(name).cpu(), scaling)
        inits[name] = init
    return inits


def weight_starts(
    names: tuple[str, ...],
    *,
    scale: str,
    gamma: float,
    norm_clip: bool,
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    read_weight: ReadWeight,
) -> dict[str, AdapterInit]:
    """The start of every target from the singular triplets of its weight (``init.mode=svd``)."""
    inits = {}
    for name in names:
        W_OI = read_weight(name)
        U_OK, S_K, V_IK = (part.cpu() for part in leading_svd(W_OI, ranks[name]))
        init = weight_factors(
            U_OK, S_K, V_IK, rank=ranks[name], scale=scale, gamma=gamma, scaling=scalings[name]
        )
        inits[name] = clip_to_weight(init, W_OI.cpu(), scalings[name]) if norm_clip else init
    return inits


def _weight_sigma(start: GradientStart, read_weight: ReadWeight, name: str, rank: int) -> Tensor | None:
    if SCALE_ALIASES.get(start.scale, start.scale) != "weightS":
        return None
    return leading_svd(read_weight(name), rank)[1].cpu()
