"""The sketches against the gradient they stand for."""

import pytest
import torch
from conftest import ALONE, on_two_processes

from lora_one.processes import start_processes
from lora_one.sketch import OnePassSketch, SketchSize, TwoPassSketch, groups_of, products_of, sketch_size
from lora_one.skinny import (
    Product,
    leading_product,
    merge,
    orthonormal,
    product_from_sketches,
    qr,
    stacked,
    together,
    triplets_of,
)

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


def one(product: Product) -> Product:
    return Product(*(part[0] for part in product))


def finished(sketch, processes=ALONE):
    return type(sketch).finish([sketch], processes)[0]


def sketch_of(parts: list, n_out: int, n_in: int, size: SketchSize = SIZE) -> OnePassSketch:
    sketch = OnePassSketch((n_out, n_in), size, torch.Generator().manual_seed(1))
    for number, (x, delta) in enumerate(parts):
        if number in (1, 2, 4):
            OnePassSketch.aim([sketch])
        sketch.add(x, delta)
    return sketch


def twice(parts: list, n_out: int, n_in: int, size: SketchSize = SIZE):
    sketch = TwoPassSketch((n_out, n_in), size, torch.Generator().manual_seed(1))
    sketch.add(*parts[0])
    TwoPassSketch.aim([sketch], ALONE)
    for x, delta in parts[1:]:
        sketch.add(x, delta)
    TwoPassSketch.end_first_pass([sketch], ALONE)
    for x, delta in parts:
        sketch.project(x, delta)
    return finished(sketch)


