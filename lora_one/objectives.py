"""What the first Adam step of the factors should come close to.

Adam's first step is ``-η·sign(G)``, not ``-η·G``. The three answers of Su's note on LoRA-GA
(kexue.fm/archives/10226), here called by the name of what they aim at:

- ``gradient`` ("faith"): decompose ``G`` as for gradient descent;
- ``sign`` ("speculative"): decompose ``sign(G)`` in its place;
- ``adam`` ("hard-core"): minimise ``‖B sign(BᵀG) + sign(G Aᵀ) A - sign(G)‖²_F`` over the factors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_one.inits import init_factors
from lora_one.triplets import Triplets, check_gradient, decompose

_STEPS = 300
_LEARNING_RATE = 0.02


@dataclass(frozen=True)
class AdamFactors:
    """Factors that minimise the Adam objective, for a scaling s of 1.

    Attributes:
        A_RI: float32 on the CPU.
        B_OR: float32 on the CPU.
        before: Smallest relative objective ``‖…‖²/‖sign(G)‖²`` of the two closed forms, each times its
            best common factor: the start.
        after: The same of these factors; never above ``before``.
    """

    A_RI: Tensor
    B_OR: Tensor
    before: float
    after: float


def decompose_for(objective: str, name: str, G_OI: Tensor, n_triplets: int) -> Triplets:
    """Singular triplets of the matrix that ``objective`` (``gradient`` or ``sign``) decomposes."""
    if objective == "sign":
        check_gradient(name, G_OI)
        G_OI = G_OI.sign()
    return decompose(name, G_OI, n_triplets)


def adam_objective(G_OI: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
    """``‖B sign(BᵀG) + sign(G Aᵀ) A - sign(G)‖²_F / ‖sign(G)‖²_F``, a scalar; differentiable by parts.

    The sign of a product is a constant almost everywhere, and is taken as one.
    """
    step_OI, target_OI = _adam_step(G_OI, A_RI, B_OR), G_OI.sign()
    return (step_OI - target_OI).square().sum() / target_OI.square().sum()


def minimise_adam_objective(
    name: str, G_OI: Tensor, *, rank: int, direction: str, generator: torch.Generator | None = None
) -> AdamFactors:
    """Factors for Adam's own first step, by optimising the objective from the better closed form.

    Starts from the ``gradient`` and the ``sign`` factors of ``direction``, each multiplied by the common
    factor that minimises the objective (the step is linear in it), and keeps the best point seen.

    Args:
        name: The target, for messages.
        G_OI: Its gradient, float32.
        rank: Adapter rank r.
        direction: One of LoRA-GA's.
        generator: For direction ``random``.
    """
    state = generator.get_state() if generator is not None else None
    starts = []
    for objective in ("gradient", "sign"):
        if generator is not None and state is not None:
            generator.set_state(state)  # both take the same indices
        triplets = decompose_for(objective, name, G_OI, 2 * rank)
        init = init_factors(
            triplets.U_OK,
            triplets.S_K,
            triplets.V_IK,
            rank=rank,
            direction=direction,
            scale="unit",
            gamma=1.0,
            scaling=1.0,
            generator=generator,
        )
        starts.append(_best_common_factor(G_OI, init.A_RI.to(G_OI), init.B_OR.to(G_OI)))
    A_RI, B_OR = min(starts, key=lambda pair: float(adam_objective(G_OI, *pair)))
    before = best = float(adam_objective(G_OI, A_RI, B_OR))
    kept = (A_RI, B_OR)
    size = float(torch.cat([A_RI.flatten(), B_OR.flatten()]).square().mean().sqrt())
    A_RI, B_OR = A_RI.clone().requires_grad_(), B_OR.clone().requires_grad_()
    optimizer = torch.optim.Adam([A_RI, B_OR], lr=_LEARNING_RATE * size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in range(_STEPS):
        with torch.enable_grad():
            value = adam_objective(G_OI, A_RI, B_OR)
        if value.item() < best:
            best, kept = value.item(), (A_RI.detach().clone(), B_OR.detach().clone())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return AdamFactors(kept[0].cpu(), kept[1].cpu(), before, best)


def _adam_step(G_OI: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
    return B_OR @ (B_OR.T @ G_OI).sign() + (G_OI @ A_RI.T).sign() @ A_RI


def _best_common_factor(G_OI: Tensor, A_RI: Tensor, B_OR: Tensor) -> tuple[Tensor, Tensor]:
    step_OI, target_OI = _adam_step(G_OI, A_RI, B_OR), G_OI.sign()
    # The step is as large for -c as for c.
    factor = ((step_OI * target_OI).sum() / step_OI.square().sum()).clamp(min=0)
    return A_RI * factor, B_OR * factor
