"""The preconditioned optimisers against float64 transcriptions of their formulas, and what follows."""

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import small_llama
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_one import preconditioners
from lora_one.errors import UserError
from lora_one.optimizers import LoraPro, ScaledAdamW, ScaledGD, factor_pairs, n_escalated
from lora_one.preconditioners import (
    FactorPair,
    Stacks,
    Workspace,
    damped_grams,
    group_pairs,
    preconditioned,
    solve_sylvester,
)

FORMS = ["classic", "symmetric", "sylvester"]
N_OUT, N_IN, R, SCALING = 14, 11, 4, 2.0


# ---- the formulas, in numpy and float64


def reference(A, B, g_A, g_B, damping, form):
    """Preconditioned gradients of A and B."""
    eye = np.eye(len(A))
    M_A, M_B = A @ A.T + damping * eye, B.T @ B + damping * eye
    P_A, P_B = A.T @ np.linalg.inv(M_A) @ A, B @ np.linalg.inv(M_B) @ B.T
    of_A, of_B = np.linalg.inv(M_B) @ g_A, g_B @ np.linalg.inv(M_A)
    if form == "classic":
        return of_A, of_B
    if form == "symmetric":
        return of_A @ (np.eye(A.shape[1]) - P_A / 2), (np.eye(len(B)) - P_B / 2) @ of_B
    r = len(A)
    system = np.kron(M_B, eye) + np.kron(eye, M_A.T)  # of X, row by row
    X = np.linalg.solve(system, (-np.linalg.inv(M_B) @ g_A @ A.T).reshape(-1)).reshape(r, r)
    return of_A + X @ A, (np.eye(len(B)) - P_B) @ of_B - B @ X


class ReferenceAdam:
    """AdamW's moments and direction."""

    def __init__(self, beta1, beta2, eps):
        self.beta1, self.beta2, self.eps, self.m, self.v, self.t = beta1, beta2, eps, 0.0, 0.0, 0

    def __call__(self, g):
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        root = np.sqrt(self.v / (1 - self.beta2**self.t)) + self.eps
        return self.m / (1 - self.beta1**self.t) / root


# ---- one layer with gradients that somebody else chose


def layer(seed: int = 0, dtype: torch.dtype = torch.float32) -> FactorPair:
    generator = torch.Generator().manual_seed(seed)
    A, B = (
        nn.Parameter(torch.randn(*shape, generator=generator).to(dtype)) for shape in ((R, N_IN), (N_OUT, R))
    )
    return FactorPair("layer", A, B, SCALING)


def gradients(pair: FactorPair, G: torch.Tensor) -> None:
    """Those of a loss whose gradient by the whole weight is G."""
    G = G.to(pair.A_RI.dtype)
    pair.A_RI.grad = SCALING * pair.B_OR.detach().T @ G
    pair.B_OR.grad = SCALING * G @ pair.A_RI.detach().T


def precondition_(
    pairs: list[FactorPair], damping: float, form: str = "classic", one_by_one: bool = True
) -> int:
    """Replaces the gradients by the preconditioned ones; how many matrices needed more damping."""
    n_escalated = 0
    for groups in group_pairs(pairs):
        grams, more = damped_grams(groups, damping)
        n_escalated += more
        with torch.no_grad():
            for chunk in preconditioned(groups, grams, form, Workspace(), one_by_one=one_by_one):
                for pair, grad_A, grad_B in zip(*chunk, strict=True):
                    pair.A_RI.grad = grad_A.to(pair.A_RI.dtype, copy=True)
                    pair.B_OR.grad = grad_B.to(pair.B_OR.dtype, copy=True)
    return n_escalated


def weight_gradients(n: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N_OUT, N_IN, generator=generator) for _ in range(n)]


def float64(*tensors) -> list[np.ndarray]:
    return [tensor.detach().double().numpy() for tensor in tensors]


