"""Sizes and ranks of an adapter's factors and of their product."""

from typing import Any

import torch
from torch import Tensor

from lora_one.probes.changes import Change, LowRank


def effective_rank(sigma_K: Tensor) -> float | None:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007); None of zeros."""
    total = sigma_K.double().sum()
    if not bool(total > 0):
        return None
    share_K = sigma_K.double() / total
    return float(torch.exp(torch.special.entr(share_K).sum()))


def spectrum_figures(A_RI: Tensor, B_OR: Tensor, scaling: float, moved: Change) -> dict[str, Any]:
    """Norms, singular values and effective rank.

    Args:
        A_RI: ``lora_A``.
        B_OR: ``lora_B``.
        scaling: s.
        moved: What the adapter has done to the pretrained weight so far.
    """
    sigma_R = LowRank(scaling * B_OR, A_RI).triplets(A_RI.shape[0])[1]
    return {
        "norm_A": float(torch.linalg.vector_norm(A_RI)),
        "norm_B": float(torch.linalg.vector_norm(B_OR)),
        "norm_sBA": float(sigma_R.square().sum().sqrt()),
        "norm_moved": moved.norm_sq() ** 0.5,
        "effective_rank": effective_rank(sigma_R),
        "singular_values": sigma_R.tolist(),
    }
