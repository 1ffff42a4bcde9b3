"""Streaming sketches of weight gradients: leading singular triplets without the gradient itself.

For a linear layer ``G = Σ δᵀ x`` over the positions, ``x`` being its input and ``δ`` the gradient of its
output. So ``G Ω = Σ δᵀ (x Ω)`` and ``Ψᵀ G = Σ (δ Ψ)ᵀ x`` are sums of skinny products: no (out, in) matrix
is formed, and no weight takes a gradient. From both, ``G ≈ Q (Ψᵀ Q)⁺ (Ψᵀ G)`` with Q an orthonormal basis of
``G Ω`` (generalised Nyström, arXiv 2009.11392). A second pass over the same batches gives ``Qᵀ G`` itself.

Random ``Ω`` and ``Ψ`` lose several per cent of the energy. The first batch knows better: its own gradient is
decomposed in the same skinny way, and its leading singular vectors become ``Ω`` and ``Ψ``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_POWER_ITERATIONS = 2


@dataclass(frozen=True)
class SketchSize:
    """Columns of the sketches.

    Attributes:
        right: k, columns of Ω.
        left: l, columns of Ψ; above k, so that the small inverse is well conditioned.
        probes: Random columns kept apart, to estimate the error.
    """

    right: int = 32
    left: int = 64
    probes: int = 4


@dataclass(frozen=True)
class SketchedGradient:
    """What a sketch knows of a gradient.

    Attributes:
        U_OK: Left singular vectors, float32 on the CPU.
        S_K: Singular values.
        V_IK: Right singular vectors.
        norm: Estimate of ‖G‖_F.
        error: Estimate of ‖G - U Σ Vᵀ‖_F / ‖G‖_F with all k triplets, from the probes.
    """

    U_OK: Tensor
    S_K: Tensor
    V_IK: Tensor
    norm: float
    error: float


class LayerSketch:
    """The sketches of one layer's gradient, summed over batches.

    Args:
        shape_OI: Of the weight.
        size: Columns of the sketches; no more than the weight has rows or columns.
        generator: Source of the random parts, on the CPU.
    """

    def __init__(self, shape_OI: tuple[int, int], size: SketchSize, generator: torch.Generator) -> None:
        n_out, n_in = shape_OI
        self._noise_IK = torch.randn(n_in, min(size.right, n_out, n_in), generator=generator)
        self._noise_OL = torch.randn(n_out, min(size.left, n_out, n_in), generator=generator)
        self._probes_IP = torch.randn(n_in, size.probes, generator=generator)
        self.Y_OC = torch.zeros(n_out, self._noise_IK.shape[1] + size.probes)
        self.Z_LI = torch.zeros(self._noise_OL.shape[1], n_in)
        self._omega_IC: Tensor | None = None  # Ω, then the probes
        self._psi_OL: Tensor | None = None

    @property
    def is_started(self) -> bool:
        """Whether Ω and Ψ are chosen."""
        return self._omega_IC is not None

    @property
    def omega_IC(self) -> Tensor:
        """Ω, then the probes."""
        assert self._omega_IC is not None, "the sketch has no directions yet"
        return self._omega_IC

    @property
    def psi_OL(self) -> Tensor:
        """Ψ, orthonormal."""
        assert self._psi_OL is not None, "the sketch has no directions yet"
        return self._psi_OL

    def start(self, U_OK: Tensor, V_IK: Tensor) -> None:
        """Chooses Ω and Ψ: the given singular vectors, Ψ filled up with random directions."""
        noise_OE = self._noise_OL[:, U_OK.shape[1] :].to(U_OK)
        self._psi_OL = _orthonormal(torch.cat([U_OK, noise_OE], dim=1)).contiguous()
        self._omega_IC = torch.cat([V_IK, self._probes_IP.to(V_IK)], dim=1).contiguous()
        self.Y_OC, self.Z_LI = self.Y_OC.to(U_OK.device), self.Z_LI.to(U_OK.device)

    def add(self, x_NI: Tensor, delta_NO: Tensor) -> None:
        """Adds one batch: inputs and output gradients of its positions, float32.

        A sketch without directions takes them from the gradient of this batch alone.
        """
        if not self.is_started:
            self.start(*leading_vectors(delta_NO, x_NI, self._noise_IK.to(x_NI)))
        self.Y_OC.addmm_(delta_NO.T, x_NI @ self.omega_IC)
        self.Z_LI.addmm_((delta_NO @ self.psi_OL).T, x_NI)

    def basis(self) -> Tensor:
        """``Q_OK``, an orthonormal basis of ``G Ω``."""
        return _orthonormal(self.Y_OC[:, : self._noise_IK.shape[1]].double()).float()

    def solve(self, exact_KI: Tensor | None = None) -> SketchedGradient:
        """The leading singular triplets.

        Args:
            exact_KI: ``Qᵀ G`` of a second pass; without it, it is solved for from ``Ψᵀ G``.
        """
        Q_OK, probed_OP = self.basis().double(), self.Y_OC[:, self._noise_IK.shape[1] :].double()
        if exact_KI is not None:
            B_KI = exact_KI.double()
        else:
            B_KI = torch.linalg.lstsq(self.psi_OL.double().T @ Q_OK, self.Z_LI.double()).solution
        inner_KK, S_K, Vt_KI = torch.linalg.svd(B_KI, full_matrices=False)
        rest_OP = probed_OP - Q_OK @ (B_KI @ self._probes_IP.to(B_KI))
        rest = float(rest_OP.square().sum()) / max(1, rest_OP.shape[1])
        norm = (float(S_K.square().sum()) + rest) ** 0.5
        U_OK = Q_OK @ inner_KK
        error = rest**0.5 / norm if norm > 0 else 0.0
        return SketchedGradient(U_OK.float().cpu(), S_K.float().cpu(), Vt_KI.T.float().cpu(), norm, error)


def leading_vectors(delta_NO: Tensor, x_NI: Tensor, noise_IK: Tensor) -> tuple[Tensor, Tensor]:
    """Leading left and right singular vectors of ``δᵀ x``, by skinny products alone.

    Returns:
        ``U_OK`` and ``V_IK``, as many columns as the noise has.
    """
    Y_OK = delta_NO.T @ (x_NI @ noise_IK)
    for _ in range(_POWER_ITERATIONS):
        Y_OK = delta_NO.T @ (x_NI @ _orthonormal(x_NI.T @ (delta_NO @ _orthonormal(Y_OK))))
    Q_OK = _orthonormal(Y_OK)
    inner_KK, _, Vt_KI = torch.linalg.svd((delta_NO @ Q_OK).T @ x_NI, full_matrices=False)
    return Q_OK @ inner_KK, Vt_KI.T


def _orthonormal(M: Tensor) -> Tensor:
    return torch.linalg.qr(M)[0]
