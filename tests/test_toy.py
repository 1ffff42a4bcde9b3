"""The toy problems against closed forms: their gradients, starts and steps."""

import math

import numpy as np
import pytest
import torch

from lora_one.errors import UserError
from lora_one.inits import AdapterInit
from lora_one.optimizers import ScaledGD
from lora_one.toy import (
    Students,
    gradient_starts,
    make_problems,
    plain_starts,
    subspace_sine,
    train,
)

SEEDS = (0, 1)
RANK = 3
SHAPE = {"d_out": 10, "d_in": 14, "rank": RANK, "n": 60}


def gd(rate):
    return lambda students: torch.optim.SGD(students.parameters(), lr=rate)


def scaled_gd(rate, form="classic"):
    return lambda students: ScaledGD(students.parameters(), students.pairs, lr=rate, form=form, damping=0.0)


def test_deltas_have_the_spectrum_asked_for():
    problems = make_problems(SEEDS, **SHAPE, condition=50.0)
    sigma_PK = torch.linalg.svdvals(problems.delta_POI)
    expected = torch.tensor([1, 50**-0.5, 1 / 50], dtype=torch.float64)
    assert torch.allclose(sigma_PK[:, :3], expected.expand(2, 3), rtol=1e-12)
    assert float(sigma_PK[:, 3:].max()) < 1e-14
    tailed = make_problems(SEEDS, **SHAPE, condition=50.0, tail=0.5)
    assert torch.allclose(
        torch.linalg.svdvals(tailed.delta_POI)[:, 3:5] * 50, torch.tensor([0.5, 0.4]).double()
    )


def test_the_same_seed_gives_the_same_problem_whatever_stands_beside_it():
    both, alone = make_problems((3, 4), **SHAPE), make_problems((4,), **SHAPE)
    assert torch.equal(both.X_PNI[1], alone.X_PNI[0])
    assert torch.equal(both.delta_POI[1], alone.delta_POI[0])
    assert not torch.equal(both.X_PNI[0], both.X_PNI[1])


def test_the_linear_gradient_is_that_of_all_samples():
    """``-Δ Σ̂`` and the noise's part; problems with ReLU are the ones that keep their samples."""
    linear = make_problems(SEEDS, **SHAPE, noise=0.3)
    kept = make_problems(SEEDS, **SHAPE, noise=0.3, activation="relu")
    assert linear.X_PNI.shape[1] == 14 and kept.X_PNI.shape[1] == 60
    for own, X, Y, W, delta in zip(
        linear.full_gradient(), kept.X_PNI, kept.Y_PNO, kept.W_POI, kept.delta_POI, strict=True
    ):
        noise = (Y - (X @ (W + delta).T).relu()).numpy()
        X, delta = X.numpy(), delta.numpy()
        expected = -delta @ (X.T @ X) / 60 - noise.T @ X / 60
        np.testing.assert_allclose(own.numpy(), expected, atol=1e-13)
        assert np.abs(noise).std() > 0.1


def test_the_gradient_through_a_relu():
    problems = make_problems(SEEDS, **SHAPE, activation="relu")
    for own, X, Y, W in zip(
        problems.full_gradient(),
        *(t.numpy() for t in (problems.X_PNI, problems.Y_PNO, problems.W_POI)),
        strict=True,
    ):
        Z = X @ W.T
        expected = ((np.maximum(Z, 0) - Y) * (Z > 0)).T @ X / 60
        np.testing.assert_allclose(own.numpy(), expected, atol=1e-13)


def test_with_white_inputs_one_gradient_step_is_all():
    problems = make_problems(SEEDS, **SHAPE, whitened=True, condition=30.0)
    assert torch.allclose(problems.full_gradient(), -problems.delta_POI, atol=1e-13)
    done = Students(gradient_starts(problems, RANK)).update_POI().detach()
    assert float(problems.error_P(done).max()) < 1e-13
    # With γ the start is the γ-th part of it; with s, s times what B A is.
    shy = Students(gradient_starts(problems, RANK, scale="stable", gamma=8.0), scaling=2.0)
    assert torch.allclose(shy.update_POI(), problems.delta_POI / 4, atol=1e-13)
    of_gd = Students(gradient_starts(problems, RANK, scale="gd", scaling=0.5), scaling=0.5)
    assert torch.allclose(of_gd.update_POI(), 2 * problems.delta_POI, atol=1e-13)


