"""Sketches of weight gradients: leading singular triplets without the gradient itself.

For a linear layer ``G = Σ δᵀ x`` over the positions, ``x`` being its input and ``δ`` the gradient of its
output. So ``G Ω = Σ δᵀ (x Ω)`` and ``Ψᵀ G = Σ (δ Ψ)ᵀ x`` are sums of skinny products: no (out, in) matrix
is formed, and no weight takes a gradient.

*One pass* keeps both sums: ``G ≈ Q (Ψᵀ Q)⁺ (Ψᵀ G)`` with Q an orthonormal basis of ``G Ω`` (generalised
Nyström, arXiv 2009.11392). Random ``Ω`` and ``Ψ`` lose several per cent of the energy, so they are the
leading singular vectors of what has been seen: first of the first batch, whose own gradient is decomposed
by skinny products too, and anew each time that the number of batches has doubled.

*Two passes* keep ``G Ω`` alone in the first, with more columns, and in the second find ``Qᵀ G`` exactly.

Each layer has a sketch of its own; what is decomposed is decomposed for several layers of one shape at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_one.processes import Processes
from lora_one.skinny import (
    Product,
    leading_product,
    main_directions,
    merge,
    orthonormal,
    product_from_sketches,
    qr,
    stacked,
    together,
    triplets_of,
)
from lora_one.triplets import Triplets, check_norm, with_signs

# To be raised with every change of what the sketches find: kept estimates are found again by it.
SKETCH_VERSION = 4
_FEWEST_TRIPLETS = 16
_FEWEST_TWO_PASS_COLUMNS = 256
_LAYERS_AT_ONCE = 8
_BYTES_AT_ONCE = 4 * 2**20  # of one copy of their sketches: a decomposition makes several


@dataclass(frozen=True)
class SketchSize:
    """Columns of the sketches.

    Attributes:
        right: k, columns of Ω; as many triplets are found, the leading half of them well.
        left: l, columns of Ψ; above k, so that the small inverse is well conditioned. Not used in two passes.
        probes: Random columns kept apart, to estimate the error.
    """

    right: int = 28
    left: int = 32
    probes: int = 4


def sketch_size(n_triplets: int, *, two_passes: bool) -> SketchSize:
    """Columns that find ``n_triplets`` triplets well; a second pass affords more, for flat spectra.

    In one pass both sides, the probes with them, have twice as many from eight on: products of 36 rows take a
    third longer than those of 32.
    """
    if two_passes:
        return SketchSize(right=max(_FEWEST_TWO_PASS_COLUMNS, 2 * n_triplets), left=0)
    right = max(2 * n_triplets - SketchSize.probes, n_triplets + 4)
    return SketchSize(right=right, left=right + 4)


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
        self._is_finite = True
        self._checksum: Tensor | None = None  # of all that has been added
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

    @property
    def device(self) -> torch.device | None:
        """Where the layer's activations are; None as long as none have come."""
        return None if self._Y_CO is None else self._Y_CO.device

    def sums(self) -> list[Tensor]:
        """What a batch that is not finite would spoil."""
        return [tensor for tensor in (self._Y_CO,) if tensor is not None]

    def seems_finite(self) -> bool:
        """Whether every number that has been added was finite: cheap enough to be asked after each batch."""
        if self._checksum is not None:
            self._is_finite &= math.isfinite(self._checksum.item())
        return self._is_finite

    def is_finite(self) -> bool:
        """Whether every sum is, too: finite numbers can add up to infinity."""
        return self.seems_finite() and all(bool(tensor.sum().isfinite()) for tensor in self.sums())

    def _counted(self, product: Tensor) -> Tensor:
        """What is added, or a skinny product of it: what is not finite shows in the sum of either."""
        checksum = product.sum()
        self._checksum = checksum if self._checksum is None else self._checksum + checksum
        return product

    def _add_first(self, x_NI: Tensor, delta_NO: Tensor, Y_CO: Tensor) -> None:
        if not torch.isfinite(x_NI.sum() + delta_NO.sum()):
            self._is_finite = False  # a decomposition would fail on it
            return
        Y_CO[self.k :].addmm_(self._probes_PI @ x_NI.T, delta_NO)
        if self._first is not None:  # a layer that is called twice in one batch
            x_NI = torch.cat([x_NI, self._first.B_KI])
            delta_NO = torch.cat([delta_NO, self._first.Q_OK.T])
        noise_KO = torch.randn(self.k, delta_NO.shape[1], generator=self._generator).to(x_NI)
        self._first = leading_product(delta_NO, x_NI, noise_KO)

    def _add_next(self, x_NI: Tensor, delta_NO: Tensor, Y_CO: Tensor, omega_CI: Tensor) -> None:
        Y_CO.addmm_(self._counted(omega_CI @ x_NI.T), delta_NO)

    def _take_over(self, device: torch.device) -> None:
        """A layer that this process has not seen contributes nothing."""
        n_out, n_in = self.shape_OI
        if self._Y_CO is None:
            self._Y_CO = torch.zeros(self.k + self.n_probes, n_out, device=device)
            self._probes_PI = self._probes_PI.to(device)
        if self._first is None and self._omega_CI is None:
            Q_OK = orthonormal(torch.randn(n_out, self.k, generator=self._generator).to(device))
            self._first = Product(Q_OK, torch.zeros(self.k, n_in, device=device))

    @staticmethod
    def _describe(group: "Sequence[_Sketch]", found: Product, processes: Processes) -> list[SketchedGradient]:
        """Measures on the probes what the product leaves out."""
        U_TOK, S_TK, V_TIK = (part.contiguous() for part in triplets_of(found))
        processes.from_main_(U_TOK, S_TK, V_TIK)  # not every machine rounds alike
        probed_TPO = processes.sum_(torch.stack([sketch._probed_PO() for sketch in group]))
        probes_TPI = torch.stack([sketch._probes_PI for sketch in group])
        rest_TPO = probed_TPO - (probes_TPI @ V_TIK * S_TK[:, None]) @ U_TOK.mT
        rest_T = rest_TPO.double().square().mean(1).sum(-1)
        norm_T = (S_TK.double().square().sum(-1) + rest_T).sqrt()
        error_T = torch.where(norm_T > 0, rest_T.sqrt() / norm_T, 0.0)
        n_positions_T = processes.sum_(torch.tensor([sketch.n_positions for sketch in group]))
        rows = zip(norm_T.tolist(), error_T.tolist(), n_positions_T.tolist(), strict=True)
        parts = zip(U_TOK.cpu(), S_TK.cpu(), V_TIK.cpu(), strict=True)
        return [SketchedGradient(*part, *row) for part, row in zip(parts, rows, strict=True)]

    def _probed_PO(self) -> Tensor:
        assert self._Y_CO is not None
        return self._Y_CO[-self.n_probes :]


