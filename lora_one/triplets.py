"""Leading singular triplets of a gradient: all that a start needs to know of it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_one.errors import UserError

# Above this a full SVD takes minutes a layer; the randomised one then finds the leading triplets of a
# spectrum that decays, as those of gradients do.
_FULL_SVD_LIMIT = 1024


@dataclass(frozen=True)
class Triplets:
    """Leading singular triplets of one gradient, float32 on the CPU; ``norm`` is ‖G‖_F."""

    U_OK: Tensor
    S_K: Tensor
    V_IK: Tensor
    norm: float


def decompose(name: str, G_OI: Tensor, n_triplets: int) -> Triplets:
    """Leading singular triplets of a gradient, computed on its device.

    The sign is fixed once, here: the entry of largest magnitude in each column of U is positive.

    Raises:
        UserError: If the gradient is zero or not finite, naming the target.
    """
    norm = check_gradient(name, G_OI)
    return with_signs(*leading_svd(G_OI, n_triplets), norm)


def with_signs(U_OK: Tensor, S_K: Tensor, V_IK: Tensor, norm: float) -> Triplets:
    """Triplets under the sign convention: the largest entry of each column of U is positive."""
    largest_K = U_OK.abs().argmax(dim=0)
    sign_K = U_OK[largest_K, torch.arange(U_OK.shape[1], device=U_OK.device)].sign()
    return Triplets((U_OK * sign_K).cpu(), S_K.cpu(), (V_IK * sign_K).cpu(), norm)


def energy_share(G_OI: Tensor, found: Triplets, k: int) -> float:
    """Energy of a gradient between the leading k of its estimated singular vectors, against the best k.

    ``‖U_kᵀ G V_k‖²_F / Σ_{i<=k} σ_i²``; 1 where the k leading subspaces are exact.
    """
    best = torch.linalg.svdvals(G_OI)[:k].square().sum()
    return float((found.U_OK[:, :k].T @ G_OI @ found.V_IK[:, :k]).square().sum() / best)


def check_gradient(name: str, G_OI: Tensor) -> float:
    """The gradient's norm.

    Raises:
        UserError: If it is zero or not finite, naming the target.
    """
    return check_norm(name, float(torch.linalg.vector_norm(G_OI, dtype=torch.float64)))


def check_norm(name: str, norm: float) -> float:
    """The norm itself.

    Raises:
        UserError: If it is zero or not finite, naming the target.
    """
    if not math.isfinite(norm):
        raise UserError(f"{name}: its gradient is not finite; check the data, or compute in float32")
    if norm == 0.0:
        raise UserError(
            f"{name}: its gradient is zero; leave it out of the target modules, or check that the data "
            "has target tokens and that nothing multiplies the loss by zero"
        )
    return norm


def leading_svd(M_OI: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``k`` leading singular triplets ``U_OK, S_K, V_IK`` of a float32 matrix, deterministic.

    Above 1,024 rows and columns they are approximate where the spectrum is flat: on a random 1,100² matrix
    they hold 99.5 % of the best energy, on gradients all of it.
    """
    if min(M_OI.shape) <= _FULL_SVD_LIMIT:
        U_OK, S_K, Vt_KI = torch.linalg.svd(M_OI, full_matrices=False)
        V_IK = Vt_KI.T
    else:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)  # svd_lowrank takes no generator
            U_OK, S_K, V_IK = torch.svd_lowrank(M_OI, q=max(4 * k, 64), niter=8)
    return U_OK[:, :k], S_K[:k], V_IK[:, :k]
