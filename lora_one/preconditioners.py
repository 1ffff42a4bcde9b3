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

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_one.errors import UserError

Form = Literal["classic", "symmetric", "sylvester"]
# δ of the authors of Riemannian LoRA, and of LoRA-Pro.
PAPER_DAMPING, LORA_PRO_DAMPING = 1e-6, 1e-8

# Below this share of its diagonal entry, a pivot is mostly float32's rounding.
_SMALLEST_PIVOT = 1e-6
# Numbers in a chunk: 1 MiB of preconditioned gradients, or one pair, stay in the cache until they are used.
_CHUNK = 2**18


class FactorPair(NamedTuple):
    """The trained factors of one layer."""

    name: str
    A_RI: nn.Parameter
    B_OR: nn.Parameter
    scaling: float


def group_pairs(
    pairs: Sequence[FactorPair], kind: Callable[[FactorPair], Hashable] = lambda pair: None
) -> list[list[list[FactorPair]]]:
    """The pairs that have gradients, by rank and device (one batch of r x r systems), within that by shape.

    Args:
        pairs: All of them.
        kind: What pairs of one shape have in common too.

    Raises:
        UserError: If only one of two factors has a gradient, or factors are fp16.
    """
    batches: dict[Any, dict[Any, list[FactorPair]]] = {}
    for pair in pairs:
        A_RI, B_OR = pair.A_RI, pair.B_OR
        if (A_RI.grad is None) != (B_OR.grad is None):
            raise UserError(
                f"{pair.name}: only one of its LoRA factors has a gradient; preconditioners need both"
            )
        if torch.float16 in (A_RI.dtype, B_OR.dtype):
            raise UserError(
                f"{pair.name}: preconditioned gradients overflow in fp16; use fp32 or bf16 factors"
            )
        if A_RI.grad is not None:
            groups = batches.setdefault((len(A_RI), A_RI.device), {})
            alike = A_RI.shape, B_OR.shape, A_RI.dtype, B_OR.dtype, kind(pair)
            groups.setdefault(alike, []).append(pair)
    return [list(groups.values()) for groups in batches.values()]


class Stacks:
    """Factors of one shape, on a CPU side by side in memory, so that one call multiplies all of them.

    To what saves, moves or copies a model they are separate tensors: each has a storage of its own, a slice
    of that memory. Those that lie elsewhere, since then or on a GPU, are copied together for each use.
    """

    def __init__(self, pairs: Sequence[FactorPair]) -> None:
        alike: dict[Any, list[nn.Parameter]] = {}
        for pair in pairs:
            A_RI, B_OR = pair.A_RI, pair.B_OR
            kind = A_RI.shape, B_OR.shape, A_RI.dtype, B_OR.dtype, A_RI.device, B_OR.device
            alike.setdefault((1, *kind), []).append(A_RI)
            alike.setdefault((2, *kind), []).append(B_OR)
        self._stacks = {
            id(factors[0]): _moved_together(factors)
            for factors in alike.values()
            if factors[0].device.type == "cpu"
        }

    def of(self, factors: Sequence[nn.Parameter]) -> Tensor:
        """The factors with a leading dimension, not to be written to."""
        stack = self._stacks.get(id(factors[0]))
        if stack is not None and len(stack) == len(factors):
            rows = zip(factors, stack.unbind(), strict=True)
            if all(factor.data_ptr() == row.data_ptr() for factor, row in rows):
                return stack
            del self._stacks[id(factors[0])]
        return torch.stack([factor.data for factor in factors])


def _moved_together(factors: Sequence[nn.Parameter]) -> Tensor:
    stack = torch.stack([factor.data for factor in factors])
    size = stack[0].nbytes
    for number, factor in enumerate(factors):
        own = stack.untyped_storage()[number * size : (number + 1) * size]
        factor.data = stack.new_empty(0).set_(own, 0, factor.shape, stack[0].stride())
    return stack


class Grams(NamedTuple):
    """``A Aᵀ + δI`` and ``Bᵀ B + δI`` of P pairs of one rank, and their inverses; float32."""

    of_A_PRR: Tensor
    of_B_PRR: Tensor
    inverse_A_PRR: Tensor
    inverse_B_PRR: Tensor

    def at(self, rows: int | slice) -> "Grams":
        """Those of one pair, without the leading dimension, or of some."""
        return Grams(*(part[rows] for part in self))


