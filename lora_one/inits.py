"""Adapter initialisations from the singular triplets of a gradient, as pure functions.

Sources: LoRA-GA (arXiv 2407.05000, §3.2-3.3) and LoRA-One (arXiv 2502.01235, Algorithm 1). Papers
that write ``W + A B`` with ``A`` (out x r) mean our ``B_OR`` by their ``A``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Which of the first 2r singular vectors go to (lora_B, lora_A).
_INDICES = {
    "ArB2r": lambda r: (torch.arange(r, 2 * r), torch.arange(r)),
    "A2rBr": lambda r: (torch.arange(r), torch.arange(r, 2 * r)),
    "ArBr": lambda r: (torch.arange(0, 2 * r, 2), torch.arange(1, 2 * r, 2)),
}
ALIASES = {"LoRA-GA": "ArB2r"}


@dataclass(frozen=True)
class AdapterInit:
    """The start of one adapted layer.

    Attributes:
        A_RI: ``lora_A``, float32.
        B_OR: ``lora_B``, float32.
        shifts_base: Whether ``s · B A`` has to be taken off the base weight, so that the model
            starts as the same function (LoRA-GA); false where the adapter is itself the first
            step (LoRA-One).
    """

    A_RI: Tensor
    B_OR: Tensor
    shifts_base: bool


def triplets_needed(direction: str, rank: int) -> int:
    """How many leading singular triplets ``direction`` reads at ``rank``."""
    return rank if direction == "LoRA-One" else 2 * rank


def init_factors(
    U_OK: Tensor,
    S_K: Tensor,
    V_IK: Tensor,
    *,
    rank: int,
    direction: str,
    scale: str,
    gamma: float,
    scaling: float,
    normalize: str = "spectral",
    generator: torch.Generator | None = None,
) -> AdapterInit:
    """Adapter factors from the leading singular triplets of the weight gradient.

    Args:
        U_OK: Left singular vectors of the gradient, columns in descending order of ``S_K``.
        S_K: Singular values.
        V_IK: Right singular vectors.
        rank: Adapter rank r.
        direction: ``LoRA-One``, ``ArB2r`` (``LoRA-GA``), ``A2rBr``, ``ArBr`` or ``random``.
        scale: ``stable`` (LoRA-One: ``1/√gamma``; others: ``d_out^¼/√gamma``), ``gd`` (``1/scaling``)
            or ``unit`` (1), multiplied into each factor.
        gamma: The papers' γ, used by ``stable``.
        scaling: The adapter's s.
        normalize: LoRA-One only. ``spectral`` divides the singular values by the largest (Algorithm
            1 and the released code); ``none`` leaves them, the plain gradient step of the README.
        generator: Source of randomness for ``random``; required there.

    Returns:
        The factors. With ``LoRA-One``, ``scale="stable"`` and ``spectral``,
        ``s · B A = -(s / (γ σ₁)) · [G]_r``, [G]_r being the best rank-r approximation.

    Raises:
        ValueError: For an unknown name, or too few triplets.
    """
    direction = ALIASES.get(direction, direction)
    needed = triplets_needed(direction, rank)
    if S_K.numel() < needed:
        raise ValueError(f"{direction} at rank {rank} needs {needed} singular triplets, got {S_K.numel()}")
    factor = _scale_factor(scale, direction, gamma, scaling, d_out=U_OK.shape[0])
    if direction == "LoRA-One":
        sigma_R = S_K[:rank] / S_K[0] if normalize == "spectral" else S_K[:rank]
        root_R = sigma_R.sqrt() * factor
        return AdapterInit((V_IK[:, :rank] * root_R).T, -U_OK[:, :rank] * root_R, shifts_base=False)
    left, right = _indices(direction, rank, generator)
    return AdapterInit(V_IK[:, right].T * factor, U_OK[:, left] * factor, shifts_base=True)


def _indices(direction: str, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    if direction == "random":
        if generator is None:
            raise ValueError("direction 'random' needs a seeded generator")
        # Disjoint halves: with equal indices the first step is no longer the best of rank 2r.
        order = torch.randperm(2 * rank, generator=generator)
        return order[:rank], order[rank:]
    if direction not in _INDICES:
        valid = ["LoRA-One", "LoRA-GA", *_INDICES, "random"]
        raise ValueError(f"unknown direction {direction!r}; valid: {', '.join(valid)}")
    return _INDICES[direction](rank)


def _scale_factor(scale: str, direction: str, gamma: float, scaling: float, d_out: int) -> float:
    if scale == "stable":
        return gamma**-0.5 if direction == "LoRA-One" else d_out**0.25 * gamma**-0.5
    if scale == "gd":
        return 1 / scaling
    if scale == "unit":
        return 1.0
    raise ValueError(f"unknown scale {scale!r}; valid: stable, gd, unit")
