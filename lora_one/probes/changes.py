"""Changes of a weight, as a product of thin matrices or as they are; and two of them compared."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_one.triplets import leading_svd


class LowRank(NamedTuple):
    """``left @ right``, never formed; float32 or float64."""

    left_OK: Tensor
    right_KI: Tensor

    def inner(self, M_OI: Tensor) -> float:
        """Frobenius inner product with a matrix."""
        return float(((self.left_OK.T @ M_OI) * self.right_KI).sum(dtype=torch.float64))

    def norm_sq(self) -> float:
        """Squared Frobenius norm."""
        left, right = self.left_OK.double(), self.right_KI.double()
        return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))

    def triplets(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The ``k`` leading singular triplets ``U_OK, S_K, V_IK``, float64."""
        Q_left, R_left = torch.linalg.qr(self.left_OK.double())
        Q_right, R_right = torch.linalg.qr(self.right_KI.double().T)
        U, S_K, Vt = torch.linalg.svd(R_left @ R_right.T)
        n = min(k, len(S_K))
        return (Q_left @ U)[:, :n], S_K[:n], (Q_right @ Vt.T)[:, :n]


class Dense(NamedTuple):
    """A change that has to be formed, such as full fine-tuning's."""

    D_OI: Tensor

    def inner(self, M_OI: Tensor) -> float:
        """Frobenius inner product with a matrix."""
        return float((self.D_OI * M_OI).sum(dtype=torch.float64))

    def norm_sq(self) -> float:
        """Squared Frobenius norm."""
        return float(self.D_OI.double().square().sum())

    def triplets(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The ``k`` leading singular triplets ``U_OK, S_K, V_IK``."""
        return leading_svd(self.D_OI, k)


Change = LowRank | Dense


@dataclass(frozen=True)
class Alignment:
    """What the cosine of two vectors is made of, so that those of several layers add up to that of all.

    Attributes:
        dot: Their inner product.
        first_sq: Squared norm of one.
        second_sq: Squared norm of the other.
    """

    dot: float
    first_sq: float
    second_sq: float

    @property
    def cosine(self) -> float | None:
        """The cosine; None where one of them is zero."""
        size = math.sqrt(self.first_sq) * math.sqrt(self.second_sq)
        return max(-1.0, min(1.0, self.dot / size)) if size else None

    @staticmethod
    def of_all(parts: "Iterable[Alignment]") -> "Alignment":
        """That of the concatenated vectors."""
        found = list(parts)
        return Alignment(
            sum(part.dot for part in found),
            sum(part.first_sq for part in found),
            sum(part.second_sq for part in found),
        )


def align(change: Change, M_OI: Tensor) -> Alignment:
    """A change beside a matrix."""
    return Alignment(change.inner(M_OI), change.norm_sq(), float(M_OI.double().square().sum()))
