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

import torch
from torch import Tensor

from lora_one.processes import Processes
from lora_one.skinny import (
    Product,
    leading_product,
    main_directions,
    merge,
    orthonormal,
    product_from_sketches,
    qr,
    triplets_of,
)
from lora_one.triplets import Triplets, check_norm, with_signs

# To be raised with every change of what the sketches find: kept estimates are found again by it.
SKETCH_VERSION = 3
_FEWEST_TRIPLETS = 16
_FEWEST_TWO_PASS_COLUMNS = 256


@dataclass(frozen=True)
class SketchSize:
    """Columns of the sketches.

    Attributes:
        right: k, columns of Ω; as many triplets are found, the leading half of them well.
        left: l, columns of Ψ; above k, so that the small inverse is well conditioned. Not used in two passes.
        probes: Random columns kept apart, to estimate the error.
    """

    right: int = 32
    left: int = 36
    probes: int = 4


def sketch_size(n_triplets: int, *, two_passes: bool) -> SketchSize:
    """Columns that find ``n_triplets`` triplets well; a second pass affords more, for flat spectra."""
    if two_passes:
        return SketchSize(right=max(_FEWEST_TWO_PASS_COLUMNS, 2 * n_triplets), left=0)
    return SketchSize(right=2 * n_triplets, left=9 * n_triplets // 4)


def triplets_to_keep(needed: int) -> int:
    """A power of two that covers what is needed: runs that differ in rank keep, and share, the same."""
    return max(_FEWEST_TRIPLETS, 2 ** math.ceil(math.log2(needed)))


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
        self._first: Product | None = None  # of the first batch, until Ω is chosen
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
            x_NI = torch.cat([x_NI, self._first.B_KI])
            delta_NO = torch.cat([delta_NO, self._first.Q_OK.T])
        noise_KO = torch.randn(self.k, delta_NO.shape[1], generator=self._generator).to(x_NI)
        self._first = leading_product(delta_NO, x_NI, noise_KO)

    def _add_next(self, x_NI: Tensor, delta_NO: Tensor, Y_CO: Tensor, omega_CI: Tensor) -> None:
        Y_CO.addmm_(omega_CI @ x_NI.T, delta_NO)

    def _aim(self, directions_IK: Tensor) -> None:
        self._omega_CI = torch.cat([directions_IK.T, self._probes_PI])
        self._first = None

    def _take_over(self, device: torch.device) -> None:
        """A layer that this process has not seen contributes nothing."""
        n_out, n_in = self.shape_OI
        if self._Y_CO is None:
            self._Y_CO = torch.zeros(self.k + self.n_probes, n_out, device=device)
            self._probes_PI = self._probes_PI.to(device)
        if self._first is None and self._omega_CI is None:
            Q_OK = orthonormal(torch.randn(n_out, self.k, generator=self._generator).to(device))
            self._first = Product(Q_OK, torch.zeros(self.k, n_in, device=device))

    def _describe(self, found: Product, processes: Processes) -> SketchedGradient:
        """Measures on the probes what the product leaves out."""
        assert self._Y_CO is not None
        U_OK, S_K, V_IK = (part.contiguous() for part in triplets_of(found))
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
        """Turns Ω and Ψ to the leading directions of what has been seen, and keeps no more than these."""
        if self._Y_CO is None or not self.check_finite():
            return
        Q_OK, B_KI = self.product()
        V_IK, R_KK = qr(B_KI.T)
        self._aim(V_IK)
        self._Y_CO[: self.k] = R_KK.float() @ Q_OK.T
        fill_EO = torch.randn(self._l - self.k, len(Q_OK), generator=self._generator).to(Q_OK)
        # Apart from Q, and about orthonormal, which is enough.
        fill_EO = (fill_EO - fill_EO @ Q_OK @ Q_OK.T) / len(Q_OK) ** 0.5
        self._psi_LO = torch.cat([Q_OK.T, fill_EO])
        # Ψᵀ Q is the identity above zeros.
        self._Z_LI = torch.cat([B_KI, B_KI.new_zeros(self._l - self.k, B_KI.shape[1])])

    def product(self) -> Product:
        """What has been seen, of rank k."""
        if self._first is not None:
            return self._first
        assert self._Y_CO is not None and self._Z_LI is not None and self._psi_LO is not None
        return product_from_sketches(self._Y_CO[: self.k], self._Z_LI, self._psi_LO)

    def sums(self) -> list[Tensor]:
        """What a batch that is not finite would spoil."""
        return [*super().sums(), *([self._Z_LI] if self._Z_LI is not None else [])]

    def finish(self, processes: Processes) -> SketchedGradient:
        """The leading singular triplets of the sum over all processes; to be called on all of them."""
        self._take_over(processes.device)
        return self._describe(merge(self.product(), self._generator, processes), processes)

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
        Q_OK, B_KI = self._first
        common_IK = main_directions(self._first, self._generator, processes)
        self._Y_CO[: self.k] = (common_IK.T @ B_KI.T) @ Q_OK.T
        self._aim(common_IK)

    def end_first_pass(self, processes: Processes) -> None:
        """Fixes Q, on all processes."""
        assert self._Y_CO is not None
        sum_KO = processes.sum_(self._Y_CO[: self.k].clone())
        self._Qt_KO = orthonormal(sum_KO.T).T.contiguous()
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
        return self._describe(Product(self._Qt_KO.T, B_KI), processes)