def assert_close(tensor, expected, rtol=1e-4):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(tensor.detach().double().numpy(), expected, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("one_by_one", [True, False], ids=["pair by pair", "all at once"])
@pytest.mark.parametrize("damping", [1e-6, 0.3])
@pytest.mark.parametrize("form", FORMS)
def test_the_forms_are_their_formulas(form, damping, one_by_one):
    pairs = [layer(seed) for seed in range(3)]
    for number, pair in enumerate(pairs):
        for seed, factor in enumerate(
            (pair.A_RI, pair.B_OR)
        ):  # of no common G: each term is tested by itself
            generator = torch.Generator().manual_seed(10 * number + seed)
            factor.grad = torch.randn(factor.shape, generator=generator)
    expected = [reference(*float64(p.A_RI, p.B_OR, p.A_RI.grad, p.B_OR.grad), damping, form) for p in pairs]
    assert precondition_(pairs, damping, form, one_by_one) == 0
    for pair, (of_A, of_B) in zip(pairs, expected, strict=True):
        assert_close(pair.A_RI.grad, of_A)
        assert_close(pair.B_OR.grad, of_B)


@pytest.mark.parametrize("one_by_one", [True, False], ids=["pair by pair", "all at once"])
def test_layers_of_several_ranks_and_without_gradients(one_by_one):
    wide, narrow, idle = layer(0), layer(1), layer(2)
    narrow = FactorPair(
        "n", nn.Parameter(narrow.A_RI[:2].clone()), nn.Parameter(narrow.B_OR[:, :2].clone()), 1.0
    )
    for pair in (wide, narrow):
        gradients(pair, weight_gradients(1)[0])
    expected = [
        reference(*float64(p.A_RI, p.B_OR, p.A_RI.grad, p.B_OR.grad), 1e-6, "classic") for p in (wide, narrow)
    ]
    precondition_([wide, idle, narrow], 1e-6, one_by_one=one_by_one)
    for pair, (of_A, of_B) in zip((wide, narrow), expected, strict=True):
        assert_close(pair.A_RI.grad, of_A)
        assert_close(pair.B_OR.grad, of_B)
    assert idle.A_RI.grad is None


def test_sylvester_solves_its_equation():
    generator = torch.Generator().manual_seed(0)
    M, N = (
        factor @ factor.mT + 0.1 * torch.eye(5)
        for factor in (torch.randn(3, 5, 7, generator=generator) for _ in range(2))
    )
    C = torch.randn(3, 5, 5, generator=generator)
    X = solve_sylvester(M, N, C)
    assert torch.allclose(M @ X + X @ N, C, atol=1e-4)


# ---- whole optimisers


STEPS = {"lr": 0.01, "weight_decay": 0.1}


@pytest.mark.parametrize("form", FORMS)
def test_scaled_adamw_is_its_transcription(form):
    pair, (A, B) = layer(), float64(*layer()[1:3])
    optimizer = ScaledAdamW([*pair[1:3]], [pair], form=form, betas=(0.7, 0.8), **STEPS)
    adam_A, adam_B = (ReferenceAdam(0.7, 0.8, 1e-8) for _ in range(2))
    for G in weight_gradients(6):
        gradients(pair, G)
        of_A, of_B = reference(
            A, B, SCALING * B.T @ G.double().numpy(), SCALING * G.double().numpy() @ A.T, 1e-6, form
        )
        A = A * (1 - 0.01 * 0.1) - 0.01 * adam_A(of_A)
        B = B * (1 - 0.01 * 0.1) - 0.01 * adam_B(of_B)
        optimizer.step()
    assert_close(pair.A_RI, A)
    assert_close(pair.B_OR, B)
    assert n_escalated(optimizer) == 0


@pytest.mark.parametrize("form", FORMS)
def test_scaled_gd_with_momentum_is_its_transcription(form):
    pair, (A, B) = layer(), float64(*layer()[1:3])
    optimizer = ScaledGD([*pair[1:3]], [pair], form=form, momentum=0.9, **STEPS)
    along_A = along_B = 0.0
    for G in weight_gradients(4):
        gradients(pair, G)
        of_A, of_B = reference(
            A, B, SCALING * B.T @ G.double().numpy(), SCALING * G.double().numpy() @ A.T, 1e-6, form
        )
        along_A, along_B = 0.9 * along_A + of_A, 0.9 * along_B + of_B
        A, B = A * (1 - 0.01 * 0.1) - 0.01 * along_A, B * (1 - 0.01 * 0.1) - 0.01 * along_B
        optimizer.step()
    assert_close(pair.A_RI, A)
    assert_close(pair.B_OR, B)


def lora_pro_reference(A, B, Gs, *, lr, decay, damping):
    adam, s, eye = ReferenceAdam(0.9, 0.999, 1e-8), SCALING, np.eye(R)
    for G in Gs:
        M_A, M_B = np.linalg.inv(A @ A.T + damping * eye), np.linalg.inv(B.T @ B + damping * eye)
        g_A, g_B = s * B.T @ G, s * G @ A.T
        of_A = M_B @ g_A / s**2
        of_B = (np.eye(N_OUT) - B @ M_B @ B.T) @ g_B @ M_A / s**2
        g = adam(s * B @ of_A + s * of_B @ A)
        of_A, of_B = reference(A, B, s * B.T @ g / s**2, s * g @ A.T / s**2, damping, "sylvester")
        A, B = A * (1 - lr * decay) - lr * of_A, B * (1 - lr * decay) - lr * of_B
    return A, B


@pytest.mark.parametrize("start", ["spread", "B = 0"])
def test_lora_pro_is_its_transcription(start):
    pair = layer()
    if start == "B = 0":
        nn.init.zeros_(pair.B_OR)
    A, B = float64(*pair[1:3])
    optimizer = LoraPro([*pair[1:3]], [pair], damping=1e-6, **STEPS)
    Gs = weight_gradients(4)
    for G in Gs:
        gradients(pair, G)
        optimizer.step()
    A, B = lora_pro_reference(A, B, [G.double().numpy() for G in Gs], lr=0.01, decay=0.1, damping=1e-6)
    assert_close(pair.A_RI, A, 1e-3)
    assert_close(pair.B_OR, B, 1e-3)


@pytest.mark.parametrize("made", [ScaledGD, ScaledAdamW, LoraPro])
def test_what_is_no_factor_takes_plain_steps(made):
    pair, extra = layer(), nn.Parameter(torch.ones(5))
    plain = nn.Parameter(torch.ones(5))
    base = torch.optim.SGD if made is ScaledGD else torch.optim.AdamW
    ours = made([*pair[1:3], extra], [pair], lr=0.1)
    theirs = base([plain], lr=0.1, weight_decay=0.0, fused=True)
    for G in weight_gradients(3):
        gradients(pair, G)
        extra.grad, plain.grad = (torch.linspace(-1, 1, 5) * G[0, 0] for _ in range(2))
        ours.step()
        theirs.step()
    assert torch.equal(extra, plain)


# ---- what follows from the formulas


def moved(pair: FactorPair, Q: torch.Tensor) -> FactorPair:
    """The same product from other factors: ``B → B Q``, ``A → Q⁻¹ A``."""
    return FactorPair(
        "moved", nn.Parameter(torch.linalg.inv(Q) @ pair[1]), nn.Parameter(pair[2] @ Q), SCALING
    )


def weight_step(pair: FactorPair, damping: float, form: str = "classic") -> torch.Tensor:
    """First-order change of ``B A`` by a preconditioned gradient step at one G."""
    gradients(pair, weight_gradients(1)[0])
    precondition_([pair], damping, form)
    return (pair.B_OR @ pair.A_RI.grad + pair.B_OR.grad @ pair.A_RI).detach()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


def mixing(condition: float) -> torch.Tensor:
    """An invertible r x r matrix."""
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(R, R, generator=generator))[0] for _ in range(2))
    return left * torch.logspace(0, float(np.log10(condition)), R) @ right


