"""Student-teacher problems small enough for theory, started and stepped by the library's own functions.

A teacher ``y = φ(x (W + Δ)ᵀ)`` with Δ of low rank, φ the identity or ReLU; a student ``φ(x (W + s B A)ᵀ)``
that knows W and learns the factors from samples by full-batch steps on ``½ mean ‖student(x) - y‖²``. That is
the setting of the analysis of LoRA-One (arXiv 2502.01235). Several problems that differ in their seed are
trained side by side, each as one layer of a model. ``notebooks/Toy_Experiments.ipynb`` is made with this.

Shape suffixes beside the package's: ``P`` problems, ``N`` samples, ``T`` measured steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lora_one.errors import UserError
from lora_one.inits import AdapterInit, init_factors, simple_factors, triplets_needed
from lora_one.preconditioners import FactorPair

Activation = Literal["linear", "relu"]
MakeOptimizer = Callable[["Students"], torch.optim.Optimizer]

# A loss of so many times the pretrained weights' is on its way to infinity.
_DIVERGED = 1e3


@dataclass(frozen=True)
class Problems:
    """Samples of some teachers, and the truth; float64.

    Attributes:
        X_PNI: Inputs.
        Y_PNO: What the teachers answer.
        W_POI: The pretrained weights, which the students know.
        delta_POI: Δ, which they do not.
        activation: φ.
    """

    X_PNI: Tensor
    Y_PNO: Tensor
    W_POI: Tensor
    delta_POI: Tensor
    activation: Activation

    def loss_P(self, update_POI: Tensor) -> Tensor:
        """``½ mean ‖φ(x (W + update)ᵀ) - y‖²`` of each problem; the mean is over samples."""
        answers_PNO = _apply(self.activation, self.X_PNI @ (self.W_POI + update_POI).mT)
        return 0.5 * (answers_PNO - self.Y_PNO).square().sum(-1).mean(-1)

    def full_gradient(self) -> Tensor:
        """The gradients of the losses by the whole weights at the pretrained ones (P, out, in)."""
        update_POI = torch.zeros_like(self.W_POI, requires_grad=True)
        (G_POI,) = torch.autograd.grad(self.loss_P(update_POI).sum(), update_POI)
        return G_POI

    def error_P(self, update_POI: Tensor) -> Tensor:
        """``‖update - Δ‖ / ‖Δ‖`` in Frobenius norm."""
        return torch.linalg.matrix_norm(update_POI - self.delta_POI) / torch.linalg.matrix_norm(
            self.delta_POI
        )


def make_problems(
    seeds: Sequence[int],
    *,
    d_out: int = 32,
    d_in: int = 48,
    rank: int = 4,
    condition: float = 2.0,
    n: int = 1000,
    noise: float = 0.0,
    activation: Activation = "linear",
    tail: float = 0.0,
    whitened: bool = False,
) -> Problems:
    """Problems with standard normal inputs, one for each seed.

    Args:
        seeds: Of inputs, weights and noise.
        d_out: Output features.
        d_in: Input features.
        rank: Of Δ, but for its tail.
        condition: κ of Δ: its singular values fall geometrically from 1 to 1/κ.
        n: Samples.
        noise: Standard deviation of normal noise on each output.
        activation: φ.
        tail: The next singular value of Δ relative to 1/κ; the rest falls by a fifth each. With 0, Δ has
            exactly the rank.
        whitened: Whether the inputs' second moment is exactly the identity, as of infinitely many samples.

    Raises:
        UserError: If the rank does not fit, or there are fewer samples than input features.
    """
    if not 0 < rank <= min(d_out, d_in):
        raise UserError(f"rank={rank}: Δ is {d_out} x {d_in}; give a rank from 1 to {min(d_out, d_in)}")
    if n < d_in:
        raise UserError(f"n={n}: fewer samples than the {d_in} input features leave Δ undetermined; raise n")
    sigma_K = _spectrum(min(d_out, d_in), rank, condition, tail)
    drawn = [_draw(seed, d_out, d_in, n, sigma_K, whitened) for seed in seeds]
    X_PNI, W_POI, delta_POI, noise_PNO = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    Y_PNO = _apply(activation, X_PNI @ (W_POI + delta_POI).mT) + noise * noise_PNO
    if activation == "linear":
        X_PNI, Y_PNO = _condensed(X_PNI, Y_PNO)
    return Problems(X_PNI, Y_PNO, W_POI, delta_POI, activation)


class Students(nn.Module):
    """The adapted layers of all problems, and how far they have moved the weights.

    Args:
        starts: One for each problem. The base of those with ``shifts_base`` is shifted.
        scaling: The adapters' s.
    """

    def __init__(self, starts: Sequence[AdapterInit], scaling: float = 1.0) -> None:
        super().__init__()
        self.scaling = scaling
        self.A = nn.ParameterList(start.A_RI.double().clone() for start in starts)
        self.B = nn.ParameterList(start.B_OR.double().clone() for start in starts)
        shifts = [self.product_POI()[i].detach() * start.shifts_base for i, start in enumerate(starts)]
        self.shift_POI = torch.stack(shifts)
        names = [f"problem {number}" for number in range(len(starts))]
        self.pairs = [
            FactorPair(name, A, B, scaling) for name, A, B in zip(names, self.A, self.B, strict=True)
        ]

    def product_POI(self) -> Tensor:
        """``s B A``."""
        return self.scaling * torch.stack([B @ A for A, B in zip(self.A, self.B, strict=True)])

    def update_POI(self) -> Tensor:
        """How far the weights are from the pretrained ones: ``s B A``, less its start on a shifted base."""
        return self.product_POI() - self.shift_POI

    def factors(self) -> tuple[Tensor, Tensor]:
        """All A (P, r, in) and all B (P, out, r), without gradients."""
        return torch.stack([A.detach() for A in self.A]), torch.stack([B.detach() for B in self.B])


def gradient_starts(
    problems: Problems,
    rank: int,
    *,
    direction: str = "LoRA-One",
    scale: str = "unit",
    normalize: str = "none",
    gamma: float = 1.0,
    scaling: float = 1.0,
) -> list[AdapterInit]:
    """Starts from the singular vectors of the full gradients, by ``inits.init_factors``.

    The defaults are LoRA-One without its γ and σ₁: ``B A`` is a step of rate 1 along its best rank r.

    Args:
        problems: Where the gradients are taken.
        rank: r.
        direction: As of ``init_factors``, but ``random``; so are scale, normalize and gamma.
        scale: See there.
        normalize: See there.
        gamma: See there.
        scaling: s.
    """
    U_POK, S_PK, Vh_PKI = torch.linalg.svd(problems.full_gradient(), full_matrices=False)
    K = triplets_needed(direction, rank)
    return [
        init_factors(
            U_OK[:, :K],
            S_K[:K],
            Vh_KI[:K].T,
            rank=rank,
            direction=direction,
            scale=scale,
            normalize=normalize,
            gamma=gamma,
            scaling=scaling,
        )
        for U_OK, S_K, Vh_KI in zip(U_POK, S_PK, Vh_PKI, strict=True)
    ]


def plain_starts(
    problems: Problems, rank: int, *, seeds: Sequence[int], shrink: float = 1.0
) -> list[AdapterInit]:
    """Plain LoRA's: A Kaiming-uniform, B zero, by ``inits.simple_factors``.

    Args:
        problems: For their shapes.
        rank: r.
        seeds: Of A, one for each problem.
        shrink: Multiplies A: theory asks for a small one.
    """
    d_out, d_in = problems.W_POI.shape[1:]
    starts = []
    for seed in seeds:
        plain = simple_factors(
            (d_out, d_in),
            rank=rank,
            kind_A="kaiming",
            kind_B="zeros",
            std_A=0.0,
            std_B=0.0,
            generator=torch.Generator().manual_seed(seed),
        )
        starts.append(AdapterInit(shrink * plain.A_RI, plain.B_OR, shifts_base=False))
    return starts


@dataclass(frozen=True)
class History:
    """What was measured on the way; infinite, or no number for angles, after a divergence.

    Attributes:
        steps_T: Number of steps before each measurement, from 0.
        error_TP: ``‖update - Δ‖ / ‖Δ‖``.
        angle_B_TP: Sine of the largest principal angle between B's leading left singular vectors and the full
            gradient's; no number where B has too small a rank.
        angle_A_TP: The same of A's right singular vectors.
    """

    steps_T: Tensor
    error_TP: Tensor
    angle_B_TP: Tensor
    angle_A_TP: Tensor

    def steps_to(self, target: float) -> Tensor:
        """The first measured step with an error of at most ``target`` (P,); infinite where there is none."""
        is_there_TP = self.error_TP <= target
        first_P = is_there_TP.int().argmax(0)
        return torch.where(is_there_TP.any(0), self.steps_T[first_P].double(), torch.inf)


def train(
    problems: Problems,
    starts: Sequence[AdapterInit],
    make_optimizer: MakeOptimizer,
    n_steps: int,
    *,
    scaling: float = 1.0,
    leading: int | None = None,
    every: int = 1,
    decay: Callable[[float], float] | None = None,
) -> History:
    """Full-batch steps on the factors of all problems.

    Args:
        problems: What is learned.
        starts: From ``gradient_starts`` or ``plain_starts``.
        make_optimizer: Of the students' parameters and pairs.
        n_steps: How many.
        scaling: s.
        leading: Singular directions of the gradient that angles are measured to; r by default.
        every: Steps between measurements.
        decay: The learning rate's multiplier at a share of the way, from 0 to 1.

    Raises:
        UserError: If more directions are to be measured than the factors have.
    """
    rank = starts[0].A_RI.shape[0]
    K = leading or rank
    if rank < K:
        raise UserError(f"leading={K}: factors of rank {rank} have no more directions; give at most {rank}")
    students = Students(starts, scaling)
    optimizer = make_optimizer(students)
    U_POK, _, Vh_PKI = torch.linalg.svd(problems.full_gradient(), full_matrices=False)
    measured: list[list[Tensor]] = []
    pretrained_P = problems.loss_P(torch.zeros_like(problems.W_POI))
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(n_steps + 1):
        update_POI = students.update_POI()
        loss_P = problems.loss_P(update_POI)
        if not bool((loss_P < _DIVERGED * pretrained_P).all()):
            break
        if step % every == 0:
            A_PRI, B_POR = students.factors()
            angles = subspace_sine(B_POR, U_POK[..., :K]), subspace_sine(A_PRI.mT, Vh_PKI[:, :K].mT)
            measured.append([problems.error_P(update_POI.detach()), *angles])
        if decay is not None:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * decay(step / n_steps)
        optimizer.zero_grad()
        loss_P.sum().backward()
        optimizer.step()
    return _history(measured, torch.arange(0, n_steps + 1, every), len(starts))


def subspace_sine(M_POR: Tensor, Q_POK: Tensor) -> Tensor:
    """Sine of the largest principal angle between M's K leading left singular vectors and the columns of Q.

    Args:
        M_POR: Matrices.
        Q_POK: Orthonormal columns, K ≤ R.

    Returns:
        One for each matrix; no number where M's rank is below K.
    """
    K = Q_POK.shape[-1]
    U_POR, S_PR, _ = torch.linalg.svd(M_POR, full_matrices=False)
    outside_POK = U_POR[..., :K] - Q_POK @ (Q_POK.mT @ U_POR[..., :K])
    sine_P = torch.linalg.matrix_norm(outside_POK, ord=2)
    is_full_P = S_PR[:, K - 1] > 1e-12 * S_PR[:, 0]
    return torch.where(is_full_P, sine_P, torch.nan)


def _apply(activation: Activation, Z: Tensor) -> Tensor:
    return Z.relu() if activation == "relu" else Z


def _spectrum(d: int, rank: int, condition: float, tail: float) -> Tensor:
    """The singular values of Δ."""
    head = torch.logspace(0, 1, rank, base=1 / condition, dtype=torch.float64)
    rest = tail / condition * 0.8 ** torch.arange(d - rank, dtype=torch.float64)
    return torch.cat([head, rest])


def _draw(seed: int, d_out: int, d_in: int, n: int, sigma_K: Tensor, whitened: bool) -> tuple[Tensor, ...]:
    """Inputs, pretrained weight, Δ and noise of one problem."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W_OI, K = normal(d_out, d_in) / d_in**0.5, len(sigma_K)
    U_OK, V_IK = (torch.linalg.qr(normal(d, K))[0] for d in (d_out, d_in))
    X_NI = normal(n, d_in)
    if whitened:
        X_NI = torch.linalg.qr(X_NI)[0] * n**0.5
    return X_NI, W_OI, (U_OK * sigma_K) @ V_IK.T, normal(n, d_out)


def _condensed(X_PNI: Tensor, Y_PNO: Tensor) -> tuple[Tensor, Tensor]:
    """As many samples as input features, with the same gradients of a linear student's loss: less work."""
    n, d_in = X_PNI.shape[-2:]
    Q_PNI, R_PII = torch.linalg.qr(X_PNI)
    root = (d_in / n) ** 0.5  # the mean is over fewer samples now
    return R_PII * root, Q_PNI.mT @ Y_PNO * root


def _history(measured: list[list[Tensor]], steps_T: Tensor, n_problems: int) -> History:
    missing = len(steps_T) - len(measured)
    nothing = [
        torch.full((n_problems,), value, dtype=torch.float64) for value in (torch.inf, *2 * [torch.nan])
    ]
    error_TP, angle_B_TP, angle_A_TP = (
        torch.stack(column) for column in zip(*(measured + [nothing] * missing), strict=True)
    )
    return History(steps_T, error_TP, angle_B_TP, angle_A_TP)
