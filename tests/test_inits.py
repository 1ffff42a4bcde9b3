"""The formulas of the papers, against a float64 SVD in numpy."""

import numpy as np
import pytest
import torch

from lora_one.inits import init_factors, triplets_needed
from lora_one.triplets import decompose

RANK, GAMMA, SCALING = 4, 128.0, 16 / 2


def gradient(seed: int = 0, out_features: int = 24, in_features: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((out_features, in_features)) * 1e-3


def reference_svd(G_OI: np.ndarray):
    """Singular triplets in float64, the largest entry of each left vector positive."""
    U, S, Vt = np.linalg.svd(G_OI.astype(np.float64), full_matrices=False)
    sign = np.sign(U[np.abs(U).argmax(axis=0), np.arange(U.shape[1])])
    return U * sign, S, Vt.T * sign


def ours(G_OI: np.ndarray, direction: str, **settings):
    triplets = decompose("layer", torch.tensor(G_OI, dtype=torch.float32), triplets_needed(direction, RANK))
    defaults = {"rank": RANK, "scale": "stable", "gamma": GAMMA, "scaling": SCALING}
    return init_factors(
        triplets.U_OK, triplets.S_K, triplets.V_IK, direction=direction, **(defaults | settings)
    )


def assert_close(actual: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(
        actual.double().numpy(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
    )


def test_lora_one_is_one_rank_r_gradient_step():
    G_OI = gradient()
    U, S, V = reference_svd(G_OI)
    init = ours(G_OI, "LoRA-One")
    best = (U[:, :RANK] * S[:RANK]) @ V[:, :RANK].T
    assert_close(SCALING * init.B_OR @ init.A_RI, -(SCALING / (GAMMA * S[0])) * best)
    assert not init.shifts_base


def test_lora_one_splits_the_singular_values_evenly():
    G_OI = gradient()
    U, S, V = reference_svd(G_OI)
    init = ours(G_OI, "LoRA-One")
    root = np.sqrt(S[:RANK] / S[0]) / np.sqrt(GAMMA)
    assert_close(init.B_OR, -U[:, :RANK] * root)
    assert_close(init.A_RI, (V[:, :RANK] * root).T)


def test_lora_one_without_normalisation_is_the_plain_gradient_step():
    G_OI = gradient()
    U, S, V = reference_svd(G_OI)
    init = ours(G_OI, "LoRA-One", normalize="none")
    best = (U[:, :RANK] * S[:RANK]) @ V[:, :RANK].T
    assert_close(SCALING * init.B_OR @ init.A_RI, -(SCALING / GAMMA) * best)


@pytest.mark.parametrize(
    ("direction", "left", "right"),
    [
        ("LoRA-GA", range(4, 8), range(4)),
        ("ArB2r", range(4, 8), range(4)),
        ("A2rBr", range(4), range(4, 8)),
        ("ArBr", range(0, 8, 2), range(1, 8, 2)),
    ],
)
@pytest.mark.parametrize(
    ("scale", "factor"),
    [("stable", 24**0.25 / np.sqrt(16)), ("gd", 1 / SCALING), ("unit", 1.0)],
)
def test_lora_ga_factors(direction, left, right, scale, factor):
    G_OI = gradient()
    U, _, V = reference_svd(G_OI)
    init = ours(G_OI, direction, scale=scale, gamma=16.0)
    assert init.shifts_base
    assert_close(init.B_OR, U[:, list(left)] * factor)
    assert_close(init.A_RI, V[:, list(right)].T * factor)


def test_random_takes_disjoint_halves_of_the_first_2r():
    G_OI = gradient()
    U, _, V = reference_svd(G_OI)
    init = ours(G_OI, "random", scale="unit", generator=torch.Generator().manual_seed(3))
    left = np.abs(U.T @ init.B_OR.double().numpy()).argmax(axis=0)
    right = np.abs(V.T @ init.A_RI.double().numpy().T).argmax(axis=0)
    assert sorted([*left, *right]) == list(range(2 * RANK))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1500, 1100)])
def test_decomposition_matches_float64(shape):
    rng = np.random.default_rng(1)
    # Full rank, with a spectrum that decays, as those of real gradients do.
    rank = min(shape)
    U = np.linalg.qr(rng.standard_normal((shape[0], rank)))[0]
    V = np.linalg.qr(rng.standard_normal((shape[1], rank)))[0]
    S = np.arange(1, rank + 1) ** -0.7
    triplets = decompose("layer", torch.tensor((U * S) @ V.T, dtype=torch.float32), 8)
    reference_U, reference_S, reference_V = reference_svd((U * S) @ V.T)
    np.testing.assert_allclose(triplets.S_K.numpy(), reference_S[:8], rtol=1e-4)
    np.testing.assert_allclose(triplets.U_OK.numpy(), reference_U[:, :8], atol=1e-3)
    np.testing.assert_allclose(triplets.V_IK.numpy(), reference_V[:, :8], atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"direction": "sideways"}, "unknown direction 'sideways'"),
        ({"direction": "LoRA-GA", "scale": "loud"}, "unknown scale 'loud'"),
        ({"direction": "random"}, "seeded generator"),
        ({"direction": "LoRA-GA", "rank": 9}, "needs 18 singular triplets"),
    ],
)
def test_misuse_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        ours(gradient(), **settings)