def rotation() -> torch.Tensor:
    return torch.linalg.qr(mixing(1.0))[0]


@pytest.mark.parametrize("form", FORMS[:2])
def test_scaled_gd_does_not_see_which_factors_make_the_product(form):
    """For any invertible Q without damping, for a rotation with any; and no more than that."""
    whole = weight_step(layer(), 1e-12, form)
    assert difference(whole, weight_step(moved(layer(), mixing(8.0)), 1e-12, form)) < 1e-3
    damped = weight_step(layer(), 5.0, form)
    assert difference(damped, weight_step(moved(layer(), rotation()), 5.0, form)) < 1e-4
    assert difference(damped, weight_step(moved(layer(), mixing(8.0)), 5.0, form)) > 0.05


@pytest.mark.parametrize("form", FORMS[:2])
def test_nor_does_a_whole_step_without_damping(form):
    products = []
    for pair in (layer(), moved(layer(), mixing(8.0))):
        gradients(pair, weight_gradients(1)[0])
        ScaledGD([*pair[1:3]], [pair], lr=0.3, damping=1e-12, form=form).step()
        products.append((pair.B_OR @ pair.A_RI).detach())
    assert difference(*products) < 1e-3


def test_scaled_adamw_does():
    """Adam's division goes entry by entry."""
    steps = []
    for pair in (layer(), moved(layer(), rotation())):
        before = (pair.B_OR @ pair.A_RI).detach()
        optimizer = ScaledAdamW([*pair[1:3]], [pair], lr=1e-3, weight_decay=0.0)
        gradients(pair, weight_gradients(1)[0])
        optimizer.step()
        steps.append((pair.B_OR @ pair.A_RI).detach() - before)
    assert difference(*steps) > 0.05