@pytest.mark.parametrize("direction", ["LoRA-GA", "A2rBr", "ArBr"])
def test_shifted_starts_keep_the_weights_and_step_along_the_best_rank_2r(direction):
    """To first order in the rate: ``-η (s c)² [G]_2r``."""
    problems = make_problems(SEEDS, **SHAPE, noise=1.0)
    starts = gradient_starts(problems, RANK, direction=direction)
    assert float(Students(starts, 2.0).update_POI().detach().abs().max()) < 1e-15
    rate, students = 1e-6, Students(starts, 2.0)
    problems.loss_P(students.update_POI()).sum().backward()
    gd(rate)(students).step()
    U, S, Vh = np.linalg.svd(problems.full_gradient().numpy())
    best = (U[:, :, : 2 * RANK] * S[:, None, : 2 * RANK]) @ Vh[:, : 2 * RANK]
    np.testing.assert_allclose(students.update_POI().detach().numpy() / rate, -4 * best, atol=2e-4)
    assert S[0, 2 * RANK] > 0.01  # the whole gradient is another matrix


# ---- with white inputs a spectral start falls apart into scalar problems, one for each singular value


def sizes(run_error, sigma):
    """‖update - Δ‖ of a run, in units of Δ's entries."""
    return run_error * np.linalg.norm(sigma)


def simulate(step, gamma, n_steps, sigma):
    """Errors of scalar factors ``a = b = √(σ/γ)``, each moved by ``step(a, σ)``."""
    a, errors = np.sqrt(sigma / gamma), []
    for _ in range(n_steps + 1):
        errors.append(np.linalg.norm(a * a - sigma))
        a = a + step(a, sigma)
    return np.array(errors)


@pytest.mark.parametrize(
    "make, step",
    [
        (gd(0.4), lambda a, s: 0.4 * (s - a * a) * a),
        (scaled_gd(0.3), lambda a, s: 0.3 * (s - a * a) / a),
        (scaled_gd(0.3, "symmetric"), lambda a, s: 0.15 * (s - a * a) / a),
    ],
    ids=["gd", "classic", "symmetric"],
)
def test_training_from_the_spectral_start_is_known_in_closed_form(make, step):
    problems = make_problems(SEEDS, **SHAPE, whitened=True, condition=9.0)
    starts = gradient_starts(problems, RANK, scale="stable", gamma=4.0)
    run = train(problems, starts, make, 25)
    sigma = np.array([1, 1 / 3, 1 / 9])
    expected = simulate(step, 4.0, 25, sigma)
    for column in range(len(SEEDS)):  # the preconditioners are in float32
        np.testing.assert_allclose(
            sizes(run.error_TP[:, column].numpy(), sigma), expected, rtol=1e-4, atol=1e-9
        )
    assert expected[25] < expected[0] / 5


@pytest.mark.parametrize("form, rate", [("classic", 0.5), ("symmetric", 1.0)])
def test_scaled_gd_does_not_see_the_condition_number(form, rate):
    """From a spectral start the error is a multiple of Δ at every step, the same for every κ."""
    runs = []
    for condition in (1.0, 1e3):
        problems = make_problems(SEEDS, **SHAPE, whitened=True, condition=condition)
        starts = gradient_starts(problems, RANK, scale="stable", gamma=4.0)
        runs.append(train(problems, starts, scaled_gd(rate, form), 6).error_TP)
    assert torch.allclose(*runs, rtol=1e-3, atol=1e-6)
    problems = make_problems(SEEDS, **SHAPE, whitened=True, condition=1e3)
    starts = gradient_starts(problems, RANK, scale="stable", gamma=4.0)
    left_PK = learn(problems, starts, gd(0.4), 50)
    assert float(left_PK[:, -1].min()) > 0.7  # gradient descent has hardly moved the smallest direction
    assert float(left_PK[:, 0].max()) < 1e-6


def learn(problems, starts, make, n_steps):
    """What is left of each singular direction of Δ, as a share of its size (P, K)."""
    students = Students(starts)
    optimizer = make(students)
    for _ in range(n_steps):
        optimizer.zero_grad()
        problems.loss_P(students.update_POI()).sum().backward()
        optimizer.step()
    U, S, Vh = torch.linalg.svd(problems.delta_POI, full_matrices=False)
    learned_PK = (U.mT @ students.update_POI().detach() @ Vh.mT).diagonal(dim1=1, dim2=2) / S
    return (1 - learned_PK[:, :RANK]).abs()