SHAPES = [(60, 90), (90, 60), (64, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_one_pass_captures_the_leading_directions(shape):
    parts = batches(6, *shape)
    sketched = finished(sketch_of(parts, *shape))
    assert captured(summed(parts), sketched, 4) > 0.999
    assert captured(summed(parts), sketched, 8) > 0.995


@pytest.mark.parametrize("shape", SHAPES)
def test_two_passes_give_the_projection_on_their_basis(shape):
    parts = batches(6, *shape, decay=0.2)
    G, found = summed(parts), twice(parts, *shape)
    product = ((found.U_OK * found.S_K) @ found.V_IK.T).double()
    projected = found.U_OK.double() @ (found.U_OK.double().T @ G)
    assert float((product - projected).norm() / G.norm()) < 1e-5
    assert captured(G, found, 4) > 0.99


@pytest.mark.parametrize("sketch", [lambda *of: finished(sketch_of(*of)), twice])
class TestBothForms:
    def test_a_gradient_of_low_rank_is_found_exactly(self, sketch):
        parts = [(x[:5], delta[:5]) for x, delta in batches(2, 60, 90)]  # rank 10
        sketched, G = sketch(parts, 60, 90), summed(parts)
        product = (sketched.U_OK * sketched.S_K) @ sketched.V_IK.T
        assert float((product - G).norm() / G.norm()) < 1e-4
        assert sketched.error < 1e-3
        assert sketched.norm == pytest.approx(float(G.norm()), rel=1e-3)
        assert sketched.n_positions == 10

    def test_a_small_layer_is_sketched_whole(self, sketch):
        parts = batches(3, 30, 8)
        sketched, G = sketch(parts, 30, 8), summed(parts)
        assert sketched.S_K.numel() == 8
        assert captured(G, sketched, 8) == pytest.approx(1, abs=1e-4)

    def test_the_error_estimate_is_of_the_right_size(self, sketch):
        parts = batches(5, 80, 120, decay=0.05)
        size = SketchSize(right=6, left=12, probes=40)
        sketched, G = sketch(parts, 80, 120, size), summed(parts)
        product = (sketched.U_OK * sketched.S_K) @ sketched.V_IK.T
        assert sketched.error == pytest.approx(float((product - G).norm() / G.norm()), rel=0.25)
        assert sketched.norm == pytest.approx(float(G.norm()), rel=0.25)

    def test_a_gradient_of_zero_is_zero(self, sketch):
        sketched = sketch([(x, delta * 0) for x, delta in batches(3, 60, 90)], 60, 90)
        assert (sketched.norm, sketched.error) == (0, 0)


def test_a_layer_called_twice_in_the_first_batch_counts_twice():
    (x, delta), (x2, delta2) = parts = batches(2, 60, 90)
    sketch = OnePassSketch((60, 90), SketchSize(right=40, left=60), torch.Generator().manual_seed(0))
    sketch.add(x, delta)
    sketch.add(x2, delta2)
    Q, B = one(products_of([sketch]))
    G = summed(parts).float()
    assert float((Q @ B - G).norm() / G.norm()) < 1e-2


def test_the_leading_part_has_the_leading_triplets():
    x, delta = batches(1, 50, 70)[0]
    noise = torch.randn(10, 50, generator=torch.Generator().manual_seed(0))
    U, S, V = triplets_of(leading_product(delta, x, noise))
    reference = torch.linalg.svd(delta.T @ x)
    for ours, theirs in ((U, reference[0]), (V, reference[2].T)):
        overlap = torch.linalg.svdvals(ours[:, :4].T @ theirs[:, :4])
        assert float(overlap.min()) > 0.99
    assert torch.allclose(S[:4], reference[1][:4], rtol=1e-2)


def merge_as_rank(path: str) -> None:
    processes = start_processes()
    generator = torch.Generator().manual_seed(0)
    mine, nothing = product_of_rank(processes.rank), Product(product_of_rank(0).Q_OK, torch.zeros(12, 90))
    both = merge(mine, generator, processes)
    of_rank_1 = merge(nothing if processes.is_main else mine, generator, processes)
    # Two layers at once, of which the main process has seen the second alone.
    at_once = merge(stacked([nothing if processes.is_main else mine, mine]), generator, processes)
    if processes.is_main:
        torch.save([tuple(product) for product in (both, of_rank_1, at_once)], path)


def product_of_rank(rank: int) -> Product:
    return one(products_of([sketch_of(batches(3, 60, 90, seed=rank), 60, 90)]))


def test_the_merged_product_is_the_leading_part_of_the_sum(tmp_path):
    on_two_processes(merge_as_rank, str(tmp_path / "merged.pt"))
    both, of_rank_1, at_once = (Product(*parts) for parts in torch.load(tmp_path / "merged.pt"))
    G = sum(Q @ B for Q, B in (product_of_rank(rank) for rank in (0, 1))).double()
    U, S, V = triplets_of(both)
    best = torch.linalg.svdvals(G)
    assert torch.allclose(S[:6].double(), best[:6], rtol=1e-2)
    kept = (U[:, :8].double().T @ G @ V[:, :8].double()).square().sum()
    assert float(kept / best[:8].square().sum()) > 0.999
    alone = product_of_rank(1)  # the main process has seen nothing
    assert distance(of_rank_1, alone) < 1e-3
    assert distance(Product(at_once.Q_OK[0], at_once.B_KI[0]), alone) < 1e-3
    assert distance(Product(at_once.Q_OK[1], at_once.B_KI[1]), both) < 1e-3


def distance(ours: Product, theirs: Product) -> float:
    return float((ours.Q_OK @ ours.B_KI - theirs.Q_OK @ theirs.B_KI).norm() / theirs.B_KI.norm())


def test_layers_at_once_are_what_each_alone_would_be():
    together = [sketch_of(batches(n, 60, 90, seed=n), 60, 90) for n in (0, 1, 2, 5, 6)]
    alone = [sketch_of(batches(n, 60, 90, seed=n), 60, 90) for n in (0, 1, 2, 5, 6)]
    found = OnePassSketch.finish(together, ALONE)
    for n, ours, sketch in zip((0, 1, 2, 5, 6), found, alone, strict=True):
        theirs = finished(sketch)
        assert ours.n_positions == theirs.n_positions == 200 * n
        assert ours.norm == pytest.approx(theirs.norm, rel=1e-5)
        assert ours.error == pytest.approx(theirs.error, rel=1e-2, abs=1e-5)
        assert torch.allclose(ours.S_K, theirs.S_K, rtol=1e-4, atol=1e-5 * theirs.norm)


@pytest.mark.parametrize("kind", [OnePassSketch, TwoPassSketch])
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("number", [0, 1])
def test_a_number_that_is_not_finite_is_noticed_with_its_batch(kind, part, number):
    sketch = kind((60, 90), SIZE, torch.Generator().manual_seed(1))
    parts = batches(3, 60, 90)
    parts[number][part][7, 5] = torch.inf
    for other, (x, delta) in enumerate(parts[: number + 1]):
        assert sketch.seems_finite()
        sketch.add(x, delta)
        if other == 0 and number:
            kind.aim([sketch], *([ALONE] if kind is TwoPassSketch else []))
    assert not sketch.seems_finite()


def test_large_sketches_are_taken_one_by_one():
    size = SketchSize(right=256, left=0)
    sketches = [TwoPassSketch((2048, 1024), size, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert [len(group) for group in groups_of(sketches, ALONE)] == [1, 1]


def test_layers_are_taken_together_that_are_alike():
    sketches = [sketch_of(batches(1, *shape), *shape) for shape in [(60, 90)] * 9 + [(90, 60)]]
    unseen = sketch_of([], 60, 90)
    groups = groups_of([*sketches, unseen], ALONE)
    assert [[sketch.shape_OI for sketch in group] for group in groups] == [
        [(60, 90)] * 8,
        [(60, 90)] * 2,
        [(90, 60)],
    ]
    assert groups[1][1] is unseen


def test_a_singular_matrix_among_others_spoils_none():
    M_TOK = torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(0))
    M_TOK[1, :, 3] = M_TOK[1, :, 2]
    Q_TOK, R_TKK = qr(M_TOK)
    assert torch.allclose(Q_TOK.double() @ R_TKK, M_TOK.double(), atol=1e-5)
    assert torch.allclose(Q_TOK.mT @ Q_TOK, torch.eye(6).expand(3, 6, 6), atol=1e-5)


def test_products_and_triplets_are_the_same_matrix():
    generator = torch.Generator().manual_seed(0)
    product = Product(
        orthonormal(torch.randn(60, 7, generator=generator)), torch.randn(7, 90, generator=generator)
    )
    U, S, V = triplets_of(product)
    assert torch.allclose((U * S) @ V.T, product.Q_OK @ product.B_KI, atol=1e-5)
    assert torch.allclose(V.T @ V, torch.eye(7), atol=1e-5)
    assert bool((S[:-1] >= S[1:]).all())


@pytest.mark.parametrize("left", ["seen", "hardly seen"])
def test_sketches_of_a_product_give_it_back(left):
    """Also where Ψ is nearly blind to one of its directions, which the Cholesky way refuses."""
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(60, 6, generator=generator) @ torch.randn(6, 90, generator=generator)
    omega, psi = torch.randn(90, 6, generator=generator), torch.randn(8, 60, generator=generator)
    if left == "hardly seen":
        direction = torch.linalg.svd(G).U[:, 5]
        psi -= torch.outer(psi @ direction, direction) * (1 - 1e-4)
    product = product_from_sketches((G @ omega).T, psi @ G, psi)
    assert float((product.Q_OK @ product.B_KI - G).norm() / G.norm()) < (1e-4 if left == "seen" else 5e-2)


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-5, 0.0])
def test_the_decomposition_holds_for_well_and_badly_conditioned_matrices(smallest):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 12, generator=generator))[0] for n in (300, 12))
    M = (left * torch.logspace(0, -1, 12)).float()
    M[:, -1] *= smallest
    M = M @ right.T
    Q, R = qr(M)
    assert torch.allclose(Q.T @ Q, torch.eye(12), atol=1e-5)
    assert float((Q.double() @ R - M.double()).norm() / M.norm()) < 1e-6


