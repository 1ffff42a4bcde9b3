"""Sketches of weight gradients: leading singular triplets without the gradient itself.

For a linear layer ``G = Σ δᵀ x`` over the positions, ``x`` being its input and ``δ`` the gradient of its
output. So ``G Ω = Σ δᵀ (x Ω)`` and ``Ψᵀ G = Σ (δ Ψ)ᵀ x`` are sums of skinny products: no (out, in) matrix
is formed, and no weight takes a gradient.

*One pass* keeps both sums: ``G ≈ Q (Ψᵀ Q)⁺ (Ψᵀ G)`` with Q an orthonormal basis of ``G Ω`` (generalised
Nyström, arXiv 2009.11392). Random ``Ω`` and ``Ψ`` lose several per cent of the energy, so they are the
leading singular vectors of what has been seen: first of the first batch, whose own gradient is decomposed
by skinny products too, and anew each time that the number of batches has doubled.

*Two passes* keep ``G Ω`` alone in the first, with more columns, and in the second find ``Qᵀ G`` exactly.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_one.processes import Processes
from lora_one.triplets import Triplets, check_norm, with_signs

# To be raised with every change of what the sketches find: kept estimates are found again by it.
SKETCH_VERSION = 1
_FEWEST_TRIPLETS = 16
_FEWEST_TWO_PASS_COLUMNS = 192
_MERGE_ROUNDS = 2
# Directions of Q that Ψ does not see carry rounding alone.
_UNSEEN = 1e-6
_NEARLY_SINGULAR = 1e-3


@dataclass(frozen=True)
class SketchSize:
    """Columns of the sketches.

    Attributes:
        right: k, columns of Ω; as many triplets are found, the leading half of them well.
        left: l, columns of Ψ; above k, so that the small inverse is well conditioned. Not used in two passes.
        probes: Random columns kept apart, to estimate the error.
    """

    right: int = 32
    left: int = 40
    probes: int = 4


def sketch_size(n_triplets: int, *, two_passes: bool) -> SketchSize:
    """Columns that find ``n_triplets`` triplets well; a second pass affords more, for flat spectra."""
    if two_passes:
        return SketchSize(right=max(_FEWEST_TWO_PASS_COLUMNS, 2 * n_triplets), left=0)
    return SketchSize(right=2 * n_triplets, left=5 * n_triplets // 2)


def triplets_to_keep(needed: int) -> int:
    """A power of two that covers what is needed: runs that differ in rank keep, and share, the same."""
    return max(_FEWEST_TRIPLETS, 2 ** math.ceil(math.log2(needed)))


class Factors(NamedTuple):
    """``U Σ Vᵀ`` with orthonormal columns, float32."""

    U_OK: Tensor
    S_K: Tensor
    V_IK: Tensor


@dataclass(frozen=True)
class SketchedGradient:
    """What a sketch knows of a gradient.

    Attributes:
        U_OK: Left singular vectors, float32 on the CPU.
        S_K: Singular values.
        V_IK: Right singular vectors.
        norm: Estimate of ‖G‖_F.
        error: Estimate of ‖G - U Σ Vᵀ‖_F / ‖G‖_F with all k triplets, from the probes.
        n_positions: Positions that it sums over.
    """

    U_OK: Tensor
    S_K: Tensor
    V_IK: Tensor
    norm: float
    error: float
    n_positions: int

    def triplets(self, name: str, n_triplets: int, divided_by: float = 1) -> Triplets:
        """The leading triplets of ``G / divided_by``, under the sign convention.

        Raises:
            UserError: If the gradient is zero or not finite, naming the target.
        """
        norm = check_norm(name, self.norm / divided_by)
        k = n_triplets
        return with_signs(self.U_OK[:, :k], self.S_K[:k] / divided_by, self.V_IK[:, :k], norm)


class _Sketch:
    """What one pass and two have in common: ``G Ω`` with Ω chosen after the first batch, and the probes.

    Sketches and directions lie as rows, ``(G Ω)ᵀ`` and ``Ωᵀ``: products of that shape are twice as fast.
    """

    def __init__(self, shape_OI: tuple[int, int], size: SketchSize, generator: torch.Generator) -> None:
        if size.probes < 1:
            raise ValueError("the error estimate needs at least one probe")
        self.shape_OI = shape_OI
        self.k = min(size.right, *shape_OI)
        self.n_probes = size.probes
        self.n_positions = 0
        self.is_finite = True
        self._generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        self._probes_PI = torch.randn(size.probes, shape_OI[1], generator=self._generator)
        self._first: Factors | None = None  # of the first batch, until Ω is chosen
        self._omega_CI: Tensor | None = None  # Ω, then the probes
        self._Y_CO: Tensor | None = None  # G Ω, then G times the probes

    def add(self, x_NI: Tensor, delta_NO: Tensor) -> None:
        """Adds inputs and output gradients of some positions, float32."""
        self.n_positions += len(x_NI)
        if self._Y_CO is None:
            self._Y_CO = x_NI.new_zeros(self.k + self.n_probes, self.shape_OI[0])
            self._probes_PI = self._probes_PI.to(x_NI.device)
        if self._omega_CI is None:
            self._add_first(x_NI, delta_NO, self._Y_CO)
        else:
            self._add_next(x_NI, delta_NO, self._Y_CO, self._omega_CI)

    def sums(self) -> list[Tensor]:
        """What a batch that is not finite would spoil."""
        return [tensor for tensor in (self._Y_CO,) if tensor is not None]

    def check_finite(self) -> bool:
        """Whether every number that has been added was finite."""
        self.is_finite &= all(bool(tensor.sum().isfinite()) for tensor in self.sums())
        return self.is_finite

    def _add_first(self, x_NI: Tensor, delta_NO: Tensor, Y_CO: Tensor) -> None:
        if not torch.isfinite(x_NI.sum() + delta_NO.sum()):
            self.is_finite = False  # a decomposition would fail on it
            return
        Y_CO[self.k :].addmm_(self._probes_PI @ x_NI.T, delta_NO)
        if self._first is not None:  # a layer that is called twice in one batch
            U_OK, S_K, V_IK = self._first
            x_NI, delta_NO = torch.cat([x_NI, V_IK.T]), torch.cat([delta_NO, (U_OK * S_K).T])
        noise_KO = torch.randn(self.k, delta_NO.shape[1], generator=self._generator).to(x_NI)
        self._first = leading_factors(delta_NO, x_NI, noise_KO)

    def _add_next(self, x_NI: Tensor, delta_NO: Tensor, Y_CO: Tensor, omega_CI: Tensor) -> None:
        Y_CO.addmm_(omega_CI @ x_NI.T, delta_NO)

    def _aim(self, V_IK: Tensor) -> None:
        self._omega_CI = torch.cat([V_IK.T, self._probes_PI])
        self._first = None

    def _take_over(self, device: torch.device) -> None:
        """A layer that this process has not seen contributes nothing."""
        n_out, n_in = self.shape_OI
        if self._Y_CO is None:
            self._Y_CO = torch.zeros(self.k + self.n_probes, n_out, device=device)
            self._probes_PI = self._probes_PI.to(device)
        if self._first is None and self._omega_CI is None:
            U_OK, V_IK = (torch.randn(n, self.k, generator=self._generator).to(device) for n in (n_out, n_in))
            self._first = Factors(_orthonormal(U_OK), torch.zeros(self.k, device=device), _orthonormal(V_IK))

    def _describe(self, found: Factors, processes: Processes) -> SketchedGradient:
        """Measures on the probes what the factors leave out."""
        assert self._Y_CO is not None
        U_OK, S_K, V_IK = (part.contiguous().clone() for part in found)
        processes.from_main_(U_OK, S_K, V_IK)  # not every machine rounds alike
        probed_PO = processes.sum_(self._Y_CO[-self.n_probes :].clone())
        rest_PO = probed_PO - (self._probes_PI @ V_IK * S_K) @ U_OK.T
        rest = float(rest_PO.double().square().sum()) / self.n_probes
        norm = (float(S_K.double().square().sum()) + rest) ** 0.5
        n_positions = int(processes.sum_(torch.tensor(self.n_positions)))
        error = rest**0.5 / norm if norm > 0 else 0.0
        return SketchedGradient(U_OK.cpu(), S_K.cpu(), V_IK.cpu(), norm, error, n_positions)


class OnePassSketch(_Sketch):
    """The sketches ``G Ω`` and ``Ψᵀ G`` of one layer, summed over batches.

    Every process sums its own; ``finish`` brings them together.

    Args:
        shape_OI: Of the weight.
        size: Columns of the sketches; no more than the weight has rows or columns.
        generator: Source of the random parts, on the CPU.
    """

    def __init__(self, shape_OI: tuple[int, int], size: SketchSize, generator: torch.Generator) -> None:
        super().__init__(shape_OI, size, generator)
        self._l = min(max(size.left, self.k), *shape_OI)
        self._psi_LO: Tensor | None = None
        self._Z_LI: Tensor | None = None

    def aim(self) -> None:
        """Turns Ω and Ψ to the leading singular vectors of what has been seen; keeps that as its factors."""
        if self._Y_CO is None or not self.check_finite():
            return
        U_OK, S_K, V_IK = self.factors()
        fill_EO = torch.randn(self._l - self.k, len(U_OK), generator=self._generator).to(U_OK)
        # Apart from U, and about orthonormal, which is enough.
        fill_EO = (fill_EO - fill_EO @ U_OK @ U_OK.T) / len(U_OK) ** 0.5
        self._psi_LO = torch.cat([U_OK.T, fill_EO])
        self._aim(V_IK)
        self._Y_CO[: self.k] = (U_OK * S_K).T
        # Ψᵀ U is the identity above zeros.
        self._Z_LI = torch.cat([(V_IK * S_K).T, V_IK.new_zeros(self._l - self.k, len(V_IK))])

    def factors(self) -> Factors:
        """The leading singular triplets of what has been seen."""
        if self._first is not None:
            return self._first
        assert self._Y_CO is not None and self._Z_LI is not None and self._psi_LO is not None
        Q_OK = _orthonormal(self._Y_CO[: self.k].T)
        seen_KL = torch.linalg.pinv((self._psi_LO @ Q_OK).double(), rtol=_UNSEEN).float()
        return _factors(Q_OK, seen_KL @ self._Z_LI)

    def sums(self) -> list[Tensor]:
        """What a batch that is not finite would spoil."""
        return [*super().sums(), *([self._Z_LI] if self._Z_LI is not None else [])]

    def finish(self, processes: Processes) -> SketchedGradient:
        """The leading singular triplets of the sum over all processes; to be called on all of them."""
        self._take_over(processes.device)
        return self._describe(merge_factors(self.factors(), processes), processes)

    def _add_next(self, x_NI: Tensor, delta_NO: Tensor, Y_CO: Tensor, omega_CI: Tensor) -> None:
        super()._add_next(x_NI, delta_NO, Y_CO, omega_CI)
        assert self._psi_LO is not None and self._Z_LI is not None
        self._Z_LI.addmm_(self._psi_LO @ delta_NO.T, x_NI)


class TwoPassSketch(_Sketch):
    """The sketch ``G Ω`` of one layer in a first pass, and ``Qᵀ G`` in a second.

    Args:
        shape_OI: Of the weight.
        size: Columns of the sketch; no more than the weight has rows or columns.
        generator: Source of the random parts, on the CPU.
    """

    _Qt_KO: Tensor | None = None
    _B_KI: Tensor | None = None

    def aim(self, processes: Processes) -> None:
        """Turns Ω to what the main process's first batch was made of; to be called on all after the first."""
        self._take_over(processes.device)
        assert self._first is not None and self._Y_CO is not None
        U_OK, S_K, V_IK = self._first
        common_IK = V_IK.contiguous().clone()
        processes.from_main_(common_IK)
        self._Y_CO[: self.k] = (common_IK.T @ V_IK * S_K) @ U_OK.T
        self._aim(common_IK)

    def end_first_pass(self, processes: Processes) -> None:
        """Fixes Q, on all processes."""
        assert self._Y_CO is not None
        sum_KO = processes.sum_(self._Y_CO[: self.k].clone())
        self._Qt_KO = _orthonormal(sum_KO.T).T.contiguous()
        processes.from_main_(self._Qt_KO)
        self._Y_CO, self._omega_CI = self._Y_CO[self.k :].clone(), None  # their place is needed now
        self._B_KI = self._Qt_KO.new_zeros(self.k, self.shape_OI[1])

    def project(self, x_NI: Tensor, delta_NO: Tensor) -> None:
        """Adds inputs and output gradients of some positions in the second pass."""
        assert self._Qt_KO is not None and self._B_KI is not None
        self._B_KI.addmm_(self._Qt_KO @ delta_NO.T, x_NI)

    def sums(self) -> list[Tensor]:
        """What a batch that is not finite would spoil."""
        return super().sums() if self._B_KI is None else [self._B_KI]

    def finish(self, processes: Processes) -> SketchedGradient:
        """The leading singular triplets of the sum over all processes; to be called on all of them."""
        assert self._Qt_KO is not None and self._B_KI is not None
        B_KI = processes.sum_(self._B_KI)
        return self._describe(_factors(self._Qt_KO.T, B_KI), processes)