@pytest.mark.parametrize("form", ["symmetric", "sylvester"])
def test_undamped_the_product_moves_along_the_tangent_space(form):
    """``G P_A + P_B G - P_B G P_A``, the projection of G on the tangent space of the rank-r matrices."""
    pair, G = layer(), weight_gradients(1)[0]
    P_A = torch.linalg.pinv(pair.A_RI.detach()) @ pair.A_RI.detach()
    P_B = pair.B_OR.detach() @ torch.linalg.pinv(pair.B_OR.detach())
    expected = SCALING * (G @ P_A + P_B @ G - P_B @ G @ P_A)
    assert difference(expected, weight_step(pair, 1e-12, form)) < 1e-4
    assert difference(expected, weight_step(layer(), 1e-12, "classic")) > 0.05


@pytest.mark.parametrize("form", FORMS)
def test_the_damped_forms_at_b_zero(form):
    """B takes ``g_B (A Aᵀ + δI)⁻¹``, A nothing: its gradient is zero there."""
    pair, G = layer(), weight_gradients(1)[0]
    nn.init.zeros_(pair.B_OR)
    gradients(pair, G)
    A = pair.A_RI.detach().double()
    expected = SCALING * G.double() @ A.T @ torch.linalg.inv(A @ A.T + 1e-6 * torch.eye(R))
    precondition_([pair], 1e-6, form)
    assert_close(pair.B_OR.grad, expected.numpy())
    assert float(pair.A_RI.grad.abs().max()) == 0


