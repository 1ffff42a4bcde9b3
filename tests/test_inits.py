"""The starts are the published formulas (``reference.py``), and do what the papers prove of them."""

import itertools
from functools import lru_cache

import numpy as np
import pytest
import reference
import torch
from conftest import small_llama
from peft import LoraConfig, get_peft_model

from lora_one import objectives
from lora_one.adapters import apply_init, lora_layers
from lora_one.errors import UserError
from lora_one.inits import (
    AdapterInit,
    clip_to_weight,
    init_factors,
    simple_factors,
    triplets_needed,
    weight_factors,
)
from lora_one.objectives import adam_objective, decompose_for, minimise_adam_objective
from lora_one.starts import GradientStart, gradient_starts, reduce_gradient, weight_starts
from lora_one.triplets import decompose, leading_svd

RANK, GAMMA, SCALING = 4, 25.0, 8.0
SETTINGS = {"rank": RANK, "gamma": GAMMA, "scaling": SCALING}
SHAPES = [(40, 24), (24, 40), (32, 32)]
GA_DIRECTIONS = ["ArB2r", "A2rBr", "ArBr", "random"]
SCALES = ["stable", "gd", "unit", "weightS"]
WEIGHT_SCALES = ["default", "stable", "unit", "normalized"]
SIMPLE_KINDS = ["zeros", "gaussian", "kaiming", "fan_out_kaiming", "xavier", "unit", "orthogonal"]

over_shapes = pytest.mark.parametrize("shape", SHAPES)
over_scales = pytest.mark.parametrize("scale", SCALES)
over_ga_directions = pytest.mark.parametrize("direction", GA_DIRECTIONS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For matrices this small, two threads on busy cores mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@lru_cache
def orthonormal(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, columns)))[0]


def known_svd(shape, seed: int = 0):
    """Singular triplets of a full-rank matrix with a spectrum that decays, as those of gradients do."""
    rank = min(shape)
    U_OK, V_IK = orthonormal(shape[0], rank, 2 * seed), orthonormal(shape[1], rank, 2 * seed + 1)
    U_OK, V_IK = reference.with_sign_convention(U_OK, V_IK)
    return U_OK, np.arange(1, rank + 1) ** -0.7, V_IK


def gradient(shape=(24, 40), seed: int = 0) -> np.ndarray:
    U_OK, S_K, V_IK = known_svd(shape, seed)
    return 1e-3 * (U_OK * S_K) @ V_IK.T


