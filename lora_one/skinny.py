"""Products ``Q B`` of a tall and a wide matrix: found from a layer's activations, merged, decomposed.

All of it works on matrices with few columns; none is (out, in). All of it takes the matrices of several
layers of one shape too, along a first dimension (T): one call, and one message between processes, for all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_one.processes import Processes

_MERGE_ROUNDS = 2
# Directions that are seen no better than this carry rounding alone.
_UNSEEN = 1e-6
_NEARLY_SINGULAR = 1e-3


class Product(NamedTuple):
    """``G ≈ Q B`` with orthonormal columns Q, float32; of one layer, or of several (T, …)."""

    Q_OK: Tensor
    B_KI: Tensor


def leading_product(delta_NO: Tensor, x_NI: Tensor, noise_KO: Tensor) -> Product:
    """The leading part of ``δᵀ x``; its rank is the number of rows of the noise."""
    aimed_KI = (noise_KO @ delta_NO.T) @ x_NI  # so that a flat tail blurs the rest less
    Q_OK = orthonormal((aimed_KI @ x_NI.T @ delta_NO).T)
    return Product(Q_OK, (Q_OK.T @ delta_NO.T) @ x_NI)


def stacked(products: Sequence[Product]) -> Product:
    """Those of several layers as one."""
    return Product(*(torch.stack(parts) for parts in zip(*products, strict=True)))


def together(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape along a new first dimension; without a copy where they are all slices of one."""
    whole = tensors[0]._base
    if whole is None or whole.shape != (len(tensors), *tensors[0].shape):
        return torch.stack(list(tensors))
    slices = zip(tensors, whole, strict=True)
    is_whole = all(mine._base is whole and mine.data_ptr() == part.data_ptr() for mine, part in slices)
    return whole if is_whole else torch.stack(list(tensors))


def product_from_sketches(Y_KO: Tensor, Z_LI: Tensor, psi_LO: Tensor) -> Product:
    """``Q (Ψᵀ Q)⁺ (Ψᵀ G)`` from ``(G Ω)ᵀ``, ``Ψᵀ G`` and ``Ψᵀ`` (arXiv 2009.11392)."""
    Q_OK = orthonormal(Y_KO.mT)
    return Product(Q_OK, _inverse((psi_LO @ Q_OK).double()).float() @ Z_LI)


def triplets_of(product: Product) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triplets; the long side of B goes through a QR, which is cheaper."""
    right_IK, R_KK = qr(product.B_KI.mT)
    inner_KK, S_K, Vt_KK = (part.float() for part in torch.linalg.svd(R_KK.mT))
    return product.Q_OK @ inner_KK, S_K, right_IK @ Vt_KK.mT


def main_directions(product: Product, generator: torch.Generator, processes: Processes) -> Tensor:
    """Orthonormal columns (in, K) that span the rows of the main process's B; random ones of a zero B."""
    rows_IK = product.B_KI.mT
    is_seen = rows_IK.ne(0).any(-1, keepdim=True).any(-2, keepdim=True)
    if not bool(is_seen.all()):
        rows_IK = torch.where(is_seen, rows_IK, torch.randn(rows_IK.shape, generator=generator).to(rows_IK))
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
        B_KI = processes.sum_((Q_OK.mT @ mine.Q_OK) @ mine.B_KI)
        start_IK = orthonormal(B_KI.mT)
    return Product(Q_OK, B_KI)


def orthonormal(M: Tensor) -> Tensor:
    """Orthonormal columns with the span of M's."""
    return qr(M)[0]


def qr(M: Tensor) -> tuple[Tensor, Tensor]:
    """``M = Q R`` of float32 matrices with few columns; R in float64.

    By the Cholesky factor of ``MᵀM`` in float64, its columns scaled to one length: several times faster than
    Householder's way, and as exact unless M is close to singular; by Householder's way then. The columns of Q
    lie as rows in memory: products of that shape are faster.
    """
    rows = M.mT.double()
    gram = rows @ rows.mT
    lengths = _diagonal(gram).sqrt()
    L, failed = torch.linalg.cholesky_ex(gram / lengths[..., :, None] / lengths[..., None, :])
    is_regular = (failed == 0) & (_diagonal(L).amin(-1) > _NEARLY_SINGULAR)
    if not bool(is_regular.any()):
        Q, R = torch.linalg.qr(rows.mT)
        return Q.float(), R
    R = L.mT * lengths[..., None, :]
    inverse = torch.linalg.solve_triangular(R, torch.eye(R.shape[-1]).to(R), upper=True)
    Q = (inverse.mT @ rows).mT
    if not bool(is_regular.all()):
        Q[~is_regular], R[~is_regular] = torch.linalg.qr(rows[~is_regular].mT)
    return Q.float(), R


def _inverse(M_LK: Tensor) -> Tensor:
    """The pseudo-inverse of small float64 matrices, L >= K, without their smallest singular values."""
    L, failed = torch.linalg.cholesky_ex(M_LK.mT @ M_LK)
    diagonal = _diagonal(L)
    if bool(((failed == 0) & (diagonal.amin(-1) > _NEARLY_SINGULAR * diagonal.amax(-1))).all()):
        return torch.cholesky_solve(M_LK.mT, L)
    return torch.linalg.pinv(M_LK, rtol=_UNSEEN)


def _diagonal(L: Tensor) -> Tensor:
    return L.diagonal(dim1=-2, dim2=-1)
