"""The sketches against the gradient they stand for."""

import pytest
import torch

from lora_one.sketch import LayerSketch, SketchSize, leading_vectors

SIZE = SketchSize(right=12, left=24, probes=4)


def batches(n: int, n_out: int, n_in: int, seed: int = 0, decay: float = 0.5) -> list:
    """Inputs and output gradients whose summed product has a spectrum that decays."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(24, n_out, n_in)
    scale = torch.arange(1, rank + 1) ** -decay
    left, right = (torch.linalg.qr(torch.randn(size, rank, generator=generator))[0] for size in (n_out, n_in))
    parts = []
    for _ in range(n):
        weights = torch.randn(200, rank, generator=generator) * scale
        noise = torch.randn(200, n_in, generator=generator) * 0.01
        parts.append(((weights @ right.T) + noise, (weights * scale) @ left.T))
    return parts


def summed(parts: list) -> torch.Tensor:
    return sum(delta.double().T @ x.double() for x, delta in parts)


def captured(G: torch.Tensor, sketched, k: int) -> float:
    """Energy of G between the leading k vectors, against the best k."""
    U, V = sketched.U_OK[:, :k].double(), sketched.V_IK[:, :k].double()
    return float((U.T @ G @ V).square().sum() / torch.linalg.svdvals(G)[:k].square().sum())


def sketch_of(parts: list, n_out: int, n_in: int, size: SketchSize = SIZE) -> LayerSketch:
    sketch = LayerSketch((n_out, n_in), size, torch.Generator().manual_seed(1))
    for x, delta in parts:
        sketch.add(x, delta)
    return sketch


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64)])
def test_one_pass_captures_the_leading_directions(shape):
    parts = batches(6, *shape)
    sketched = sketch_of(parts, *shape).solve()
    assert captured(summed(parts), sketched, 4) > 0.999
    assert captured(summed(parts), sketched, 8) > 0.995


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_a_second_pass_is_no_worse(shape):
    parts = batches(6, *shape, decay=0.2)
    sketch, G = sketch_of(parts, *shape), summed(parts)
    Q_OK = sketch.basis()
    exact_KI = sum((delta @ Q_OK).T @ x for x, delta in parts)
    twice, once = sketch.solve(exact_KI), sketch.solve()
    assert captured(G, twice, 8) >= captured(G, once, 8) - 1e-4
    product = (twice.U_OK * twice.S_K) @ twice.V_IK.T
    assert float((product - Q_OK @ Q_OK.T @ G.float()).norm() / G.norm()) < 1e-4


def test_a_gradient_of_low_rank_is_found_exactly():
    parts = [(x[:5], delta[:5]) for x, delta in batches(2, 60, 90)]  # rank 10
    sketched, G = sketch_of(parts, 60, 90).solve(), summed(parts)
    product = (sketched.U_OK * sketched.S_K) @ sketched.V_IK.T
    assert float((product - G).norm() / G.norm()) < 1e-4
    assert sketched.error < 1e-3
    assert sketched.norm == pytest.approx(float(G.norm()), rel=1e-3)


def test_a_small_layer_is_sketched_whole():
    parts = batches(3, 30, 8)
    sketched, G = sketch_of(parts, 30, 8).solve(), summed(parts)
    assert sketched.S_K.numel() == 8
    assert captured(G, sketched, 8) == pytest.approx(1, abs=1e-4)


def test_the_error_estimate_is_of_the_right_size():
    parts = batches(4, 80, 120, decay=0.05)
    size = SketchSize(right=6, left=12, probes=40)
    sketched, G = sketch_of(parts, 80, 120, size).solve(), summed(parts)
    product = (sketched.U_OK * sketched.S_K) @ sketched.V_IK.T
    assert sketched.error == pytest.approx(float((product - G).norm() / G.norm()), rel=0.25)


def test_leading_vectors_are_those_of_the_product():
    x, delta = batches(1, 50, 70)[0]
    U, V = leading_vectors(delta, x, torch.randn(70, 10, generator=torch.Generator().manual_seed(0)))
    reference = torch.linalg.svd(delta.T @ x)
    for ours, theirs in ((U, reference[0]), (V, reference[2].T)):
        overlap = torch.linalg.svdvals(ours[:, :4].T @ theirs[:, :4])
        assert float(overlap.min()) > 0.999