def gaussian(shape=(24, 40), seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def heavy_tailed(shape=(24, 40), seed: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(0.8, shape)


def weight(shape=(24, 40)) -> np.ndarray:
    return gaussian(shape, seed=100)


def float32(M_OI: np.ndarray) -> torch.Tensor:
    return torch.tensor(M_OI, dtype=torch.float32)


def float64(init) -> tuple[np.ndarray, np.ndarray]:
    """The factors ``A_RI, B_OR`` as the reference takes them."""
    return init.A_RI.double().numpy(), init.B_OR.double().numpy()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ours(G_OI, direction: str, **settings) -> AdapterInit:
    """The program's start, float32 from the decomposition on."""
    triplets = decompose("layer", float32(G_OI), triplets_needed(direction, RANK))
    weight_sigma_K = leading_svd(float32(weight(G_OI.shape)), RANK)[1]
    settings = SETTINGS | {"scale": "stable", "weight_sigma_K": weight_sigma_K} | settings
    return init_factors(triplets.U_OK, triplets.S_K, triplets.V_IK, direction=direction, **settings)


def ours_float64(G_OI, direction: str, scale: str, seed: int = 0):
    """``A_RI, B_OR`` by the program's formulas from the reference's decomposition."""
    triplets = (torch.tensor(part) for part in reference.svd(G_OI))
    weight_sigma_K = torch.tensor(reference.svd(weight(G_OI.shape))[1])
    settings = SETTINGS | {"weight_sigma_K": weight_sigma_K, "generator": seeded(seed)}
    return float64(init_factors(*triplets, direction=direction, scale=scale, **settings))


def published(G_OI, direction: str, scale: str, **settings):
    settings = {"r": RANK, "gamma": GAMMA, "s": SCALING, "W_OI": weight(G_OI.shape)} | settings
    return reference.gradient_factors(G_OI, direction=direction, scale=scale, **settings)


def index_sets(G_OI, init: AdapterInit) -> tuple[list[int], list[int]]:
    """Which singular vectors B and A consist of."""
    U_OK, _, V_IK = reference.svd(G_OI)
    A_RI, B_OR = float64(init)
    return np.abs(U_OK.T @ B_OR).argmax(axis=0).tolist(), np.abs(V_IK.T @ A_RI.T).argmax(axis=0).tolist()


def assert_close(actual: torch.Tensor, expected: np.ndarray) -> None:
    assert tuple(actual.shape) == expected.shape
    atol = 3e-5 * np.abs(expected).max()
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=1e-4, atol=atol)


def assert_factors(init: AdapterInit, expected: tuple[np.ndarray, np.ndarray]) -> None:
    assert_close(init.A_RI, expected[0])
    assert_close(init.B_OR, expected[1])


@over_shapes
@over_scales
@pytest.mark.parametrize(
    ("direction", "settings"),
    [
        ("LoRA-One", {"normalize": "spectral"}),
        ("LoRA-One", {"normalize": "none"}),
        ("ArB2r", {}),
        ("A2rBr", {}),
        ("ArBr", {}),
    ],
)
def test_factors_are_the_published_ones(direction, settings, scale, shape):
    G_OI = gradient(shape)
    init = ours(G_OI, direction, scale=scale, **settings)
    assert_factors(init, published(G_OI, direction, scale, **settings))
    assert init.shifts_base == (direction != "LoRA-One")


@over_shapes
@over_scales
def test_random_factors_are_the_published_ones_on_disjoint_halves(scale, shape):
    G_OI = gradient(shape)
    init = ours(G_OI, "random", scale=scale, generator=seeded(3))
    of_B, of_A = index_sets(G_OI, init)
    assert sorted(of_B + of_A) == list(range(2 * RANK))
    assert_factors(init, published(G_OI, "random", scale, index_sets=(of_B, of_A)))
    assert init.shifts_base


def test_random_halves_are_disjoint_and_follow_the_seed():
    G_OI = gradient()
    halves, again = (
        [index_sets(G_OI, ours(G_OI, "random", generator=seeded(seed))) for seed in range(20)]
        for _ in range(2)
    )
    assert all(sorted(of_B + of_A) == list(range(2 * RANK)) for of_B, of_A in halves)
    assert halves == again
    assert len({str(pair) for pair in halves}) > 15


@pytest.mark.parametrize(
    ("spelling", "meaning"),
    [
        (("LoRA-GA", "stable"), ("ArB2r", "stable")),
        (("LoRA-GA", "gd_scale"), ("ArB2r", "gd")),
        (("LoRA-GA", "weight_svd"), ("ArB2r", "weightS")),
        (("LoRA-One", "gd_scale"), ("LoRA-One", "gd")),
        (("LoRA-One", "weight_svd"), ("LoRA-One", "weightS")),
    ],
)
def test_published_spellings_mean_the_same(spelling, meaning):
    first, second = (ours(gradient(), direction, scale=scale) for direction, scale in (spelling, meaning))
    assert torch.equal(first.A_RI, second.A_RI)
    assert torch.equal(first.B_OR, second.B_OR)


@over_shapes
@pytest.mark.parametrize("scale", WEIGHT_SCALES)
def test_weight_factors_are_the_published_ones(scale, shape):
    W_OI = weight(shape)
    init = weight_factors(*map(float32, reference.svd(W_OI)), scale=scale, **SETTINGS)
    assert_factors(init, reference.weight_factors(W_OI, scale=scale, r=RANK, gamma=GAMMA, s=SCALING))
    assert init.shifts_base


def weight_start(W_OI, scale: str, norm_clip: bool = False) -> AdapterInit:
    return weight_starts(
        ("layer",),
        scale=scale,
        gamma=GAMMA,
        norm_clip=norm_clip,
        ranks={"layer": RANK},
        scalings={"layer": SCALING},
        read_weight=lambda name: float32(W_OI),
    )["layer"]


@pytest.mark.parametrize("scale", WEIGHT_SCALES)
@pytest.mark.parametrize("norm_clip", [False, True])
def test_weight_starts_are_the_published_ones_up_to_signs_of_pairs(norm_clip, scale):
    W_OI = 0.1 * weight()
    init = weight_start(W_OI, scale, norm_clip)
    A_RI, B_OR = reference.weight_factors(W_OI, scale=scale, r=RANK, gamma=GAMMA, s=SCALING)
    if norm_clip:
        A_RI, B_OR = reference.norm_clip(A_RI, B_OR, W_OI, SCALING)
    assert_close(init.B_OR @ init.A_RI, B_OR @ A_RI)
    assert_close(init.A_RI.norm(dim=1), np.linalg.norm(A_RI, axis=1))
    assert_close(init.B_OR.norm(dim=0), np.linalg.norm(B_OR, axis=0))


def test_the_default_weight_start_is_the_best_rank_r_part_of_the_weight():
    init = weight_start(weight(), "default")
    assert_close(SCALING * init.B_OR @ init.A_RI, reference.best_approximation(weight(), RANK))


@pytest.mark.parametrize("shape", [*SHAPES, (1500, 1100)])
def test_decomposition_matches_float64(shape):
    U_OK, S_K, V_IK = known_svd(shape, seed=1)
    triplets = decompose("layer", float32((U_OK * S_K) @ V_IK.T), 8)
    np.testing.assert_allclose(triplets.S_K.numpy(), S_K[:8], rtol=1e-4)
    np.testing.assert_allclose(triplets.U_OK.numpy(), U_OK[:, :8], atol=1e-3)
    np.testing.assert_allclose(triplets.V_IK.numpy(), V_IK[:, :8], atol=1e-3)
    assert triplets.norm == pytest.approx(np.linalg.norm(S_K), rel=1e-4)


@over_shapes
def test_the_largest_entry_of_each_left_vector_is_positive(shape):
    for seed in range(10):
        U_OK = decompose("layer", float32(gaussian(shape, seed)), 8).U_OK
        assert (U_OK.gather(0, U_OK.abs().argmax(dim=0)[None]) > 0).all()


@pytest.mark.parametrize("shape", [(24, 40), (1100, 1030)])
def test_decomposition_is_deterministic_and_leaves_the_random_state_alone(shape):
    G_OI, state = torch.randn(shape, generator=seeded()), torch.get_rng_state()
    first = decompose("layer", G_OI, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second = decompose("layer", G_OI, 4)
    assert torch.equal(first.U_OK, second.U_OK)
    assert torch.equal(first.V_IK, second.V_IK)


@pytest.mark.parametrize("objective", ["gradient", "sign", "adam"])
@pytest.mark.parametrize(("entry", "words"), [(0, "zero"), (np.nan, "not finite"), (np.inf, "not finite")])
def test_useless_gradients_are_named(entry, words, objective):
    G_OI = torch.zeros(12, 10)
    G_OI[3, 4] = entry
    start = GradientStart("ArB2r", "gd", GAMMA, objective=objective)
    with pytest.raises(UserError, match=f"^model.layers.7.q_proj: its gradient is {words}"):
        reduce_gradient("model.layers.7.q_proj", G_OI, start, RANK, seeded())


@over_shapes
@pytest.mark.parametrize("gamma", [16.0, 128.0])
def test_lora_one_starts_after_one_explicit_rank_r_gradient_step(gamma, shape):
    G_OI, W_OI = gradient(shape), weight(shape)
    init = ours(G_OI, "LoRA-One", gamma=gamma)
    rate = SCALING / (gamma * reference.svd(G_OI)[1][0])
    expected_OI = W_OI - rate * reference.best_approximation(G_OI, RANK)
    assert_close(SCALING * init.B_OR @ init.A_RI, expected_OI - W_OI)
    assert_close(float32(W_OI) + SCALING * init.B_OR @ init.A_RI, expected_OI)


@over_shapes
def test_lora_one_without_normalisation_has_the_learning_rate_of_the_readme(shape):
    G_OI, alpha = gradient(shape), 16
    scaling = alpha / np.sqrt(RANK)
    init = ours(G_OI, "LoRA-One", normalize="none", scaling=scaling)
    rate = alpha / (GAMMA * np.sqrt(RANK))
    assert_close(scaling * init.B_OR @ init.A_RI, -rate * reference.best_approximation(G_OI, RANK))


@pytest.mark.parametrize("normalize", ["spectral", "none"])
def test_lora_one_factors_are_balanced(normalize):
    init = ours(gradient(), "LoRA-One", normalize=normalize)
    assert_close(init.A_RI @ init.A_RI.T, (init.B_OR.T @ init.B_OR).double().numpy())


@pytest.mark.parametrize(("normalize", "growth"), [("spectral", 1), ("none", 10)])
def test_lora_one_follows_the_size_of_the_gradient_only_without_normalisation(normalize, growth):
    small, large = (ours(size * gradient(), "LoRA-One", normalize=normalize) for size in (1, 100))
    assert_factors(large, tuple(growth * factor for factor in float64(small)))


# Su's theorem on LoRA-GA: what one step of SGD on both factors does to s B A.


def first_order(A0_RI, B0_OR, dA_RI, dB_OR, eta: float):
    """The part linear in η of the change of ``s B A`` by a step: its odd part, as the change is quadratic."""

    def product(eta):
        return SCALING * (B0_OR - eta * dB_OR) @ (A0_RI - eta * dA_RI)

    return (product(eta) - product(-eta)) / 2


def sgd_step(G_OI, A0_RI, B0_OR, eta: float = 0.1):
    return first_order(A0_RI, B0_OR, SCALING * B0_OR.T @ G_OI, SCALING * G_OI @ A0_RI.T, eta)


def step_error(G_OI, A_RI, B_OR) -> float:
    """Distance of the step from that of full fine-tuning, for a learning rate of 1."""
    return np.linalg.norm(sgd_step(G_OI, A_RI, B_OR, eta=1.0) + G_OI)


def step_cosine(G_OI, A_RI, B_OR) -> float:
    step_OI = sgd_step(G_OI, A_RI, B_OR)
    return np.sum(step_OI * -G_OI) / (np.linalg.norm(step_OI) * np.linalg.norm(G_OI))


def at_best_common_factor(G_OI, A_RI, B_OR):
    """The factors times the number that makes the step's error least; the step is quadratic in it."""
    step_OI = -sgd_step(G_OI, A_RI, B_OR, eta=1.0)
    factor = np.sqrt(max(0.0, np.sum(step_OI * G_OI) / np.sum(step_OI**2)))
    return A_RI * factor, B_OR * factor


def rank_2r_error(G_OI) -> float:
    return np.linalg.norm(reference.best_approximation(G_OI, 2 * RANK) - G_OI)


def rank_2r_cosine(G_OI) -> float:
    return np.linalg.norm(reference.best_approximation(G_OI, 2 * RANK)) / np.linalg.norm(G_OI)


def rivals(A_RI, B_OR):
    """Gaussian factors, orthonormal factors, and disturbances of the given ones from tiny to large."""
    rng = np.random.default_rng(5)
    for size in np.geomspace(1e-3, 10, 100):
        noise_A, noise_B = rng.standard_normal(A_RI.shape), rng.standard_normal(B_OR.shape)
        yield noise_A, noise_B
        yield np.linalg.qr(noise_A.T)[0].T, np.linalg.qr(noise_B)[0]
        yield A_RI + size * np.abs(A_RI).max() * noise_A, B_OR + size * np.abs(B_OR).max() * noise_B


def assert_loses(G_OI, A_RI, B_OR, margin: float) -> None:
    """The step is further from the full one than rank 2r allows, in angle and at any common size."""
    assert step_cosine(G_OI, A_RI, B_OR) < (1 - margin) * rank_2r_cosine(G_OI)
    assert step_error(G_OI, A_RI, B_OR) > (1 + margin) * rank_2r_error(G_OI)
    assert step_error(G_OI, *at_best_common_factor(G_OI, A_RI, B_OR)) > (1 + margin) * rank_2r_error(G_OI)


@over_shapes
@over_scales
@over_ga_directions
def test_first_step_is_the_best_rank_2r_step_times_a_number(direction, scale, shape):
    G_OI, W_OI, eta = gaussian(shape), weight(shape), 0.03
    settings = {"d_out": shape[0], "r": RANK, "gamma": GAMMA, "s": SCALING, "W_OI": W_OI}
    c = reference.gradient_scale(scale, direction=direction, **settings)
    step_OI = sgd_step(G_OI, *ours_float64(G_OI, direction, scale), eta)
    expected_OI = -eta * (SCALING * c) ** 2 * reference.best_approximation(G_OI, 2 * RANK)
    np.testing.assert_allclose(step_OI, expected_OI, atol=1e-12 * np.abs(expected_OI).max(), rtol=1e-9)


@over_ga_directions
def test_first_step_is_what_a_small_sgd_step_of_torch_does(direction):
    G_OI, eta = gaussian(), 1e-6
    factors = ours_float64(G_OI, direction, "gd")
    A_RI, B_OR = (torch.tensor(factor, requires_grad=True) for factor in factors)
    (torch.tensor(G_OI) * (SCALING * B_OR @ A_RI)).sum().backward()
    torch.optim.SGD([A_RI, B_OR], lr=eta).step()
    step_OI = SCALING * (B_OR @ A_RI).detach().numpy() - SCALING * factors[1] @ factors[0]
    expected_OI = -eta * reference.best_approximation(G_OI, 2 * RANK)
    assert np.linalg.norm(step_OI - expected_OI) < 1e-4 * np.linalg.norm(expected_OI)


@over_scales
def test_first_step_is_tied_between_the_four_directions(scale):
    G_OI = gaussian()
    cases = [*((direction, 0) for direction in GA_DIRECTIONS), *(("random", seed) for seed in range(1, 10))]
    first_OI, *others = (sgd_step(G_OI, *ours_float64(G_OI, name, scale, seed)) for name, seed in cases)
    for step_OI in others:
        np.testing.assert_allclose(step_OI, first_OI, atol=1e-12 * np.abs(first_OI).max(), rtol=1e-9)


@over_shapes
@over_ga_directions
def test_at_gd_no_other_factors_come_closer_to_the_full_step(direction, shape):
    G_OI = gaussian(shape)
    factors = ours_float64(G_OI, direction, "gd")
    least = step_error(G_OI, *factors)
    assert least == pytest.approx(rank_2r_error(G_OI), rel=1e-12)
    for rival in rivals(*factors):
        assert step_error(G_OI, *rival) > least
        assert step_error(G_OI, *at_best_common_factor(G_OI, *rival)) > least


@pytest.mark.parametrize("scale", ["stable", "unit", "weightS"])
@over_ga_directions
def test_at_another_common_scale_only_the_cosine_is_best(direction, scale):
    G_OI = gaussian()
    factors = ours_float64(G_OI, direction, scale)
    best = step_cosine(G_OI, *factors)
    assert best == pytest.approx(rank_2r_cosine(G_OI), rel=1e-12)
    assert all(step_cosine(G_OI, *rival) < best for rival in rivals(*factors))
    assert step_error(G_OI, *factors) > 1.1 * rank_2r_error(G_OI)


@over_scales
@pytest.mark.parametrize("chosen", [range(4), range(4, 8), range(0, 8, 2), range(1, 8, 2)])
def test_equal_indices_for_both_factors_lose(chosen, scale):
    G_OI = gaussian()
    assert_loses(G_OI, *published(G_OI, "random", scale, index_sets=(chosen, chosen)), margin=0.1)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 1.1, 2.0, 10.0])