def leading_factors(delta_NO: Tensor, x_NI: Tensor, noise_KO: Tensor) -> Factors:
    """Leading singular triplets of ``δᵀ x``, by skinny products alone; as many as the noise has rows."""
    aimed_KI = (noise_KO @ delta_NO.T) @ x_NI  # so that a flat tail blurs the rest less
    Q_OK = _orthonormal((aimed_KI @ x_NI.T @ delta_NO).T)
    return _factors(Q_OK, (Q_OK.T @ delta_NO.T) @ x_NI)


def merge_factors(mine: Factors, processes: Processes) -> Factors:
    """Leading singular triplets of the sum of all processes' factors, by subspace iteration."""
    if processes.world_size == 1:
        return mine
    U_OK, S_K, V_IK = mine
    start_IK = V_IK.contiguous().clone()
    processes.from_main_(start_IK)
    for _ in range(_MERGE_ROUNDS):
        Q_OK = _orthonormal(processes.sum_((U_OK * S_K) @ (V_IK.T @ start_IK))).contiguous()
        processes.from_main_(Q_OK)
        B_KI = processes.sum_(((Q_OK.T @ U_OK) * S_K) @ V_IK.T)
        start_IK = _orthonormal(B_KI.T)
    return _factors(Q_OK, B_KI)


