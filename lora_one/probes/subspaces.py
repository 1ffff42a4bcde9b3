"""Do A and B lie in the gradient's leading singular spaces?

LoRA-One's theory (arXiv 2502.01235) has plain LoRA's B turn into the leading left singular space of the
gradient at the pretrained weights; LoRA-GA and LoRA-One start there.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Directions of a factor that are smaller than this share of its largest are rounding.
_SMALLEST = 1e-6


@dataclass(frozen=True)
class Spaces:
    """Orthonormal bases of a gradient's leading singular spaces.

    Attributes:
        U_OK: Left.
        V_IK: Right.
    """

    U_OK: Tensor
    V_IK: Tensor


def column_space(M_DK: Tensor) -> Tensor | None:
    """An orthonormal basis of the columns' span; None of a zero matrix."""
    U, S, _ = torch.linalg.svd(M_DK.double(), full_matrices=False)
    return U[:, S / S[0] > _SMALLEST] if bool(S[0] > 0) else None


def principal_cosines(P_DK: Tensor, Q_DJ: Tensor) -> Tensor:
    """Cosines of the principal angles between two spaces, from the smallest angle on.

    Args:
        P_DK: Orthonormal basis of one.
        Q_DJ: Orthonormal basis of the other.

    Returns:
        min(K, J) numbers in [0, 1], float64.
    """
    return torch.linalg.svdvals(P_DK.double().T @ Q_DJ.double()).clamp(0, 1)


def overlap(P_DK: Tensor, Q_DJ: Tensor) -> float:
    """Mean squared cosine of the principal angles: 1 if one space holds the other, 0 if they are orthogonal.

    Of two random spaces it is max(K, J) / D on average.
    """
    return float(principal_cosines(P_DK, Q_DJ).square().mean())


def angles(P_DK: Tensor, Q_DJ: Tensor) -> list[float]:
    """The principal angles in degrees, smallest first."""
    return torch.rad2deg(torch.acos(principal_cosines(P_DK, Q_DJ))).tolist()


def energy_between(G_OI: Tensor, spaces: Spaces, k: int) -> float | None:
    """Share of a gradient's energy between k left and k right directions; None of a zero gradient."""
    total = float(G_OI.double().square().sum())
    held = spaces.U_OK[:, :k].to(G_OI).T @ G_OI @ spaces.V_IK[:, :k].to(G_OI)
    return float(held.double().square().sum()) / total if total else None


def compare_factors(A_RI: Tensor, B_OR: Tensor, now: Spaces, first: Spaces | None) -> dict[str, Any]:
    """The factors' spans beside the leading r and 2r directions of gradients.

    Args:
        A_RI: ``lora_A``.
        B_OR: ``lora_B``.
        now: Leading 2r directions of the gradient at the same weights.
        first: Those of the gradient where the training started, if known.

    Returns:
        Overlaps and angles by name; without those of a factor that is zero.
    """
    rank, found = A_RI.shape[0], dict[str, Any]()
    for key, factor, side in (("B", B_OR, "U_OK"), ("A", A_RI.T, "V_IK")):
        space = column_space(factor)
        if space is None:
            continue
        basis = getattr(now, side)
        found[f"{key}_overlap_r"] = overlap(space, basis[:, :rank])
        found[f"{key}_overlap_2r"] = overlap(space, basis)
        found[f"{key}_angles"] = angles(space, basis[:, :rank])
        if first is not None:
            found[f"{key}_overlap_first"] = overlap(space, getattr(first, side)[:, :rank])
    return found