@over_ga_directions
def test_different_scales_on_the_factors_lose(direction, ratio):
    G_OI = gaussian()
    A_RI, B_OR = ours_float64(G_OI, direction, "gd")
    assert_loses(G_OI, A_RI * ratio, B_OR / ratio, margin=1e-3)
    assert_loses(G_OI, A_RI * ratio, B_OR, margin=1e-4)


# Scale stability, LoRA-GA §3.3, with s = α/√r unless said otherwise.

ALPHA = 16.0
WIDTHS = (64, 128, 256, 512, 1024, 2048)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
CASES = [case for case in itertools.product(WIDTHS, WIDTHS, RANKS) if 2 * case[2] <= min(case[:2])]


def wide_start(d_out: int, d_in: int, rank: int, direction: str, scale: str, scaling: float) -> AdapterInit:
    """A start from random singular vectors; the singular values play no part in it."""
    U_OK, V_IK = (
        orthonormal(n, min(256, n), n + side)[:, : 2 * rank] for side, n in enumerate((d_out, d_in))
    )
    triplets = (torch.tensor(part) for part in (U_OK, np.ones(2 * rank), V_IK))
    settings = {"rank": rank, "gamma": GAMMA, "scaling": scaling, "generator": seeded()}
    return init_factors(*triplets, direction=direction, scale=scale, **settings)


