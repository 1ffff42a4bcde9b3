"""The adapter's step beside that of full fine-tuning from the same weights.

Full fine-tuning would move a weight along ``-G`` by SGD, and along ``-sign(G)`` by the first step of Adam.
The adapter moves it by ``s (B' A' - B A)``.
"""

from torch import Tensor

from lora_one.probes.changes import Alignment, Change, LowRank, align
from lora_one.probes.subspaces import Spaces, overlap

_SMALLEST = 1e-6


def compare_update(change: Change, G_OI: Tensor) -> dict[str, Alignment]:
    """One layer's step beside both references.

    Args:
        change: What the optimiser did to the weight.
        G_OI: The gradient of the weight, before that.
    """
    return {"cosine_gradient": align(change, -G_OI), "cosine_sign": align(change, -G_OI.sign())}


def compare_start(A_RI: Tensor, B_OR: Tensor, scaling: float, G_OI: Tensor) -> Alignment:
    """A start that moves the weight by ``s B A``, beside a step of gradient descent from the same place."""
    return align(LowRank(scaling * B_OR, A_RI), -G_OI)


def best_cosine(S_K: Tensor, energy: float) -> float | None:
    """``‖[G]_k‖ / ‖G‖``: no matrix of rank k has a larger cosine with G. None of a zero G.

    Args:
        S_K: The k leading singular values.
        energy: ``‖G‖²``.
    """
    return min(1.0, float((S_K.double().square().sum() / energy).sqrt())) if energy else None


def compare_spaces(change: Change, gradient: Spaces, rank: int) -> dict[str, float]:
    """Overlap of the step's leading r singular directions with the gradient's; nothing of a zero step."""
    U_OK, S_K, V_IK = change.triplets(rank)
    if not bool(S_K[0] > 0):
        return {}
    kept = S_K / S_K[0] > _SMALLEST
    return {
        "left_overlap": overlap(U_OK[:, kept], gradient.U_OK[:, :rank]),
        "right_overlap": overlap(V_IK[:, kept], gradient.V_IK[:, :rank]),
    }
