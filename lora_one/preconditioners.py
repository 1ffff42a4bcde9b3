"""Preconditioned gradients of LoRA factors, from r x r matrices of the factors themselves.

For ``W = W₀ + s B A`` the gradients of the factors, ``g_B`` (out, r) and ``g_A`` (r, in), become

    classic    g_B (A Aᵀ + δI)⁻¹              (Bᵀ B + δI)⁻¹ g_A
    symmetric  (I - ½ P_B) g_B (A Aᵀ + δI)⁻¹   (Bᵀ B + δI)⁻¹ g_A (I - ½ P_A)
    sylvester  (I - P_B) g_B (A Aᵀ + δI)⁻¹ - B X   (Bᵀ B + δI)⁻¹ g_A + X A

with ``P_B = B (Bᵀ B + δI)⁻¹ Bᵀ``, ``P_A = Aᵀ (A Aᵀ + δI)⁻¹ A``, and X the solution of
``(Bᵀ B + δI) X + X (A Aᵀ + δI) = -(Bᵀ B + δI)⁻¹ g_A Aᵀ``. *Classic* is Riemannian LoRA's (arXiv 2402.02347).
Undamped, a step of *symmetric* and of *sylvester* (LoRA-Pro, arXiv 2407.18242) moves ``B A`` along the same
direction, the gradient of ``B A`` projected on the tangent space of the matrices of rank r; they share it out
between the factors in different ways.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_one.errors import UserError

Form = Literal["classic", "symmetric", "sylvester"]

# Below this share of the largest entry, a pivot is mostly float32's rounding.
_SMALLEST_PIVOT = 1e-6
# Numbers in a chunk: 4 MiB of preconditioned gradients stay in a CPU's cache until they are used.
_CHUNK = 2**20


class FactorPair(NamedTuple):
    """The trained factors of one layer."""

    name: str
    A_RI: nn.Parameter
    B_OR: nn.Parameter
    scaling: float


class FactorGroup:
    """Pairs of one shape, whose factors lie side by side in memory: one product for all of them.

    The parameters become views of two tensors, (P, r, in) and (P, out, r); their values stay.
    """

    def __init__(self, pairs: Sequence[FactorPair]) -> None:
        self.pairs = list(pairs)
        self._sides = [_Side([pair.A_RI for pair in pairs]), _Side([pair.B_OR for pair in pairs])]

    def stacks(self) -> list[Tensor]:
        """All A and all B."""
        return [side.stack() for side in self._sides]


class _Side:
    def __init__(self, factors: list[nn.Parameter]) -> None:
        self.factors = factors
        self._gather()

    def stack(self) -> Tensor:
        """All in one tensor, made anew where somebody has given a factor another place."""
        if [factor.data_ptr() for factor in self.factors] != self._places:
            self._gather()
        return self._stack

    def _gather(self) -> None:
        self._stack = torch.stack([factor.data for factor in self.factors])
        for factor, part in zip(self.factors, self._stack, strict=True):
            factor.data = part
        self._places = [factor.data_ptr() for factor in self.factors]


def group_pairs(pairs: Sequence[FactorPair]) -> list[list[FactorGroup]]:
    """The pairs by rank and device, whose r x r systems are one batch, and within these by shape."""
    by_shape: dict[Any, list[FactorPair]] = {}
    for pair in pairs:
        key = (len(pair.A_RI), pair.A_RI.device, pair.A_RI.dtype, pair.A_RI.shape, pair.B_OR.shape)
        by_shape.setdefault(key, []).append(pair)
    batches: dict[Any, list[FactorGroup]] = {}
    for key, found in by_shape.items():
        batches.setdefault(key[:2], []).append(FactorGroup(found))
    return list(batches.values())


class Grams(NamedTuple):
    """``A Aᵀ + δI`` and ``Bᵀ B + δI`` of P pairs of one rank, and their inverses; float32."""

    of_A_PRR: Tensor
    of_B_PRR: Tensor
    inverse_A_PRR: Tensor
    inverse_B_PRR: Tensor

    def at(self, rows: int | list[int]) -> "Grams":
        """Those of one pair, without the leading dimension, or of some."""
        return Grams(*(part[rows] for part in self))


def damped_grams(groups: Sequence[FactorGroup], damping: float) -> tuple[Grams, int]:
    """The matrices of all pairs of some groups of one rank, in their order.

    One that is singular to float32, or nearly, is damped by 1e-7 of its mean eigenvalue more, then tenfold
    each time.

    Returns:
        The matrices, and how many of the 2P needed more damping than δ.

    Raises:
        UserError: If a factor is not finite, naming its layer.
    """
    stacks = [group.stacks() for group in groups]
    A, B = ([float32(both[side]) for both in stacks] for side in (0, 1))
    gram_QRR = torch.cat([*(A_PRI @ A_PRI.mT for A_PRI in A), *(B_POR.mT @ B_POR for B_POR in B)])
    gram_QRR.diagonal(dim1=-2, dim2=-1).add_(damping)
    L_QRR, is_good_Q = _cholesky(gram_QRR)
    bad_E = (~is_good_Q).nonzero().flatten()
    if len(bad_E):
        names = [pair.name for group in groups for pair in group.pairs] * 2
        of_bad = [names[index] for index in bad_E.tolist()]
        gram_QRR[bad_E], L_QRR[bad_E] = _damp(gram_QRR[bad_E], of_bad)
    return Grams(*gram_QRR.chunk(2), *torch.cholesky_inverse(L_QRR).chunk(2)), len(bad_E)


class Mixing(NamedTuple):
    """The r x r matrices that make a preconditioned gradient of a gradient and a factor.

    ``inverse_B g_A - along_A A`` and ``g_B inverse_A - B along_B``, where the second terms may be none. One
    pair's, or with a leading dimension those of several.
    """

    inverse_A: Tensor
    inverse_B: Tensor
    along_A: Tensor | None
    along_B: Tensor | None

    def of_A(self, A: Tensor, grad_A: Tensor, out: Tensor | None = None) -> Tensor:
        """The preconditioned gradient of A."""
        mixed = _product(self.inverse_B, grad_A, out)
        return mixed if self.along_A is None else _subtract(mixed, self.along_A, A)

    def of_B(self, B: Tensor, grad_B: Tensor, out: Tensor | None = None) -> Tensor:
        """The preconditioned gradient of B."""
        mixed = _product(grad_B, self.inverse_A, out)
        return mixed if self.along_B is None else _subtract(mixed, B, self.along_B)

    def at_each(self, parts: Sequence["Part"]) -> list["Mixing"]:
        """Those of each part."""
        columns: list[list[Any]] = []
        for matrices in self:
            if matrices is None:
                columns.append([None] * len(parts))
                continue
            # Indexing a list is much cheaper than indexing a tensor for every pair.
            rows = matrices.unbind() if all(isinstance(part.rows, int) for part in parts) else matrices
            columns.append([rows[part.rows] for part in parts])
        return [Mixing(*own) for own in zip(*columns, strict=True)]


def mixing(
    grams: Grams, form: Form | Literal["one_sided"], gA_At: Tensor | None = None, Bt_gB: Tensor | None = None
) -> Mixing:
    """The mixing matrices of one pair or several.

    Args:
        grams: Of the factors.
        form: One of the three; ``one_sided`` is *sylvester* with X = 0.
        gA_At: ``g_A Aᵀ`` (..., r, r); not needed for *classic*.
        Bt_gB: ``Bᵀ g_B`` (..., r, r); not needed for *classic*.
    """
    of_A, of_B, inverse_A, inverse_B = grams
    if form == "classic":
        return Mixing(inverse_A, inverse_B, None, None)
    assert gA_At is not None and Bt_gB is not None
    along_A, along_B = inverse_B @ gA_At, inverse_B @ Bt_gB @ inverse_A
    if form == "one_sided":
        return Mixing(inverse_A, inverse_B, None, along_B)
    if form == "symmetric":
        return Mixing(inverse_A, inverse_B, 0.5 * along_A @ inverse_A, 0.5 * along_B)
    X = solve_sylvester(of_B, of_A, -along_A)
    return Mixing(inverse_A, inverse_B, -X, along_B + X)


class Part(NamedTuple):
    """What is computed in one go: one pair, or all of a shape with a leading dimension; float32."""

    pairs: list[FactorPair]
    rows: Any  # of these pairs in the r x r matrices: a number, or a list of them
    A: Tensor
    B: Tensor
    grad_A: Tensor
    grad_B: Tensor


def parts_of(groups: Sequence[FactorGroup], *, one_by_one: bool) -> list[Part]:
    """The pairs of some groups that have gradients."""
    parts, first = [], 0
    for group in groups:
        active = [(first + n, pair) for n, pair in enumerate(group.pairs) if _has_gradients(pair)]
        first += len(group.pairs)
        if one_by_one:
            parts += [Part([pair], row, *map(float32, _tensors(pair))) for row, pair in active]
        elif active:
            rows, pairs = [row for row, _ in active], [pair for _, pair in active]
            stacked = map(torch.stack, zip(*map(_tensors, pairs), strict=True))
            parts.append(Part(pairs, rows, *map(float32, stacked)))
    return parts


class Workspace:
    """Memory for results on a CPU, where fresh memory costs more than the products that fill it."""

    def __init__(self) -> None:
        self._buffers: dict[Any, Tensor] = {}

    def like(self, tensor: Tensor, number: int) -> Tensor:
        """The buffer of that number and shape."""
        key = (number, tensor.shape)
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(tensor)
        return self._buffers[key]


Chunk = tuple[list[nn.Parameter], list[Tensor]]


def preconditioned(
    groups: Sequence[FactorGroup], grams: Grams, form: Form, workspace: Workspace, *, one_by_one: bool
) -> Iterator[Chunk]:
    """Factors and their preconditioned gradients, a few at a time.

    Each chunk has to be used before the next is asked for: on a CPU its memory is used again.

    Args:
        groups: Of one rank.
        grams: Theirs.
        form: One of the three.
        workspace: Kept from step to step.
        one_by_one: Pair by pair, for the sake of a CPU's cache, and not all of a shape at once.
    """
    parts = parts_of(groups, one_by_one=one_by_one)
    products: list[Tensor] = []
    if form != "classic":
        products = [torch.zeros_like(grams.of_A_PRR) for _ in range(2)]
        for part in parts:
            products[0][part.rows] = part.grad_A @ part.A.mT
            products[1][part.rows] = part.B.mT @ part.grad_B
    factors: list[nn.Parameter] = []
    gradients: list[Tensor] = []
    size = 0
    for part, own in zip(parts, mixing(grams, form, *products).at_each(parts), strict=True):
        outs = [workspace.like(g, len(factors)) if one_by_one else None for g in (part.grad_A, part.grad_B)]
        of_A, of_B = own.of_A(part.A, part.grad_A, outs[0]), own.of_B(part.B, part.grad_B, outs[1])
        factors += [pair.A_RI for pair in part.pairs] + [pair.B_OR for pair in part.pairs]
        gradients += [of_A, of_B] if one_by_one else [*of_A.unbind(), *of_B.unbind()]
        size += of_A.numel() + of_B.numel()
        if size > _CHUNK:
            yield factors, gradients
            factors, gradients, size = [], [], 0
    if factors:
        yield factors, gradients


def solve_sylvester(M: Tensor, N: Tensor, C: Tensor) -> Tensor:
    """X with ``M X + X N = C`` for symmetric positive definite M and N; batches are welcome."""
    values_M, vectors_M = torch.linalg.eigh(M)
    values_N, vectors_N = torch.linalg.eigh(N)
    inner = vectors_M.mT @ C @ vectors_N / (values_M[..., :, None] + values_N[..., None, :])
    return vectors_M @ inner @ vectors_N.mT


def float32(tensor: Tensor) -> Tensor:
    """The same tensor where it is float32 already."""
    return tensor if tensor.dtype is torch.float32 else tensor.float()


def _has_gradients(pair: FactorPair) -> bool:
    return pair.A_RI.grad is not None and pair.B_OR.grad is not None


def _tensors(pair: FactorPair) -> tuple[Tensor, ...]:
    assert pair.A_RI.grad is not None and pair.B_OR.grad is not None
    return pair.A_RI.data, pair.B_OR.data, pair.A_RI.grad, pair.B_OR.grad


def _product(left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    """``left @ right``; for two matrices by the function with the least overhead."""
    return left @ right if out is None else torch.mm(left, right, out=out)


def _subtract(target: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``target -= left @ right``, without a temporary of the target's size."""
    if target.ndim == 2:
        return target.addmm_(left, right, alpha=-1)
    return target.baddbmm_(left, right, alpha=-1)