def variances(direction: str, scale: str, d_out: int, d_in: int, rank: int, rslora: bool = True):
    """Of the entries of ``s B A x`` and of ``s Aᵀ Bᵀ v`` for standard normal x, v, by ``‖s B A‖²``."""
    scaling = ALPHA / (np.sqrt(rank) if rslora else rank)
    init = wide_start(d_out, d_in, rank, direction, scale, scaling)
    energy = scaling**2 * float(((init.B_OR.T @ init.B_OR) * (init.A_RI @ init.A_RI.T)).sum())
    return energy / d_out, energy / d_in


@over_ga_directions
def test_stable_is_flat_forward_and_follows_the_shape_backward(direction):
    for d_out, d_in, rank in CASES:
        forward, backward = variances(direction, "stable", d_out, d_in, rank)
        assert forward == pytest.approx(ALPHA**2 / GAMMA**2, rel=1e-9)
        assert backward == pytest.approx(ALPHA**2 / GAMMA**2 * d_out / d_in, rel=1e-9)


def test_unit_is_flat_over_rank_and_falls_as_the_output_grows():
    for d_out, d_in, rank in CASES:
        assert variances("ArB2r", "unit", d_out, d_in, rank)[0] == pytest.approx(ALPHA**2 / d_out, rel=1e-9)