def test_slices_of_one_tensor_come_together_without_a_copy():
    whole = torch.randn(4, 3, 5)
    assert together([whole[i] for i in range(4)]).data_ptr() == whole.data_ptr()
    other = torch.randn(3, 5)
    for parts in ([1, 0, 2, 3], [0, 1], [0, 0, 1, 2], [1, 2, 3]):
        found = together([whole[i] for i in parts])
        assert found.data_ptr() != whole.data_ptr()
        assert torch.equal(found, whole[parts])
    assert torch.equal(together([whole[0], whole[1], whole[2], other])[3], other)
    assert torch.equal(together([whole[:, 0], whole[:, 1]]), torch.stack([whole[:, 0], whole[:, 1]]))


def test_layers_aimed_together_find_what_each_finds_alone():
    all_parts = [batches(6, 40, 60, seed) for seed in range(3)]
    alone = [finished(sketch_of(parts, 40, 60)) for parts in all_parts]
    group = [OnePassSketch((40, 60), SIZE, torch.Generator().manual_seed(1)) for _ in all_parts]
    for number in range(6):
        if number in (1, 2, 4):
            OnePassSketch.aim(group if number < 4 else group[:2])  # a layer that was not reached stays behind
        for sketch, parts in zip(group, all_parts, strict=True):
            sketch.add(*parts[number])
    found = OnePassSketch.finish(group, ALONE)
    for mine, expected, parts in zip(found[:2], alone, all_parts, strict=False):
        torch.testing.assert_close(mine.S_K[:8], expected.S_K[:8], rtol=1e-4, atol=1e-4)
        assert captured(summed(parts), mine, 8) == pytest.approx(
            captured(summed(parts), expected, 8), abs=1e-4
        )
    assert captured(summed(all_parts[2]), found[2], 8) > 0.98


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 64])
def test_the_size_of_a_sketch_finds_what_is_asked_for(n):
    size, parts = sketch_size(n, two_passes=False), batches(4, 80, 90)
    assert size.right >= n + 4
    assert size.left >= size.right + 4
    assert captured(summed(parts), finished(sketch_of(parts, 80, 90, size)), n) > 0.95
    assert sketch_size(16, two_passes=False) == SketchSize() == SketchSize(28, 32, 4)