def _cholesky(gram_QRR: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors, and which of them can be trusted."""
    L_QRR, failed_Q = torch.linalg.cholesky_ex(gram_QRR)
    pivots_QR = L_QRR.diagonal(dim1=-2, dim2=-1).square()
    largest_Q = gram_QRR.diagonal(dim1=-2, dim2=-1).amax(-1)
    return L_QRR, (failed_Q == 0) & (pivots_QR.amin(-1) > _SMALLEST_PIVOT * largest_Q)


def _damp(gram_ERR: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The matrices with enough damping, and their Cholesky factors."""
    mean_E11 = gram_ERR.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye_RR = torch.eye(gram_ERR.shape[-1]).to(gram_ERR)
    damped_ERR, L_ERR = gram_ERR.clone(), torch.empty_like(gram_ERR)
    is_bad_E = torch.ones(len(gram_ERR), dtype=torch.bool, device=gram_ERR.device)
    for exponent in range(-7, 1):
        damped_ERR[is_bad_E] = (gram_ERR + eye_RR * mean_E11 * 10.0**exponent)[is_bad_E]
        L_ERR, is_good_E = _cholesky(damped_ERR)
        is_bad_E = ~is_good_E
        if not is_bad_E.any():
            return damped_ERR, L_ERR
    name = names[int(is_bad_E.nonzero()[0])]
    raise UserError(f"{name}: its LoRA factors are not finite; lower model.learning_rate")