def test_stable_without_rslora_falls_with_the_rank():
    for rank in RANKS:
        forward, _ = variances("ArB2r", "stable", 2048, 2048, rank, rslora=False)
        assert forward == pytest.approx(ALPHA**2 / GAMMA**2 / rank, rel=1e-9)


def test_sampled_variances_are_those_of_the_norm():
    d_out, d_in, rank = 64, 128, 8
    scaling = ALPHA / np.sqrt(rank)
    init = wide_start(d_out, d_in, rank, "ArB2r", "stable", scaling)
    x_NI = torch.randn(20_000, d_in, generator=seeded(1), dtype=torch.float64)
    v_NO = torch.randn(20_000, d_out, generator=seeded(2), dtype=torch.float64)
    forward, backward = variances("ArB2r", "stable", d_out, d_in, rank)
    assert float((scaling * x_NI @ init.A_RI.T @ init.B_OR.T).var()) == pytest.approx(forward, rel=0.02)
    assert float((scaling * v_NO @ init.B_OR @ init.A_RI).var()) == pytest.approx(backward, rel=0.02)


# The objectives for Adam's first step.


def test_sign_decomposes_the_sign():
    G_OI = heavy_tailed()
    triplets = decompose_for("sign", "layer", float32(G_OI), 8)
    for ours_K, expected_K in zip(
        (triplets.U_OK, triplets.S_K, triplets.V_IK), reference.svd(np.sign(G_OI)), strict=True
    ):
        np.testing.assert_allclose(ours_K.numpy(), expected_K[..., :8], rtol=1e-4, atol=1e-4)


