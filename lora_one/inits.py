"""Adapter initialisations as pure functions: from the singular triplets of a gradient, from the weight,
or from nothing.

Sources: LoRA-GA (arXiv 2407.05000, §3.2-3.3), LoRA-One (arXiv 2502.01235, Algorithm 1) and the options
of their released configs. Papers that write ``W + A B`` with ``A`` (out x r) mean our ``B_OR`` by their
``A``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Which of the first 2r singular vectors go to (lora_B, lora_A).
_INDICES = {
    "ArB2r": lambda r: (torch.arange(r, 2 * r), torch.arange(r)),
    "A2rBr": lambda r: (torch.arange(r), torch.arange(r, 2 * r)),
    "ArBr": lambda r: (torch.arange(0, 2 * r, 2), torch.arange(1, 2 * r, 2)),
}
ALIASES = {"LoRA-GA": "ArB2r"}
SCALE_ALIASES = {"gd_scale": "gd", "weight_svd": "weightS"}
DIRECTIONS = ("LoRA-One", "LoRA-GA", *_INDICES, "random")
SCALES = ("stable", "gd", "unit", "weightS")

_Filler = Callable[[Tensor, float, torch.Generator], Tensor]
# Each fills a factor in place; the number is the standard deviation of ``gaussian``.
_FILLERS: dict[str, _Filler] = {
    "zeros": lambda t, std, g: nn.init.zeros_(t),
    "gaussian": lambda t, std, g: nn.init.normal_(t, std=std, generator=g),
    "fan_out_kaiming": lambda t, std, g: nn.init.kaiming_normal_(t, mode="fan_out", generator=g),
    "xavier": lambda t, std, g: nn.init.xavier_normal_(t, generator=g),
    "unit": lambda t, std, g: nn.init.normal_(t, std=max(t.shape) ** -0.5, generator=g),
    "orthogonal": lambda t, std, g: nn.init.orthogonal_(t, generator=g),
}


@dataclass(frozen=True)
class AdapterInit:
    """The start of one adapted layer.

    Attributes:
        A_RI: ``lora_A``, float32.
        B_OR: ``lora_B``, float32.
        shifts_base: Whether ``s · B A`` has to be taken off the base weight, so that the model
            starts as the same function (LoRA-GA and every other start with ``B A ≠ 0``); false where
            the adapter is itself the first step (LoRA-One) or ``B A = 0``.
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
    weight_sigma_K: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> AdapterInit:
    """Adapter factors from the leading singular triplets of the weight gradient.

    Args:
        U_OK: Left singular vectors of the gradient, columns in descending order of ``S_K``.
        S_K: Singular values.
        V_IK: Right singular vectors.
        rank: Adapter rank r.
        direction: ``LoRA-One``, ``ArB2r`` (``LoRA-GA``), ``A2rBr``, ``ArBr`` or ``random``.
        scale: ``stable`` (LoRA-One: ``1/√gamma``; others: ``d_out^¼/√gamma``), ``gd`` (``1/scaling``),
            ``unit`` (1) or ``weightS`` (mean over the first r of ``√(σ_i(W)/scaling)``), multiplied into
            each factor. The published spellings ``gd_scale`` and ``weight_svd`` mean the same.
        gamma: The papers' γ, used by ``stable``.
        scaling: The adapter's s.
        normalize: LoRA-One only. ``spectral`` divides the singular values by the largest (Algorithm
            1 and the released code); ``none`` leaves them, the plain gradient step of the README.
        weight_sigma_K: Leading singular values of the weight; for ``weightS``, at least r.
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
    factor = _scale_factor(scale, direction, gamma, scaling, U_OK.shape[0], rank, weight_sigma_K)
    if direction == "LoRA-One":
        if normalize not in ("spectral", "none"):
            raise ValueError(f"unknown normalize {normalize!r}; valid: spectral, none")
        sigma_R = S_K[:rank] / S_K[0] if normalize == "spectral" else S_K[:rank]
        root_R = sigma_R.sqrt() * factor
        return AdapterInit((V_IK[:, :rank] * root_R).T, -U_OK[:, :rank] * root_R, shifts_base=False)
    left, right = _indices(direction, rank, generator)
    return AdapterInit(V_IK[:, right].T * factor, U_OK[:, left] * factor, shifts_base=True)


def simple_factors(
    shape_OI: tuple[int, int],
    *,
    rank: int,
    kind_A: str,
    kind_B: str,
    std_A: float,
    std_B: float,
    generator: torch.Generator,
) -> AdapterInit:
    """Factors that know nothing of data or weight; plain LoRA is ``kaiming`` for A and ``zeros`` for B.

    Args:
        shape_OI: Output and input features.
        rank: Adapter rank r.
        kind_A: ``zeros``, ``gaussian``, ``kaiming`` (uniform, a = √5), ``fan_out_kaiming``, ``xavier``,
            ``unit`` (standard deviation 1/√(long side)) or ``orthogonal``.
        kind_B: The same; ``kaiming`` is normal here.
        std_A: Standard deviation of a ``gaussian`` A.
        std_B: Standard deviation of a ``gaussian`` B.
        generator: Source of randomness.
    """
    A_RI, B_OR = torch.empty(rank, shape_OI[1]), torch.empty(shape_OI[0], rank)
    if kind_A == "kaiming":
        nn.init.kaiming_uniform_(A_RI, a=math.sqrt(5), generator=generator)
    else:
        _filler(kind_A)(A_RI, std_A, generator)
    if kind_B == "kaiming":
        nn.init.kaiming_normal_(B_OR, generator=generator)
    else:
        _filler(kind_B)(B_OR, std_B, generator)
    return AdapterInit(A_RI, B_OR, shifts_base="zeros" not in (kind_A, kind_B))


def weight_factors(
    U_OK: Tensor,
    S_K: Tensor,
    V_IK: Tensor,
    *,
    rank: int,
    scale: str,
    gamma: float,
    scaling: float,
) -> AdapterInit:
    """Factors from the leading singular triplets of the weight itself (``mode: svd``).

    Args:
        U_OK: Left singular vectors of W.
        S_K: Its singular values.
        V_IK: Right singular vectors.
        rank: Adapter rank r.
        scale: ``default`` (``√(σ/s)`` on each factor), ``stable`` (``d_out^¼/√gamma`` on B,
            ``d_in^¼/√gamma`` on A), ``unit`` or ``normalized`` (``√(r σ/Σσ)`` on each factor).
        gamma: For ``stable``.
        scaling: The adapter's s.
    """
    if S_K.numel() < rank:
        raise ValueError(f"a start of rank {rank} needs as many singular triplets, got {S_K.numel()}")
    left, right, sigma_R = U_OK[:, :rank], V_IK[:, :rank], S_K[:rank]
    if scale == "default":
        factor_B = factor_A = (sigma_R / scaling).sqrt()
    elif scale == "normalized":
        factor_B = factor_A = (rank * sigma_R / sigma_R.sum()).sqrt()
    elif scale == "stable":
        factor_B = torch.tensor(U_OK.shape[0] ** 0.25 * gamma**-0.5)
        factor_A = torch.tensor(V_IK.shape[0] ** 0.25 * gamma**-0.5)
    elif scale == "unit":
        factor_B = factor_A = torch.tensor(1.0)
    else:
        raise ValueError(f"unknown scale {scale!r}; valid: default, stable, unit, normalized")
    return AdapterInit((right * factor_A).T.contiguous(), (left * factor_B).contiguous(), shifts_base=True)


def clip_to_weight(init: AdapterInit, W_OI: Tensor, scaling: float) -> AdapterInit:
    """``norm_clip``: shrinks the factors so that no entry of ``s · B A`` exceeds the largest of W.

    With ``ρ = max|W| / max|s B A| < 1`` each factor is multiplied by √ρ, and so the product by ρ.
    """
    largest = float((scaling * (init.B_OR @ init.A_RI)).abs().max())
    if largest == 0.0 or largest <= (limit := float(W_OI.abs().max())):
        return init
    root = math.sqrt(limit / largest)
    return AdapterInit(init.A_RI * root, init.B_OR * root, init.shifts_base)


def _indices(direction: str, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    if direction == "random":
        if generator is None:
            raise ValueError("direction 'random' needs a seeded generator")
        # Disjoint halves: with equal indices the first step is no longer the best of rank 2r.
        order = torch.randperm(2 * rank, generator=generator)
        return order[:rank], order[rank:]
    if direction not in _INDICES:
        raise ValueError(f"unknown direction {direction!r}; valid: {', '.join(DIRECTIONS)}")
    return _INDICES[direction](rank)


def _scale_factor(
    scale: str,
    direction: str,
    gamma: float,
    scaling: float,
    d_out: int,
    rank: int,
    weight_sigma_K: Tensor | None,
) -> float:
    scale = SCALE_ALIASES.get(scale, scale)
    if scale == "stable":
        return gamma**-0.5 if direction == "LoRA-One" else d_out**0.25 * gamma**-0.5
    if scale == "gd":
        return 1 / scaling
    if scale == "unit":
        return 1.0
    if scale == "weightS":
        if weight_sigma_K is None or weight_sigma_K.numel() < rank:
            raise ValueError(f"scale 'weightS' at rank {rank} needs as many singular values of the weight")
        return float((weight_sigma_K[:rank] / scaling).sqrt().mean())
    raise ValueError(f"unknown scale {scale!r}; valid: {', '.join(SCALES)}")


def _filler(kind: str) -> _Filler:
    if kind not in _FILLERS:
        raise ValueError(f"unknown start {kind!r}; valid: kaiming, {', '.join(_FILLERS)}")
    return _FILLERS[kind]
