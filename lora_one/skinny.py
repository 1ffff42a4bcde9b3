"""Products ``Q B`` of a tall and a wide matrix: found from a layer's activations, merged, decomposed.

All of it works on matrices with few columns; none is (out, in).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_one.processes import Processes

_MERGE_ROUNDS = 2
# Directions that are seen no better than this carry rounding alone.
_UNSEEN = 1e-6
_NEARLY_SINGULAR = 1e-3


class Product(NamedTuple):
    """``G ≈ Q B`` with orthonormal columns Q, float32."""

    Q_OK: Tensor
    B_KI: Tensor


def leading_product(delta_NO: Tensor, x_NI: Tensor, noise_KO: Tensor) -> Product:
    """The leading part of ``δᵀ x``; its rank is the number of rows of the noise."""
    aimed_KI = (noise_KO @ delta_NO.T) @ x_NI  # so that a flat tail blurs the rest less
    Q_OK = orthonormal((aimed_KI @ x_NI.T @ delta_NO).T)
    return Product(Q_OK, (Q_OK.T @ delta_NO.T) @ x_NI)


def product_from_sketches(Y_KO: Tensor, Z_LI: Tensor, psi_LO: Tensor) -> Product:
    """``Q (Ψᵀ Q)⁺ (Ψᵀ G)`` from ``(G Ω)ᵀ``, ``Ψᵀ G`` and ``Ψᵀ`` (arXiv 2009.11392)."""
    Q_OK = orthonormal(Y_KO.T)
    return Product(Q_OK, _inverse((psi_LO @ Q_OK).double()).float() @ Z_LI)


def triplets_of(product: Product) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triplets; the long side of B goes through a QR, which is cheaper."""
    right_IK, R_KK = qr(product.B_KI.T)
    inner_KK, S_K, Vt_KK = (part.float() for part in torch.linalg.svd(R_KK.T))
    return product.Q_OK @ inner_KK, S_K, right_IK @ Vt_KK.T


def main_directions(product: Product, generator: torch.Generator, processes: Processes) -> Tensor:
    """Orthonormal columns (in, K) that span the rows of the main process's B; random ones of a zero B."""
    rows_IK = product.B_KI.T
    if not bool(rows_IK.any()):
        rows_IK = torch.randn(rows_IK.shape, generator=generator).to(rows_IK)
    directions_IK = orthonormal(rows_IK).contiguous()
    processes.from_main_(directions_IK)
    return directions_IK


def merge(mine: Product, generator: torch.Generator, processes: Processes) -> Product:
    """The leading part of the sum of all processes' products, by subspace iteration."""
    if processes.world_size == 1:
        return mine
    start_IK = main_directions(mine, generator, processes)
    for _ in range(_MERGE_ROUNDS):
        Q_OK = orthonormal(processes.sum_(mine.Q_OK @ (mine.B_KI @ start_IK))).contiguous()
        processes.from_main_(Q_OK)  # not every machine rounds alike
        B_KI = processes.sum_((Q_OK.T @ mine.Q_OK) @ mine.B_KI)
        start_IK = orthonormal(B_KI.T)
    return Product(Q_OK, B_KI)


def orthonormal(M: Tensor) -> Tensor:
    """Orthonormal columns with the span of M's."""
    return qr(M)[0]


def qr(M: Tensor) -> tuple[Tensor, Tensor]:
    """``M = Q R`` of a float32 matrix with few columns; R in float64.

    By the Cholesky factor of ``MᵀM`` in float64, its columns scaled to one length: several times faster than
    Householder's way, and as exact unless M is close to singular; by Householder's way then.
    """
    wide = M.double()
    gram = wide.T @ wide
    lengths = gram.diagonal().sqrt()
    L, failed = torch.linalg.cholesky_ex(gram / lengths[:, None] / lengths)
    if bool((failed == 0) & (L.diagonal().min() > _NEARLY_SINGULAR)):
        R = L.T * lengths
        inverse = torch.linalg.solve_triangular(R, torch.eye(len(R)).to(R), upper=True)
        return (wide @ inverse).float(), R
    Q, R = torch.linalg.qr(wide)
    return Q.float(), R


def _inverse(M_LK: Tensor) -> Tensor:
    """The pseudo-inverse of a small float64 matrix, L >= K, without its smallest singular values."""
    L, failed = torch.linalg.cholesky_ex(M_LK.T @ M_LK)
    diagonal = L.diagonal()
    if bool((failed == 0) & (diagonal.min() > _NEARLY_SINGULAR * diagonal.max())):
        return torch.cholesky_solve(M_LK.T, L)
    return torch.linalg.pinv(M_LK, rtol=_UNSEEN)