def test_gradient_decomposes_the_gradient():
    G_OI = float32(heavy_tailed())
    same = decompose_for("gradient", "layer", G_OI, 8), decompose("layer", G_OI, 8)
    assert torch.equal(same[0].U_OK, same[1].U_OK)


@pytest.mark.parametrize("draw", [gaussian, heavy_tailed])
def test_adam_objective_is_the_published_one(draw):
    parts = draw(), gaussian((RANK, 40)), gaussian((24, RANK))
    relative = adam_objective(*map(torch.tensor, parts))
    expected = reference.adam_objective(*parts) / np.sum(np.sign(parts[0]) ** 2)
    assert float(relative) == pytest.approx(expected, rel=1e-12)


def closed_form(M_OI, direction: str, seed: int):
    """Unit factors from the matrix to decompose; ``random`` takes the program's halves for that seed."""
    sets = index_sets(M_OI, ours(M_OI, direction, scale="unit", generator=seeded(seed)))
    return published(M_OI, direction, "unit", index_sets=sets)


@pytest.mark.parametrize(("draw", "sign_is_better"), [(gaussian, True), (heavy_tailed, False)])
@over_ga_directions
def test_optimised_adam_factors_end_no_higher_than_either_closed_form(direction, draw, sign_is_better):
    G_OI = draw().astype(np.float32).astype(np.float64)
    total = np.sum(np.sign(G_OI) ** 2)
    faith, sign = (
        reference.adam_objective_at_best_scale(G_OI, *closed_form(M_OI, direction, seed=9)) / total
        for M_OI in (G_OI, np.sign(G_OI))
    )
    found = minimise_adam_objective(
        "layer", float32(G_OI), rank=RANK, direction=direction, generator=seeded(9)
    )
    after = reference.adam_objective(G_OI, *float64(found)) / total
    assert (sign < faith) == sign_is_better
    assert found.before == pytest.approx(min(faith, sign), rel=1e-3)
    assert found.after == pytest.approx(after, rel=1e-3)
    assert after < min(faith, sign)


@over_ga_directions
def test_an_optimiser_gone_astray_falls_back_on_the_better_closed_form(direction, monkeypatch):
    monkeypatch.setattr(objectives, "_LEARNING_RATE", 1e8)
    G_OI = gaussian()
    found = minimise_adam_objective(
        "layer", float32(G_OI), rank=RANK, direction=direction, generator=seeded()
    )
    after = reference.adam_objective(G_OI, *float64(found)) / G_OI.size
    assert after == pytest.approx(found.before, rel=1e-3)
    assert found.after == found.before


@over_shapes
def test_first_adam_step_of_the_product_is_that_of_the_objective(shape):
    G_OI, eta = gaussian(shape).astype(np.float32).astype(np.float64), 0.01
    start = GradientStart("ArB2r", "gd", GAMMA, objective="adam")
    found = reduce_gradient("layer", float32(G_OI), start, RANK, seeded())
    init = started({"layer": found}, start)["layer"]
    A_RI, B_OR = float64(init)
    dA_RI, dB_OR = np.sign(SCALING * B_OR.T @ G_OI), np.sign(SCALING * G_OI @ A_RI.T)
    step_OI = first_order(A_RI, B_OR, dA_RI, dB_OR, eta)
    np.testing.assert_allclose(step_OI, -eta * reference.adam_step(G_OI, *float64(found)), atol=1e-7)
    missed = np.sum((step_OI / eta + np.sign(G_OI)) ** 2) / np.sum(np.sign(G_OI) ** 2)
    assert missed == pytest.approx(found.after, rel=1e-3)
    assert init.shifts_base


@pytest.mark.parametrize(
    ("direction", "scale", "words"),
    [
        ("LoRA-One", "gd", "direction LoRA-GA"),
        ("ArB2r", "stable", "use it with scale gd"),
        ("ArB2r", "unit", "use it with scale gd"),
        ("random", "weight_svd", "use it with scale gd"),
    ],
)
def test_what_does_not_go_with_adam_is_named(direction, scale, words):
    setting, reason = GradientStart(direction, scale, GAMMA, objective="adam").conflict()
    assert setting == "objective"
    assert words in reason