def damped_grams(
    groups: Sequence[Sequence[FactorPair]], damping: float, stacks: Stacks | None = None
) -> tuple[Grams, int]:
    """The matrices of all pairs of some groups of one rank, in their order.

    Where float32 calls one singular (scaled to a diagonal of ones, a pivot is below 1e-6), each diagonal
    entry grows by 1e-7 of itself, then tenfold each time.

    Returns:
        The matrices, and how many of the 2P needed more damping than δ.

    Raises:
        UserError: If a factor is not finite, naming its layer.
    """
    stacks = stacks or Stacks([])
    stacks_A = [float32(stacks.of([pair.A_RI for pair in group])) for group in groups]
    stacks_B = [float32(stacks.of([pair.B_OR for pair in group])) for group in groups]
    gram_QRR = torch.cat([A @ A.mT for A in stacks_A] + [B.mT @ B for B in stacks_B])
    gram_QRR.diagonal(dim1=-2, dim2=-1).add_(damping)
    root_QR = gram_QRR.diagonal(dim1=-2, dim2=-1).sqrt()
    scale_QRR = root_QR[:, :, None] * root_QR[:, None, :]
    scaled_QRR = gram_QRR / scale_QRR
    L_QRR, is_good_Q = _cholesky(scaled_QRR)
    bad_E = (~is_good_Q).nonzero().flatten()
    if len(bad_E):
        names = [pair.name for group in groups for pair in group] * 2
        of_bad = [names[index] for index in bad_E.tolist()]
        scaled_QRR[bad_E], L_QRR[bad_E] = _damp(scaled_QRR[bad_E], of_bad)
        gram_QRR = scaled_QRR * scale_QRR
    eye_RR = torch.eye(L_QRR.shape[-1]).to(L_QRR)
    roots_QRR = torch.linalg.solve_triangular(L_QRR, eye_RR, upper=False)
    inverse_QRR = roots_QRR.mT @ roots_QRR / scale_QRR  # in less than half the time of cholesky_inverse
    return Grams(*gram_QRR.chunk(2), *inverse_QRR.chunk(2)), len(bad_E)


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

    def of_each(self) -> list["Mixing"]:
        """Those of each pair, without the leading dimension."""
        columns: list[Any] = [itertools.repeat(None) if part is None else part.unbind() for part in self]
        return [Mixing(*own) for own in zip(*columns, strict=False)]


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
    """What is computed in one go: one pair, or all of a group with a leading dimension; float32."""

    pairs: Sequence[FactorPair]
    A: Tensor
    B: Tensor
    grad_A: Tensor
    grad_B: Tensor


def parts_of(group: Sequence[FactorPair], *, one_by_one: bool) -> list[Part]:
    """The pairs of a group one by one, or all of them as one part."""
    if one_by_one:
        return [Part([pair], *map(float32, _tensors(pair))) for pair in group]
    return [Part(group, *(float32(torch.stack(side)) for side in zip(*map(_tensors, group), strict=True)))]


class Workspace:
    """Memory for results on a CPU, where fresh memory costs more than the products that fill it."""

    def __init__(self) -> None:
        self._buffers: dict[Any, list[tuple[Tensor, Tensor]]] = {}

    def like(self, part: Part, n: int) -> list[tuple[Tensor, Tensor]]:
        """Buffers for the preconditioned gradients of n such parts."""
        key = part.grad_A.shape, part.grad_B.shape, n
        if key not in self._buffers:
            self._buffers[key] = [
                (torch.empty_like(part.grad_A), torch.empty_like(part.grad_B)) for _ in range(n)
            ]
        return self._buffers[key]


class Chunk(NamedTuple):
    """Some pairs of one group, and the preconditioned gradients of their factors, float32."""

    pairs: Sequence[FactorPair]
    grads_A: Sequence[Tensor]
    grads_B: Sequence[Tensor]


def preconditioned(
    groups: Sequence[Sequence[FactorPair]],
    grams: Grams,
    form: Form,
    workspace: Workspace,
    *,
    one_by_one: bool,
) -> Iterator[Chunk]:
    """The preconditioned gradients, a few pairs at a time.

    Each chunk has to be used before the next is asked for: on a CPU its memory is used again.

    Args:
        groups: Of one rank.
        grams: Theirs.
        form: One of the three.
        workspace: Kept from step to step.
        one_by_one: Pair by pair, for the sake of a CPU's cache, and not all of a shape at once.
    """
    first = 0
    for group in groups:
        own_grams, first = grams.at(slice(first, first + len(group))), first + len(group)
        parts = parts_of(group, one_by_one=one_by_one)
        products = _products_with_gradients(parts, own_grams) if form != "classic" else ()
        mixed = mixing(own_grams, form, *products)
        if one_by_one:
            yield from _by_chunks(parts, mixed.of_each(), workspace)
        else:
            ((_, A, B, grad_A, grad_B),) = parts
            yield Chunk(group, mixed.of_A(A, grad_A).unbind(), mixed.of_B(B, grad_B).unbind())