Sketch = TypeVar("Sketch", bound=_Sketch)


def groups_of(sketches: Sequence[Sketch], processes: Processes | None = None) -> list[list[Sketch]]:
    """Sketches of one shape on one device, a few at a time; the same on every one of the processes."""
    alike: dict[object, list[Sketch]] = {}
    for sketch in sketches:
        alike.setdefault((sketch.shape_OI, _device(sketch, processes)), []).append(sketch)
    groups = []
    for group in alike.values():
        n_bytes = 4 * group[0].k * sum(group[0].shape_OI)
        n = min(_LAYERS_AT_ONCE, max(1, _BYTES_AT_ONCE // n_bytes))
        groups += [group[i : i + n] for i in range(0, len(group), n)]
    return groups


def _device(sketch: _Sketch, processes: Processes | None) -> torch.device | None:
    """Where a sketch will be decomposed; where there are several processes, each has one device."""
    if processes is None:
        return sketch.device
    return processes.device if processes.world_size > 1 else sketch.device or processes.device


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

    @staticmethod
    def aim(group: "Sequence[OnePassSketch]") -> None:
        """Turns Ω and Ψ to the leading directions of what has been seen, and keeps no more than these."""
        group = [sketch for sketch in group if sketch._Y_CO is not None and sketch.is_finite()]
        if not group:
            return
        Q_TOK, B_TKI = products_of(group)
        V_TIK, R_TKK = qr(B_TKI.mT)
        fill_TEO = torch.stack([sketch._fill_EO() for sketch in group]).to(Q_TOK)
        # Apart from Q, and about orthonormal, which is enough.
        fill_TEO = (fill_TEO - fill_TEO @ Q_TOK @ Q_TOK.mT) / Q_TOK.shape[1] ** 0.5
        probed_TPO = torch.stack([sketch._probed_PO() for sketch in group])
        new = (
            torch.cat([V_TIK.mT, torch.stack([sketch._probes_PI for sketch in group])], 1),
            torch.cat([R_TKK.float() @ Q_TOK.mT, probed_TPO], 1),
            torch.cat([Q_TOK.mT, fill_TEO], 1),
            nn.functional.pad(B_TKI, (0, 0, 0, fill_TEO.shape[1])),  # Ψᵀ Q is the identity above zeros
        )
        for sketch, *parts in zip(group, *new, strict=True):
            sketch._omega_CI, sketch._Y_CO, sketch._psi_LO, sketch._Z_LI = parts
            sketch._first = None

    def _fill_EO(self) -> Tensor:
        return torch.randn(self._l - self.k, self.shape_OI[0], generator=self._generator)

    @property
    def is_aimed(self) -> bool:
        """Whether the sketches have directions yet."""
        return self._first is None

    def first(self) -> Product:
        """What the first batch was made of."""
        assert self._first is not None
        return self._first

    def sketches(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(G Ω)ᵀ`` and the probes' rows below it, ``Ψᵀ G``, and ``Ψᵀ``."""
        assert self._Y_CO is not None and self._Z_LI is not None and self._psi_LO is not None
        return self._Y_CO, self._Z_LI, self._psi_LO

    def sums(self) -> list[Tensor]:
        """What a batch that is not finite would spoil."""
        return [*super().sums(), *([self._Z_LI] if self._Z_LI is not None else [])]

    @classmethod
    def finish(cls, group: "Sequence[OnePassSketch]", processes: Processes) -> list[SketchedGradient]:
        """The leading singular triplets of the sums over all processes; to be called on all of them."""
        for sketch in group:
            sketch._take_over(processes.device)
        return cls._describe(group, merge(products_of(group), group[0]._generator, processes), processes)

    def _add_next(self, x_NI: Tensor, delta_NO: Tensor, Y_CO: Tensor, omega_CI: Tensor) -> None:
        super()._add_next(x_NI, delta_NO, Y_CO, omega_CI)
        assert self._psi_LO is not None and self._Z_LI is not None
        self._Z_LI.addmm_(self._counted(self._psi_LO @ delta_NO.T), x_NI)


def products_of(group: Sequence[OnePassSketch]) -> Product:
    """What has been seen of each layer, of rank k."""
    if len({sketch.is_aimed for sketch in group}) > 1:  # a layer that the first batch did not reach
        each = [products_of([sketch]) for sketch in group]
        return Product(*(torch.cat(parts) for parts in zip(*each, strict=True)))
    if not group[0].is_aimed:
        return stacked([sketch.first() for sketch in group])
    parts = zip(*(sketch.sketches() for sketch in group), strict=True)
    Y_TCO, Z_TLI, psi_TLO = (together(part) for part in parts)  # an aim leaves those of a group together
    return product_from_sketches(Y_TCO[:, : group[0].k], Z_TLI, psi_TLO)


class TwoPassSketch(_Sketch):
    """The sketch ``G Ω`` of one layer in a first pass, and ``Qᵀ G`` in a second.

    Args:
        shape_OI: Of the weight.
        size: Columns of the sketch; no more than the weight has rows or columns.
        generator: Source of the random parts, on the CPU.
    """

    _Qt_KO: Tensor | None = None
    _B_KI: Tensor | None = None

    @staticmethod
    def aim(group: "Sequence[TwoPassSketch]", processes: Processes) -> None:
        """Turns Ω to what the main process's first batch was made of; to be called on all after the first."""
        for sketch in group:
            sketch._take_over(processes.device)
        seen = stacked([sketch._first for sketch in group if sketch._first is not None])
        common_TIK = main_directions(seen, group[0]._generator, processes)
        Y_TKO = (common_TIK.mT @ seen.B_KI.mT) @ seen.Q_OK.mT
        for sketch, common_IK, Y_KO in zip(group, common_TIK, Y_TKO, strict=True):
            assert sketch._Y_CO is not None
            sketch._Y_CO[: sketch.k] = Y_KO
            sketch._omega_CI = torch.cat([common_IK.T, sketch._probes_PI])
            sketch._first = None

    @staticmethod
    def end_first_pass(group: "Sequence[TwoPassSketch]", processes: Processes) -> None:
        """Fixes Q, on all processes."""
        sum_TKO = processes.sum_(torch.stack([sketch._sketched_KO() for sketch in group]))
        Qt_TKO = orthonormal(sum_TKO.mT).mT.contiguous()
        processes.from_main_(Qt_TKO)
        for sketch, Qt_KO in zip(group, Qt_TKO, strict=True):
            sketch._project_on(Qt_KO)

    def _sketched_KO(self) -> Tensor:
        assert self._Y_CO is not None
        return self._Y_CO[: self.k]

    def _project_on(self, Qt_KO: Tensor) -> None:
        self._Qt_KO = Qt_KO
        self._Y_CO, self._omega_CI = self._probed_PO().clone(), None  # their place is needed now
        self._B_KI = Qt_KO.new_zeros(self.k, self.shape_OI[1])

    def _add_next(self, x_NI: Tensor, delta_NO: Tensor, Y_CO: Tensor, omega_CI: Tensor) -> None:
        super()._add_next(x_NI, self._counted(delta_NO), Y_CO, omega_CI)

    def project(self, x_NI: Tensor, delta_NO: Tensor) -> None:
        """Adds inputs and output gradients of some positions in the second pass."""
        assert self._Qt_KO is not None and self._B_KI is not None
        self._B_KI.addmm_(self._counted(self._Qt_KO @ delta_NO.T), x_NI)

    def sums(self) -> list[Tensor]:
        """What a batch that is not finite would spoil."""
        return super().sums() if self._B_KI is None else [self._B_KI]

    @classmethod
    def finish(cls, group: "Sequence[TwoPassSketch]", processes: Processes) -> list[SketchedGradient]:
        """The leading singular triplets of the sums over all processes; to be called on all of them."""
        Q_TOK = torch.stack([sketch._Qt_KO for sketch in group if sketch._Qt_KO is not None]).mT
        B_TKI = torch.stack([sketch._B_KI for sketch in group if sketch._B_KI is not None])
        return cls._describe(group, Product(Q_TOK, processes.sum_(B_TKI)), processes)