@pytest.mark.parametrize(
    ("direction", "scale", "objective"),
    [
        ("LoRA-GA", "gd", "adam"),
        ("random", "gd_scale", "adam"),
        ("LoRA-One", "stable", "sign"),
        ("ArB2r", "stable", "gradient"),
    ],
)
def test_what_goes_together_has_no_conflict(direction, scale, objective):
    assert GradientStart(direction, scale, GAMMA, objective=objective).conflict() is None


# From estimates to the starts of all layers.


def started(estimates, start: GradientStart, weights=None) -> dict[str, AdapterInit]:
    """The starts at one rank and scaling; a weight that is not given cannot be read."""
    return gradient_starts(
        estimates,
        start,
        ranks=dict.fromkeys(estimates, RANK),
        scalings=dict.fromkeys(estimates, SCALING),
        read_weight=lambda name: float32((weights or {})[name]),
    )


def started_layer(G_OI, start: GradientStart, W_OI=None) -> AdapterInit:
    estimate = reduce_gradient("layer", float32(G_OI), start, RANK, seeded())
    return started({"layer": estimate}, start, None if W_OI is None else {"layer": W_OI})["layer"]


@pytest.mark.parametrize("scale", ["stable", "gd", "unit"])
@pytest.mark.parametrize("direction", ["LoRA-One", "ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize(("objective", "decomposed"), [("gradient", np.array), ("sign", np.sign)])
def test_starts_are_the_published_factors_and_read_no_weight(objective, decomposed, direction, scale):
    start = GradientStart(direction, scale, GAMMA, objective=objective)
    init = started_layer(gradient(), start)
    assert_factors(init, published(decomposed(gradient()), direction, scale))
    assert init.shifts_base == start.shifts_base == (direction != "LoRA-One")


def test_normalisation_reaches_the_start():
    init = started_layer(gradient(), GradientStart("LoRA-One", "stable", GAMMA, normalize="none"))
    assert_factors(init, published(gradient(), "LoRA-One", "stable", normalize="none"))


@pytest.mark.parametrize("scale", ["weightS", "weight_svd"])
def test_weight_scale_reads_the_weight_of_each_layer(scale):
    weights = {"first": weight(), "second": 3 * weight()}
    estimates = dict.fromkeys(weights, decompose("layer", float32(gradient()), 2 * RANK))
    inits = started(estimates, GradientStart("ArB2r", scale, GAMMA), weights)
    for name, W_OI in weights.items():
        assert_factors(inits[name], published(gradient(), "ArB2r", "weightS", W_OI=W_OI))


def test_random_halves_of_a_start_follow_its_seed_and_differ_between_layers():
    estimates = dict.fromkeys("abcd", decompose("layer", float32(gradient()), 2 * RANK))

    def halves(seed: int):
        inits = started(estimates, GradientStart("random", "unit", GAMMA, seed=seed))
        return [index_sets(gradient(), init) for init in inits.values()]

    assert halves(1) == halves(1)
    assert halves(1) != halves(2)
    assert len({str(pair) for pair in halves(1)}) > 1


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1e2])
@pytest.mark.parametrize("direction", ["LoRA-One", "ArB2r"])
def test_norm_clip_keeps_the_product_within_the_weight(direction, size):
    W_OI, unclipped = size * weight(), published(gradient(), direction, "unit")
    init = started_layer(gradient(), GradientStart(direction, "unit", GAMMA, norm_clip=True), W_OI)
    assert_factors(init, reference.norm_clip(*unclipped, W_OI, SCALING))
    assert float((SCALING * init.B_OR @ init.A_RI).abs().max()) <= np.abs(W_OI).max() * (1 + 1e-5)
    assert init.shifts_base == (direction != "LoRA-One")


@pytest.mark.parametrize("size_B", [0.0, 1e-3])
def test_norm_clip_leaves_a_small_product_alone(size_B):
    init = AdapterInit(torch.ones(RANK, 40), size_B * torch.ones(24, RANK), shifts_base=True)
    clipped = clip_to_weight(init, float32(weight()), SCALING)
    assert torch.equal(clipped.A_RI, init.A_RI)
    assert torch.equal(clipped.B_OR, init.B_OR)


# Starts that know of nothing.


def simple(kind_A: str, kind_B: str, seed: int = 0, shape_OI=(600, 900), rank: int = 64) -> AdapterInit:
    settings = {"rank": rank, "std_A": 0.3, "std_B": 0.07, "generator": seeded(seed)}
    return simple_factors(shape_OI, kind_A=kind_A, kind_B=kind_B, **settings)


