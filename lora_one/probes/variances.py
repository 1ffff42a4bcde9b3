"""Forward and backward scale of an adapter (LoRA-GA, arXiv 2407.05000, §3.3).

Mean square of an entry of the adapter's output beside that of its input, and of the gradient that it hands
back beside that of its output. A start is stable where these do not change with rank and width.
"""

from torch import Tensor


def variance_figures(
    A_RI: Tensor, B_OR: Tensor, scaling: float, x_NI: Tensor, delta_NO: Tensor
) -> dict[str, float | None]:
    """Both ratios on a layer's own inputs and output gradients.

    Args:
        A_RI: ``lora_A``.
        B_OR: ``lora_B``.
        scaling: s.
        x_NI: The layer's input at N positions.
        delta_NO: The gradient of its output there.
    """
    output_NO = scaling * (x_NI @ A_RI.T) @ B_OR.T
    back_NI = scaling * (delta_NO @ B_OR) @ A_RI
    return {"forward": _ratio(output_NO, x_NI), "backward": _ratio(back_NI, delta_NO)}


def expected_variances(A_RI: Tensor, B_OR: Tensor, scaling: float) -> tuple[float, float]:
    """Both ratios for inputs and gradients of independent entries: ``‖s B A‖²_F / d_out`` and ``/ d_in``."""
    A, B = A_RI.double(), B_OR.double()
    energy = scaling**2 * float(((B.T @ B) * (A @ A.T)).sum())
    return energy / B_OR.shape[0], energy / A_RI.shape[1]


def _ratio(after: Tensor, before: Tensor) -> float | None:
    size = before.double().square().mean()
    return float(after.double().square().mean() / size) if bool(size > 0) else None