def _by_chunks(parts: Sequence[Part], mixed: Sequence[Mixing], workspace: Workspace) -> Iterator[Chunk]:
    """The pairs of one group, each a part."""
    n = max(1, min(len(parts), _CHUNK // (parts[0].grad_A.numel() + parts[0].grad_B.numel())))
    buffers = workspace.like(parts[0], n)
    for first in range(0, len(parts), n):
        pairs: list[FactorPair] = []
        outs = buffers[: len(parts) - first]
        for part, own, (out_A, out_B) in zip(
            parts[first : first + n], mixed[first : first + n], outs, strict=True
        ):
            own.of_A(part.A, part.grad_A, out_A)
            own.of_B(part.B, part.grad_B, out_B)
            pairs += part.pairs
        yield Chunk(pairs, *zip(*outs, strict=True))


def solve_sylvester(M: Tensor, N: Tensor, C: Tensor) -> Tensor:
    """X with ``M X + X N = C`` for symmetric positive definite M and N; batches are welcome."""
    values_M, vectors_M = torch.linalg.eigh(M)
    values_N, vectors_N = torch.linalg.eigh(N)
    inner = vectors_M.mT @ C @ vectors_N / (values_M[..., :, None] + values_N[..., None, :])
    return vectors_M @ inner @ vectors_N.mT


def float32(tensor: Tensor) -> Tensor:
    """The same tensor where it is float32 already."""
    return tensor if tensor.dtype is torch.float32 else tensor.float()


def _tensors(pair: FactorPair) -> tuple[Tensor, ...]:
    assert pair.A_RI.grad is not None and pair.B_OR.grad is not None
    return pair.A_RI, pair.B_OR, pair.A_RI.grad, pair.B_OR.grad


def _products_with_gradients(parts: Sequence[Part], grams: Grams) -> tuple[Tensor, Tensor]:
    """``g_A Aᵀ`` and ``Bᵀ g_B`` of each pair."""
    gA_At = [part.grad_A @ part.A.mT for part in parts]
    Bt_gB = [part.B.mT @ part.grad_B for part in parts]
    shape = grams.of_A_PRR.shape
    return torch.stack(gA_At).view(shape), torch.stack(Bt_gB).view(shape)


def _product(left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    """``left @ right``; for two matrices by the function with the least overhead."""
    return left @ right if out is None else torch.mm(left, right, out=out)


def _subtract(target: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``target -= left @ right``, without a temporary of the target's size."""
    if target.ndim == 2:
        return target.addmm_(left, right, alpha=-1)
    return target.baddbmm_(left, right, alpha=-1)


def _cholesky(scaled_QRR: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors of matrices with a diagonal of about one, and which of them can be trusted."""
    L_QRR, failed_Q = torch.linalg.cholesky_ex(scaled_QRR)
    pivots_QR = L_QRR.diagonal(dim1=-2, dim2=-1).square()
    return L_QRR, (failed_Q == 0) & (pivots_QR.amin(-1) > _SMALLEST_PIVOT)


def _damp(scaled_ERR: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The matrices with enough damping, and their Cholesky factors."""
    eye_RR = torch.eye(scaled_ERR.shape[-1]).to(scaled_ERR)
    damped_ERR, is_bad_E = scaled_ERR.clone(), torch.ones_like(scaled_ERR[:, 0, 0], dtype=torch.bool)
    for exponent in range(-7, 1):
        damped_ERR[is_bad_E] = (scaled_ERR + eye_RR * 10.0**exponent)[is_bad_E]
        L_ERR, is_good_E = _cholesky(damped_ERR)
        is_bad_E = ~is_good_E
        if not is_bad_E.any():
            return damped_ERR, L_ERR
    name = names[int(is_bad_E.nonzero()[0])]
    raise UserError(f"{name}: its LoRA factors are not finite; lower model.learning_rate")