@pytest.mark.parametrize("kind", SIMPLE_KINDS)
def test_simple_starts_have_the_published_spread(kind):
    init = simple(kind, kind)
    assert (init.A_RI.shape, init.B_OR.shape) == ((64, 900), (600, 64))
    for factor, entries, std in (("A", init.A_RI, 0.3), ("B", init.B_OR, 0.07)):
        expected = reference.simple_std(kind, factor, d_out=600, d_in=900, r=64, std=std)
        assert float(entries.std()) == pytest.approx(expected, rel=0.02)
        assert abs(float(entries.mean())) <= 0.03 * expected


def test_kaiming_is_uniform_for_a():
    init, bound = simple("kaiming", "zeros"), reference.simple_bound(900)
    assert 0.99 * bound < float(init.A_RI.abs().max()) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "kaiming", "fan_out_kaiming", "xavier", "unit"])
def test_other_random_factors_are_normal(kind):
    init = simple("zeros" if kind == "kaiming" else kind, kind)
    for entries in (init.B_OR,) if kind == "kaiming" else (init.A_RI, init.B_OR):
        within_one_std = (entries.abs() < entries.std()).double().mean()
        assert float(within_one_std) == pytest.approx(0.6827, abs=0.01)


def test_orthogonal_is_orthogonal():
    init, identity_RR = simple("orthogonal", "orthogonal"), torch.eye(64)
    torch.testing.assert_close(init.A_RI @ init.A_RI.T, identity_RR, atol=1e-5, rtol=0)
    torch.testing.assert_close(init.B_OR.T @ init.B_OR, identity_RR, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [kind for kind in SIMPLE_KINDS if kind != "zeros"])
def test_simple_starts_follow_the_seed_and_leave_the_random_state_alone(kind):
    state = torch.get_rng_state()
    first, again, other = (simple(kind, kind, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for factor in ("A_RI", "B_OR"):
        assert torch.equal(getattr(first, factor), getattr(again, factor))
        assert not torch.equal(getattr(first, factor), getattr(other, factor))


@pytest.mark.parametrize("kind_A", SIMPLE_KINDS)
def test_simple_starts_shift_the_base_exactly_where_both_factors_are_not_zero(kind_A):
    for kind_B in SIMPLE_KINDS:
        init = simple(kind_A, kind_B, shape_OI=(12, 10), rank=RANK)
        assert init.shifts_base == bool((init.B_OR @ init.A_RI).any())


@pytest.mark.parametrize("direction", ["LoRA-One", "ArB2r"])
@pytest.mark.parametrize(("rslora", "scaling"), [(True, 16 / RANK**0.5), (False, 16 / RANK)])
def test_dora_magnitudes_are_the_row_norms_after_the_start(rslora, scaling, direction):
    targets = ["q_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=RANK, lora_alpha=16, use_rslora=rslora, use_dora=True, target_modules=targets)
    model = get_peft_model(small_llama(), settings)
    layers = {name.removeprefix("base_model.model."): layer for name, layer in lora_layers(model).items()}
    weights = {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers.items()}
    inits = {name: ours(gradient(tuple(W_OI.shape)), direction) for name, W_OI in weights.items()}
    apply_init(model, inits)
    for name, layer in layers.items():
        W_OI, shifts_base = weights[name].double().numpy(), direction != "LoRA-One"
        expected_O = reference.dora_magnitudes(W_OI, *float64(inits[name]), scaling, shifts_base=shifts_base)
        assert_close(layer.lora_magnitude_vector["default"].weight.detach().flatten(), expected_O)
        assert np.allclose(expected_O, np.linalg.norm(W_OI, axis=1)) == shifts_base


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"direction": "sideways"}, "unknown direction 'sideways'.*LoRA-One, LoRA-GA, ArB2r"),
        ({"direction": "LoRA-GA", "scale": "loud"}, "unknown scale 'loud'.*stable, gd, unit, weightS"),
        ({"direction": "LoRA-One", "scale": "loud"}, "unknown scale 'loud'"),
        ({"direction": "random"}, "seeded generator"),
        ({"direction": "LoRA-GA", "rank": 9}, "needs 18 singular triplets, got 8"),
        ({"direction": "LoRA-One", "rank": 9}, "needs 9 singular triplets, got 4"),
        ({"direction": "ArBr", "scale": "weightS", "weight_sigma_K": None}, "singular values of the weight"),
        ({"direction": "ArBr", "scale": "weightS", "weight_sigma_K": torch.ones(3)}, "at rank 4 needs"),
    ],
)
def test_misuse_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        ours(gradient(), **settings)


def test_unknown_weight_scale_is_named():
    with pytest.raises(ValueError, match=r"unknown scale 'gd'.*default, stable, unit, normalized"):
        weight_start(weight(), "gd")


@pytest.mark.parametrize("kinds", [("loud", "zeros"), ("kaiming", "loud")])
def test_unknown_simple_kind_is_named(kinds):
    with pytest.raises(ValueError, match=r"unknown start 'loud'.*kaiming, zeros, gaussian"):
        simple(*kinds)