def _factors(Q_OK: Tensor, B_KI: Tensor) -> Factors:
    """The singular triplets of ``Q B``; the long side of B goes through a QR, which is cheaper."""
    right_IK, R_KK = _qr(B_KI.T)
    inner_KK, S_K, Vt_KK = (part.float() for part in torch.linalg.svd(R_KK.T))
    return Factors(Q_OK @ inner_KK, S_K, right_IK @ Vt_KK.T)


def _orthonormal(M: Tensor) -> Tensor:
    return _qr(M)[0]


def _qr(M: Tensor) -> tuple[Tensor, Tensor]:
    """``M = Q R`` of a float32 matrix with few columns; R in float64.

    By the Cholesky factor of ``MᵀM`` in float64, several times faster than Householder's way and as exact as
    long as M is not close to singular; by Householder's way otherwise.
    """
    wide = M.double()
    L, failed = torch.linalg.cholesky_ex(wide.T @ wide)
    diagonal = L.diagonal()
    if bool((failed == 0) & (diagonal.min() > _NEARLY_SINGULAR * diagonal.max())):
        inverse = torch.linalg.solve_triangular(L, torch.eye(len(L)).to(L), upper=False).T
        return (wide @ inverse).float(), L.T
    Q, R = torch.linalg.qr(wide)
    return Q.float(), R
