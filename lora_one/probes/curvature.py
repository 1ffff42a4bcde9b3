"""The largest eigenvalue of the loss's Hessian, and the learning rates that it leaves stable.

On a quadratic, gradient descent with momentum μ is stable below ``2 (1 + μ) / λ``, and Adam, its
preconditioner taken as fixed, below ``2 (1 + β₁) / ((1 - β₁) λ)`` with λ that of the preconditioned Hessian
(Cohen et al., arXiv 2207.14484). On a real loss both are a guide, for the batch that was looked at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# An eigenvalue is good enough when its residual is below this share of it.
_TOLERANCE = 1e-2
# Steps that Adam's second moment has seen, before it tells how large gradients are.
_FEWEST_SQUARES = 10


@dataclass(frozen=True)
class Extremes:
    """The ends of a spectrum.

    Attributes:
        top: Largest eigenvalue.
        bottom: Smallest.
        error: Some eigenvalue lies within this of ``top``: the norm of the residual.
        n_products: Products with the matrix that it took.
    """

    top: float
    bottom: float
    error: float
    n_products: int


def lanczos(multiply: Callable[[Tensor], Tensor], start_P: Tensor, n_products: int) -> Extremes:
    """Both ends of a symmetric matrix's spectrum, by Lanczos with full reorthogonalisation.

    Ends early once the top is known to 1 %.

    Args:
        multiply: The matrix times a vector (P,).
        start_P: Any vector that is not zero; a random one sees every eigenvector.
        n_products: Most products; as many vectors are kept.
    """
    basis = [start_P / torch.linalg.vector_norm(start_P)]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image_P = multiply(basis[-1])
        diagonal.append(float(image_P @ basis[-1]))
        for _ in range(2):  # once leaves rounding that grows
            for vector_P in basis:
                image_P = image_P - (image_P @ vector_P) * vector_P
        beside.append(float(torch.linalg.vector_norm(image_P)))
        found = _ends(diagonal, beside)
        is_whole = beside[-1] <= 1e-6 * max(abs(found.top), abs(found.bottom)) or len(basis) == len(start_P)
        is_good = len(diagonal) > 2 and found.error <= _TOLERANCE * abs(found.top)
        if is_whole or is_good or len(diagonal) == n_products:
            return found
        basis.append(image_P / beside[-1])


def _ends(diagonal: list[float], beside: list[float]) -> Extremes:
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if len(diagonal) > 1:
        off = torch.diag(torch.tensor(beside[:-1], dtype=torch.float64), 1)
        T = T + off + off.T
    values, vectors = torch.linalg.eigh(T)
    error = abs(float(vectors[-1, -1])) * beside[-1]
    return Extremes(float(values[-1]), float(values[0]), error, len(diagonal))


def hessian_product(loss: Tensor, parameters: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """The Hessian of a loss times a vector, by differentiating its gradient once more.

    Args:
        loss: A scalar with its graph.
        parameters: What it is differentiated by.

    Returns:
        A function of a flat vector (P,), in the order of the parameters, on the first one's device.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    reached = [gradient for gradient in gradients if gradient is not None and gradient.requires_grad]
    device, sizes = parameters[0].device, [parameter.numel() for parameter in parameters]

    def multiply(v_P: Tensor) -> Tensor:
        parts = zip(v_P.split(sizes), parameters, gradients, strict=True)
        along = [
            part.view_as(p).to(gradient)
            for part, p, gradient in parts
            if gradient is not None and gradient.requires_grad
        ]
        images: Sequence[Tensor | None] = [None] * len(parameters)
        if reached:
            images = torch.autograd.grad(reached, parameters, along, retain_graph=True, allow_unused=True)
        flat = [
            torch.zeros_like(p) if image is None else image
            for image, p in zip(images, parameters, strict=True)
        ]
        return torch.cat([image.detach().flatten().to(device=device, dtype=v_P.dtype) for image in flat])

    return multiply


def preconditioned(multiply: Callable[[Tensor], Tensor], scale_P: Tensor) -> Callable[[Tensor], Tensor]:
    """``D^½ H D^½`` for a diagonal D > 0, which has the eigenvalues of ``D H``."""
    root_P = scale_P.sqrt()
    return lambda v_P: root_P * multiply(root_P * v_P)


def adam_scale(optimizer: Any, parameters: Sequence[Tensor]) -> Tensor | None:
    """What Adam multiplies the mean gradient by, beside the learning rate: ``1 / (√v̂ + ε)``; flat (P,).

    A group's own learning rate counts relative to the first group's. None in the first steps, whose few
    squares say little.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    base = _rate(optimizer.param_groups[0])
    parts = []
    for parameter in parameters:
        state, group = optimizer.state.get(parameter), groups.get(id(parameter))
        if not state or group is None or float(state["step"]) < _FEWEST_SQUARES:
            return None
        corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        ratio = _rate(group) / base if base else 1.0
        parts.append(ratio / (corrected.sqrt() + group["eps"]))
    device = parameters[0].device
    return torch.cat([part.flatten().float().to(device) for part in parts])


def rate_limit(top: float, momentum: float = 0.0) -> float | None:
    """The learning rate above which gradient descent leaves a quadratic; None where nothing bends upwards."""
    return 2 * (1 + momentum) / top if top > 0 else None


def adam_rate_limit(top: float, beta1: float) -> float | None:
    """The same for Adam, with the top of the preconditioned Hessian."""
    return 2 * (1 + beta1) / ((1 - beta1) * top) if top > 0 else None


def _rate(group: dict[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))