def factorisation_loss(make, steps: int = 300) -> float:
    """Relative error of ``B A ≈ M``, M of condition 1000, from factors that are as ill-conditioned."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, R, generator=generator))[0] for n in (30, 20))
    values = torch.logspace(0, -3, R)
    M = (left * values) @ right.T
    noise = [torch.randn(n, R, generator=generator) * values.sqrt() * 0.05 for n in (30, 20)]
    B, A = nn.Parameter(left * values.sqrt() + noise[0]), nn.Parameter((right * values.sqrt() + noise[1]).T)
    optimizer = make(FactorPair("p", A, B, 1.0))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = 0.5 * (B @ A - M).square().sum()
        loss.backward()
        if not torch.isfinite(loss):
            return float("inf")
        optimizer.step()
    # The error that the smallest singular value would leave is 1e-3.
    return float((B @ A - M).detach().norm())


def test_it_converges_on_an_ill_conditioned_factorisation_where_the_others_stall():
    rates = [10.0**exponent for exponent in np.arange(-4, 1.01, 0.5)]
    ours = factorisation_loss(lambda pair: ScaledGD([*pair[1:3]], [pair], lr=0.4, damping=1e-12))
    gd = min(factorisation_loss(lambda pair, lr=lr: torch.optim.SGD([*pair[1:3]], lr=lr)) for lr in rates)
    adam = min(
        factorisation_loss(lambda pair, lr=lr: torch.optim.AdamW([*pair[1:3]], lr=lr, weight_decay=0))
        for lr in rates
    )
    assert ours < 1e-6
    assert min(gd, adam) > 1000 * ours


# ---- numbers that go wrong, and precision


def test_a_matrix_that_is_nearly_singular_is_damped_more_and_counted():
    pair = layer()
    with torch.no_grad():
        pair.A_RI[1] = pair.A_RI[0]
        pair.A_RI.mul_(1e3)
    gradients(pair, weight_gradients(1)[0])
    optimizer = ScaledGD([*pair[1:3]], [pair], lr=1.0, damping=1e-9)
    before = pair.B_OR.detach().clone()
    optimizer.step()
    assert n_escalated(optimizer) == 1
    assert torch.isfinite(pair.B_OR).all()
    assert not torch.equal(pair.B_OR, before)
    again = ScaledGD([*pair[1:3]], [pair], lr=1.0)
    again.load_state_dict(optimizer.state_dict())
    assert n_escalated(again) == 1
    assert n_escalated(torch.optim.AdamW([*pair[1:3]])) is None


def test_damping_grows_tenfold_from_1e_7_of_each_diagonal_entry():
    pair = layer_with_gradients()
    with torch.no_grad():
        pair.A_RI.copy_(pair.A_RI[:1] * torch.tensor([[100.0], [1.0], [0.1], [10.0]]))
    exact = (pair.A_RI @ pair.A_RI.T).detach()
    ((group,),) = group_pairs([pair])
    found, n_more = damped_grams([group], 1e-9)
    added = (found.of_A_PRR[0] - exact).diagonal() / exact.diagonal()
    assert n_more == 1
    assert any(torch.allclose(added, torch.full((R,), 10.0**k), rtol=0.3) for k in range(-7, -3))


def test_rows_of_very_different_size_are_no_reason_for_damping():
    pair = layer_with_gradients()
    with torch.no_grad():
        pair.A_RI.copy_(torch.eye(R, N_IN) * torch.tensor([[1.0], [1.0], [1.0], [1e-4]]))
    ((group,),) = group_pairs([pair])
    found, n_more = damped_grams([group], 1e-12)
    assert n_more == 0
    assert torch.allclose(found.inverse_A_PRR[0].diagonal(), torch.tensor([1.0, 1.0, 1.0, 1e8]), rtol=1e-3)


def test_factors_that_are_not_finite_are_named():
    pair = layer()
    with torch.no_grad():
        pair.B_OR[0, 0] = float("nan")
    gradients(pair, weight_gradients(1)[0])
    with pytest.raises(UserError, match="layer: its LoRA factors are not finite"):
        precondition_([layer_with_gradients(), pair], 1e-6)


def layer_with_gradients() -> FactorPair:
    pair = layer(3)
    gradients(pair, weight_gradients(1)[0])
    return pair


@pytest.mark.parametrize("form", FORMS)
def test_low_precision_factors_are_computed_with_in_float32(form):
    pair = layer(dtype=torch.bfloat16)
    gradients(pair, weight_gradients(1)[0])
    expected = reference(*float64(*pair[1:3], pair.A_RI.grad, pair.B_OR.grad), 1e-6, form)
    precondition_([pair], 1e-6, form)
    for factor, gradient in zip(pair[1:3], expected, strict=True):
        assert factor.grad.dtype is torch.bfloat16
        assert_close(factor.grad, gradient, 2**-8)


# ---- PEFT models


def adapted(**settings):
    torch.manual_seed(0)
    return get_peft_model(small_llama(), LoraConfig(r=4, target_modules="all-linear", **settings))


def test_factors_are_paired_by_their_layer():
    model = adapted(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 16}, use_dora=True)
    pairs = factor_pairs(model)
    assert len(pairs) == 14
    for pair in pairs:
        layer = model.get_submodule(pair.name)
        assert pair.A_RI is layer.lora_A["default"].weight
        assert pair.B_OR is layer.lora_B["default"].weight
        assert pair.scaling == layer.scaling["default"]
        assert len(pair.A_RI) == (2 if "q_proj" in pair.name else 4)


def test_models_without_pairs_are_refused():
    with pytest.raises(UserError, match="no LoRA factors are trained"):
        factor_pairs(small_llama())
    model = adapted()
    model.base_model.model.model.layers[1].self_attn.k_proj.lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(UserError, match="k_proj: only one of its LoRA factors is trained"):
        factor_pairs(model)


def test_square_factors_are_not_mixed_up():
    """An r x r layer: A and B have one shape."""
    generator = torch.Generator().manual_seed(0)
    A, B = (nn.Parameter(torch.randn(R, R, generator=generator)) for _ in range(2))
    A.grad, B.grad = (torch.randn(R, R, generator=generator) for _ in range(2))
    expected = reference(*float64(A, B, A.grad, B.grad), 1e-6, "symmetric")
    precondition_([FactorPair("square", A, B, 1.0)], 1e-6, "symmetric")
    assert_close(A.grad, expected[0], 1e-3)
    assert_close(B.grad, expected[1], 1e-3)


@pytest.mark.parametrize("numbers", [1, 100, 2**20])
def test_many_layers_in_chunks_of_any_size(numbers, monkeypatch):
    """Buffers are used again from chunk to chunk."""
    monkeypatch.setattr(preconditioners, "_CHUNK", numbers)
    pairs = [layer(seed) for seed in range(5)]
    alone = [layer(seed) for seed in range(5)]
    together = ScaledAdamW([p for pair in pairs for p in pair[1:3]], pairs, lr=0.01)
    apart = [ScaledAdamW([*pair[1:3]], [pair], lr=0.01) for pair in alone]
    for step in range(3):
        for number in range(5):
            for pair in (pairs[number], alone[number]):
                gradients(pair, weight_gradients(1, seed=10 * step + number)[0])
        together.step()
        for optimizer in apart:
            optimizer.step()
    for pair, other in zip(pairs, alone, strict=True):
        assert torch.equal(pair.A_RI, other.A_RI)
        assert torch.equal(pair.B_OR, other.B_OR)


def test_factors_side_by_side_are_separate_tensors_that_may_be_moved():
    pairs = [layer(seed) for seed in range(3)]
    factors, values = [pair.A_RI for pair in pairs], [layer(seed).A_RI.detach() for seed in range(3)]
    stacks = Stacks(pairs)
    assert stacks.of(factors).data_ptr() == factors[0].data_ptr()
    assert len({factor.untyped_storage().data_ptr() for factor in factors}) == 3
    assert all(factor.untyped_storage().nbytes() == factor.nbytes for factor in factors)
    factors[1].data = 2 * factors[1].data
    assert torch.equal(stacks.of(factors), torch.stack([values[0], 2 * values[1], values[2]]))
    assert torch.equal(stacks.of(factors[2:]), values[2][None])


@pytest.mark.parametrize("made", [ScaledGD, ScaledAdamW])
def test_all_at_once_is_pair_by_pair(made, monkeypatch):
    """The way of a GPU, taken on the CPU."""
    found = []
    for one_by_one in (True, False):
        pairs = [layer(seed) for seed in range(4)]
        optimizer = made([p for pair in pairs for p in pair[1:3]], pairs, lr=0.01, form="symmetric")
        monkeypatch.setattr(optimizer, "_one_by_one", lambda device, answer=one_by_one: answer)
        for step in range(3):
            for number, pair in enumerate(pairs):
                gradients(pair, weight_gradients(1, seed=10 * step + number)[0])
            optimizer.step()
        found.append([factor.detach() for pair in pairs for factor in pair[1:3]])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_what_no_optimiser_of_pairs_can_do_is_named():
    pair = layer_with_gradients()
    with pytest.raises(UserError, match="layer: a LoRA factor of its pair is not among the parameters"):
        ScaledGD([pair.B_OR], [pair], lr=0.1)
    optimizer = ScaledAdamW([*pair[1:3]], [pair], lr=0.1)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(optimizer)
    pair.A_RI.grad = None
    with pytest.raises(UserError, match="layer: only one of its LoRA factors has a gradient"):
        optimizer.step()
    half = layer(dtype=torch.float16)
    gradients(half, weight_gradients(1)[0])
    with pytest.raises(UserError, match="layer: preconditioned gradients overflow in fp16"):
        ScaledGD([*half[1:3]], [half], lr=0.1).step()


def test_an_optimiser_of_factors_that_are_trained_no_more_says_so():
    model = adapted()
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear"))
    optimizer = ScaledAdamW(model.parameters(), factor_pairs(model), lr=0.1)
    model.set_adapter("other")
    ids = torch.arange(3, 23)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(UserError, match="make it after loading and set_adapter"):
        optimizer.step()


def test_shared_factors_and_factors_that_are_no_matrix_are_refused():
    model = adapted()
    layers = model.base_model.model.model.layers
    layers[1].mlp.up_proj.lora_A = layers[0].mlp.up_proj.lora_A
    with pytest.raises(UserError, match=r"1.mlp.up_proj: shares a LoRA factor with .*layers.0.mlp.up_proj"):
        factor_pairs(model)
    convolution = get_peft_model(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), LoraConfig(r=2, target_modules=["0"])
    )
    with pytest.raises(UserError, match="0: its LoRA factors are no pair of matrices"):
        factor_pairs(convolution)


def test_accelerate_saves_and_loads_all_factors(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = adapted()
    optimizer = ScaledAdamW(model.parameters(), factor_pairs(model), lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.arange(3, 23)[None]

    def step() -> dict[str, torch.Tensor]:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}

    step()
    accelerator.save_state(str(tmp_path))
    after = step()
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(value, after[name]) for name, value in step().items())


def test_lora_pros_moments_keep_float32():
    pair = layer(dtype=torch.bfloat16)
    optimizer = LoraPro([*pair[1:3]], [pair], lr=0.01)
    gradients(pair, weight_gradients(1)[0])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    again = LoraPro([*pair[1:3]], [pair], lr=0.01)
    again.load_state_dict(saved)
    for name, value in optimizer.state[pair.B_OR].items():
        assert again.state[pair.B_OR][name].dtype is torch.float32
        assert torch.equal(again.state[pair.B_OR][name], value)


@pytest.mark.parametrize("made", [ScaledGD, ScaledAdamW, LoraPro])
def test_a_saved_state_goes_on_with_the_same_bits(made):
    def steps(pair, optimizer, Gs):
        for G in Gs:
            gradients(pair, G)
            optimizer.step()

    settings = {"lr": 0.01} | ({"momentum": 0.9} if made is ScaledGD else {})
    Gs, whole, first = weight_gradients(6), layer(), layer()
    steps(whole, made([*whole[1:3]], [whole], **settings), Gs)
    optimizer = made([*first[1:3]], [first], **settings)
    steps(first, optimizer, Gs[:3])
    state = copy.deepcopy(optimizer.state_dict())
    second = FactorPair("second", *(nn.Parameter(part.detach().clone()) for part in first[1:3]), SCALING)
    resumed = made([*second[1:3]], [second], **settings)
    resumed.load_state_dict(state)
    steps(second, resumed, Gs[3:])
    assert torch.equal(second.A_RI, whole.A_RI)
    assert torch.equal(second.B_OR, whole.B_OR)