def test_plain_loras_B_is_in_the_gradients_columns_from_its_first_step():
    problems = make_problems(SEEDS, **SHAPE)
    run = train(problems, plain_starts(problems, 2 * RANK, seeds=SEEDS), gd(0.1), 20, leading=RANK)
    assert torch.isnan(run.angle_B_TP[0]).all()  # B is zero
    assert float(run.angle_B_TP[1:].max()) < 1e-10
    assert float(run.angle_A_TP[0].min()) > 0.9
    assert torch.equal(run.error_TP[0], torch.ones(2).double())


def test_smaller_plain_starts_are_the_same_directions():
    problems = make_problems(SEEDS, **SHAPE)
    usual, small = (plain_starts(problems, 2, seeds=(7, 8), shrink=shrink) for shrink in (1.0, 0.25))
    for one, other in zip(usual, small, strict=True):
        assert torch.equal(one.A_RI * 0.25, other.A_RI)
        assert float(one.B_OR.abs().max()) == 0.0
    assert not torch.equal(usual[0].A_RI, usual[1].A_RI)


def test_the_sine_of_a_known_angle():
    """Of two planes that share one direction and are 0.3 apart in the other."""
    c, s = math.cos(0.3), math.sin(0.3)
    plane = torch.tensor([[[1.0, 0], [0, c], [0, s], [0, 0]]], dtype=torch.float64)
    floor = torch.eye(4, dtype=torch.float64)[None, :, :2]
    assert float(subspace_sine(plane @ torch.tensor([[3.0, 1], [0, 2]]).double(), floor)) == pytest.approx(s)
    flat = torch.tensor([[[1.0, 2], [0, 0], [0, 0], [0, 0]]], dtype=torch.float64)
    assert torch.isnan(subspace_sine(flat, floor)).all()


def test_steps_to_a_target_and_what_becomes_of_a_divergence():
    problems = make_problems(SEEDS, **SHAPE)
    starts = gradient_starts(problems, RANK)
    run = train(problems, starts, gd(0.3), 40, every=4)
    assert run.steps_T.tolist() == list(range(0, 41, 4))
    target = float(run.error_TP[5].max())
    for column, steps in enumerate(run.steps_to(target).tolist()):
        assert run.error_TP[int(steps) // 4, column] <= target < run.error_TP[int(steps) // 4 - 1, column]
    assert run.steps_to(0.0).tolist() == [torch.inf] * 2
    burst = train(problems, starts, gd(50.0), 40)
    assert burst.error_TP.shape == (41, 2)
    assert torch.isinf(burst.error_TP[-1]).all() and torch.isfinite(burst.error_TP[0]).all()
    assert float(burst.error_TP[torch.isfinite(burst.error_TP)].max()) < 1e3  # it ended long before infinity


def test_the_rate_follows_its_schedule():
    problems = make_problems(SEEDS, **SHAPE)
    starts = gradient_starts(problems, RANK)
    constant, stopped = (
        train(problems, starts, gd(0.3), 10, decay=decay).error_TP
        for decay in (None, lambda share: float(share < 0.5))
    )
    assert torch.equal(constant[:6], stopped[:6])
    assert torch.equal(stopped[5:], stopped[5:6].expand(6, 2))


def test_starts_are_not_written_to():
    start = AdapterInit(torch.ones(1, 14).double(), torch.ones(10, 1).double(), shifts_base=False)
    problems = make_problems((0,), **SHAPE)
    train(problems, [start], gd(0.01), 3)
    assert float(start.A_RI.std()) == 0.0


@pytest.mark.parametrize(
    "settings, message",
    [({"rank": 11}, "rank=11: Δ is 10 x 14"), ({"rank": 0}, "rank=0"), ({"n": 13}, "n=13: fewer samples")],
)
def test_impossible_problems_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make_problems(SEEDS, **(SHAPE | settings))


def test_more_directions_than_there_are():
    problems = make_problems(SEEDS, **SHAPE)
    with pytest.raises(UserError, match="leading=4"):
        train(problems, gradient_starts(problems, RANK), gd(0.1), 1, leading=4)
