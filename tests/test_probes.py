"""Probes: planted angles, closed forms, a Hessian from autograd; and a training that does not notice them."""

import json
import math
import re
import shlex

import numpy as np
import pytest
import torch
from conftest import ALONE, ROOT, load_script, on_two_processes, only_run, random_examples, small_llama
from peft import LoraConfig, get_peft_model
from test_layers import gpt2, llama_config, t5
from test_training import Interrupted
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from lora_one import training
from lora_one.config import ExperimentConfig, WandbConfig, parse_tree
from lora_one.data.batches import collate
from lora_one.data.encoding import Encoded
from lora_one.errors import DivergedError, UserError
from lora_one.inits import AdapterInit, init_factors
from lora_one.losses import weighted_loss
from lora_one.models import linear_layers
from lora_one.probes import curvature, spectra, subspaces, updates, variances
from lora_one.probes.callback import start_probes
from lora_one.probes.changes import Alignment, Dense, LowRank, align
from lora_one.probes.kept import Trajectory
from lora_one.probes.layers import find_layers
from lora_one.probes.passes import look_at_layers, probe_batch
from lora_one.processes import Processes, start_processes
from lora_one.tracking import Tracker, read_metrics

LORA = LoraConfig(r=4, target_modules="all-linear")
ALL = dict.fromkeys(("update", "subspaces", "spectrum", "variance", "curvature"), True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(random(*shape, seed=seed))[0]


def planted(sigma: list[float], out: int = 30, into: int = 20) -> tuple[torch.Tensor, ...]:
    """A matrix with known singular triplets."""
    U, V = orthonormal(out, len(sigma)), orthonormal(into, len(sigma), seed=1)
    S = torch.tensor(sigma, dtype=torch.float64)
    return U @ torch.diag(S) @ V.T, U, S, V


# ---- pure functions


def test_a_product_is_what_it_stands_for():
    product = LowRank(random(30, 4), random(4, 20, seed=1))
    D, M = product.left_OK @ product.right_KI, random(30, 20, seed=2)
    assert product.inner(M) == pytest.approx(float((D * M).sum()))
    assert product.norm_sq() == pytest.approx(float(D.square().sum()))
    U, S, V = product.triplets(3)
    np.testing.assert_allclose(S, torch.linalg.svdvals(D)[:3], rtol=1e-12)
    np.testing.assert_allclose(U.T @ D @ V, torch.diag(S), atol=1e-12)


def test_cosines_of_layers_add_up_to_that_of_all():
    first, second = random(3, 40), random(3, 40, seed=1)
    parts = [align(Dense(a[None]), b[None]) for a, b in zip(first, second, strict=True)]
    expected = float(torch.cosine_similarity(first.flatten(), second.flatten(), dim=0))
    assert Alignment.of_all(parts).cosine == pytest.approx(expected, rel=1e-12)
    assert align(Dense(torch.zeros(2, 2)), torch.ones(2, 2)).cosine is None


@pytest.mark.parametrize("degrees", [0.0, 20.0, 60.0, 90.0])
def test_planted_angles_are_found(degrees):
    basis, angle = orthonormal(12, 4), math.radians(degrees)
    P = basis[:, :2]
    Q = torch.stack([basis[:, 0], math.cos(angle) * basis[:, 1] + math.sin(angle) * basis[:, 2]], dim=1)
    assert subspaces.angles(P, Q) == pytest.approx([0.0, degrees], abs=1e-5)
    assert subspaces.overlap(P, Q) == pytest.approx((1 + math.cos(angle) ** 2) / 2)
    # A change with this angle to the gradient, whose cosine is that of the angle.
    G, *_ = planted([1.0, 1.0])
    turned = math.cos(angle) * -G + math.sin(angle) * random_orthogonal_to(G)
    found = updates.compare_update(Dense(turned), G)["cosine_gradient"]
    assert found.cosine == pytest.approx(math.cos(angle), abs=1e-12)


def random_orthogonal_to(G: torch.Tensor) -> torch.Tensor:
    M = random(*G.shape, seed=7)
    M = M - (M * G).sum() / (G * G).sum() * G
    return M * (G.norm() / M.norm())


def test_overlap_of_random_spaces_is_their_share_of_the_dimensions():
    values = [
        subspaces.overlap(orthonormal(40, 5, seed=s), orthonormal(40, 8, seed=100 + s)) for s in range(200)
    ]
    assert np.mean(values) == pytest.approx(8 / 40, rel=0.05)


def test_lora_ones_start_has_the_cosine_of_the_energy_it_captures():
    G, U, S, V = planted([9.0, 4.0, 2.0, 1.0])
    for normalize in ("spectral", "none"):
        settings = {"rank": 2, "direction": "LoRA-One", "scale": "stable", "gamma": 128.0, "scaling": 5.7}
        init = init_factors(U, S, V, normalize=normalize, **settings)
        found = updates.compare_start(init.A_RI, init.B_OR, 5.7, G)
        energy = (81 + 16) / (81 + 16 + 4 + 1)
        assert found.cosine == pytest.approx(math.sqrt(energy), rel=1e-12)
        assert updates.best_cosine(S[:2], float(S.square().sum())) == pytest.approx(found.cosine)


def test_lora_gas_first_step_is_the_best_of_rank_2r():
    """By SGD on disjoint indices: the step is -η (s c)² [G]_2r, whatever the direction."""
    G, U, S, V = planted([9.0, 4.0, 2.0, 1.5, 1.0])
    s, rate = 5.7, 1e-7
    for direction in ("ArB2r", "A2rBr", "ArBr"):
        init = init_factors(U, S, V, rank=2, direction=direction, scale="unit", gamma=16.0, scaling=s)
        A, B = init.A_RI, init.B_OR
        left = torch.cat([-rate * s * (G @ A.T), B], dim=1)
        right = torch.cat([A - rate * s * (B.T @ G), -rate * s * (B.T @ G)])
        change = LowRank(s * left, right)
        best = updates.best_cosine(S[:4], float(S.square().sum()))
        assert updates.compare_update(change, G)["cosine_gradient"].cosine == pytest.approx(best, abs=1e-6)
        assert updates.compare_spaces(change, subspaces.Spaces(U, V), 2) == pytest.approx(
            {"left_overlap": 1.0, "right_overlap": 1.0}, abs=1e-6
        )


def test_plain_loras_start_has_no_b_and_steps_along_a():
    """With B = 0 SGD moves W by -η s² G AᵀA."""
    G, U, _, V = planted([3.0, 2.0, 1.0])
    A, B = random(2, 20, seed=3), torch.zeros(30, 2, dtype=torch.float64)
    found = subspaces.compare_factors(A, B, subspaces.Spaces(U, V), None)
    assert {key[0] for key in found} == {"A"}
    change = LowRank(torch.cat([-0.1 * G @ A.T, B], dim=1), torch.cat([A, torch.zeros_like(A)]))
    expected = torch.cosine_similarity((G @ A.T @ A).flatten(), G.flatten(), dim=0)
    assert updates.compare_update(change, G)["cosine_gradient"].cosine == pytest.approx(float(expected))
    assert spectra.spectrum_figures(A, B, 2.0, LowRank(B, A))["effective_rank"] is None


def test_factors_in_the_gradients_spaces():
    G, U, _, V = planted([9.0, 4.0, 2.0, 1.0])
    spaces = subspaces.Spaces(U, V)
    A, B = (V[:, :2] @ random(2, 2)).T, U[:, 2:4] @ random(2, 2, seed=1)
    found = subspaces.compare_factors(A, B, spaces, spaces)
    expected = {
        "A_overlap_r": 1,
        "A_overlap_2r": 1,
        "A_overlap_first": 1,
        "B_overlap_r": 0,
        "B_overlap_2r": 1,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert found["B_angles"] == pytest.approx([90, 90])
    assert subspaces.energy_between(G, spaces, 2) == pytest.approx(97 / 102)


def test_effective_rank():
    assert spectra.effective_rank(torch.ones(5)) == pytest.approx(5)
    assert spectra.effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    half = torch.tensor([0.5, 0.25, 0.25])
    assert spectra.effective_rank(half) == pytest.approx(2**1.5)  # its entropy is 1.5 bits


def test_norms_and_singular_values():
    A, B = random(3, 20), random(30, 3, seed=1)
    found = spectra.spectrum_figures(A, B, 2.0, LowRank(B, A))
    np.testing.assert_allclose(found["singular_values"], torch.linalg.svdvals(2.0 * B @ A)[:3], rtol=1e-10)
    assert found["norm_sBA"] == pytest.approx(2 * float((B @ A).norm()))
    assert found["norm_moved"] == pytest.approx(float((B @ A).norm()))


def test_variances_of_a_known_product():
    A, B = random(3, 20), random(30, 3, seed=1)
    x, delta = random(50, 20, seed=2), random(50, 30, seed=3)
    found = variances.variance_figures(A, B, 2.0, x, delta)
    product = 2.0 * B @ A
    assert found["forward"] == pytest.approx(float((x @ product.T).square().mean() / x.square().mean()))
    assert found["backward"] == pytest.approx(
        float((delta @ product).square().mean() / delta.square().mean())
    )
    many = variances.variance_figures(A, B, 2.0, random(40_000, 20, seed=2), random(40_000, 30, seed=3))
    assert list(many.values()) == pytest.approx(variances.expected_variances(A, B, 2.0), rel=0.03)


def test_lora_gas_stable_scale_is_flat_over_ranks_and_widths():
    """α²/γ² forward, and that times d_out/d_in backward, with s = α/√r."""
    for out, into, rank in ((64, 64, 2), (64, 64, 16), (256, 256, 16), (128, 64, 8)):
        k = min(out, into)
        U, V, S = orthonormal(out, k), orthonormal(into, k, seed=1), torch.ones(k, dtype=torch.float64)
        s = 16 / math.sqrt(rank)
        init = init_factors(U, S, V, rank=rank, direction="ArB2r", scale="stable", gamma=16.0, scaling=s)
        assert variances.expected_variances(init.A_RI, init.B_OR, s) == pytest.approx((1.0, out / into))


def test_the_ends_of_a_known_spectrum():
    Q = orthonormal(60, 60)
    values = torch.linspace(-3, 5, 60, dtype=torch.float64)
    H = Q @ torch.diag(values) @ Q.T
    found = curvature.lanczos(lambda v: H @ v, random(60, seed=1), 60)
    assert (found.top, found.bottom) == (pytest.approx(5, rel=1e-2), pytest.approx(-3, rel=0.05))
    assert abs(found.top - 5) <= found.error + 1e-12
    few = curvature.lanczos(lambda v: H @ v, random(60, seed=1), 3)
    assert few.n_products == 3 and few.top <= 5
    assert np.abs(values.numpy() - few.top).min() <= few.error
    low = torch.diag(torch.tensor([4.0, 0, 0, 0, 0, 0], dtype=torch.float64))
    assert curvature.lanczos(lambda v: low @ v, random(6), 6).top == pytest.approx(4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_limits_are_where_a_quadratic_diverges(momentum):
    """torch's SGD, and Adam with a preconditioner at rest, just below and above the limit."""
    H = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))

    def end(rate: float) -> float:
        x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([x], lr=rate, momentum=momentum)
        for _ in range(2000):
            optimizer.zero_grad()
            (0.5 * x @ H @ x).backward()
            optimizer.step()
        return float(x.detach().norm())

    limit = curvature.rate_limit(3.0, momentum)
    assert end(0.98 * limit) < 1e-3
    assert end(1.02 * limit) > 1e3
    # A mean of gradients is (1 - β) times torch's sum of them: so is Adam's.
    assert curvature.adam_rate_limit(3.0, momentum) == pytest.approx(limit / (1 - momentum))
    assert curvature.rate_limit(-1.0) is None


def tiny_net():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()
    x, y = random(16, 4), random(16, 2, seed=1)
    return net, lambda: torch.nn.functional.mse_loss(net(x), y)


def autograd_hessian(net, loss_of) -> torch.Tensor:
    names, values = zip(*net.named_parameters(), strict=True)

    def loss(flat):
        parts = flat.split([value.numel() for value in values])
        pairs = {n: part.view_as(v) for n, part, v in zip(names, parts, values, strict=True)}
        x, y = random(16, 4), random(16, 2, seed=1)
        return torch.nn.functional.mse_loss(torch.func.functional_call(net, pairs, (x,)), y)

    return torch.autograd.functional.hessian(loss, torch.cat([v.detach().flatten() for v in values]))


def test_the_hessian_is_autograds():
    net, loss_of = tiny_net()
    H, parameters = autograd_hessian(net, loss_of), list(net.parameters())
    multiply = curvature.hessian_product(loss_of(), parameters)
    found = torch.stack([multiply(row) for row in torch.eye(len(H), dtype=torch.float64)])
    np.testing.assert_allclose(found, H, atol=1e-12)
    expected = torch.linalg.eigvalsh(H)
    ends = curvature.lanczos(multiply, random(len(H)), len(H))
    assert ends.top == pytest.approx(float(expected[-1]), rel=2e-2)
    assert all(parameter.grad is None for parameter in parameters)


def test_the_preconditioned_hessian_is_that_of_adams_steps():
    net, loss_of = tiny_net()
    parameters = list(net.parameters())
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 4e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for step in range(12):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
        assert (curvature.adam_scale(optimizer, parameters) is None) == (step < 9)
    scale = curvature.adam_scale(optimizer, parameters)
    states = [optimizer.state[parameter] for parameter in parameters]
    roots = [(state["exp_avg_sq"] / (1 - 0.999**12)).sqrt() + 1e-8 for state in states]
    D = torch.cat([(4 if i > 1 else 1) / root.flatten() for i, root in enumerate(roots)])
    np.testing.assert_allclose(scale, D, rtol=1e-5)
    H = autograd_hessian(net, loss_of)
    expected = torch.linalg.eigvals(torch.diag(D) @ H).real.max()
    multiply = curvature.preconditioned(curvature.hessian_product(loss_of(), parameters), D)
    assert curvature.lanczos(multiply, random(len(D)), len(D)).top == pytest.approx(float(expected), rel=2e-2)


# ---- on a model


def config(**sections) -> ExperimentConfig:
    model = {"name": "x", "real_batch_size": 8, "max_steps": 5, "learning_rate": 5e-3, "warmup_steps": 1}
    tree = {"dataset": {"name": "tiny"}, "model": model, "probes": ALL | {"every": 2, "n_examples": 44}}
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return ExperimentConfig.model_validate(tree)


def adapted(dora: bool = False, started: bool = False):
    model = small_llama()
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", use_dora=dora))
    for name, parameter in model.named_parameters():
        if started and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def fit(folder, settings, model, starts=None, processes: Processes = ALONE):
    folder.mkdir(exist_ok=True)
    tracker, examples = Tracker(WandbConfig(mode="disabled"), "run", folder, {}), tuple(random_examples(44))
    places = {"pad_id": 0, "processes": processes, "folder": folder, "tracker": tracker}
    probes = start_probes(settings, model, starts or {}, examples, **places)
    training.train(model, examples, random_examples(4, seed=1), settings, probes=probes, **places)
    return model


def assert_same(one, other):
    for (name, first), (_, second) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(first, second), name


def adapted_t5():
    torch.manual_seed(0)
    return get_peft_model(
        t5(), LoraConfig(r=4, target_modules=["q", "v", "wi", "wo"], init_lora_weights=False)
    )


def adapted_gpt2():
    torch.manual_seed(0)
    targets = ["c_attn", "c_fc", "c_proj"]
    model = get_peft_model(gpt2(), LoraConfig(r=4, target_modules=targets, fan_in_fan_out=True))
    model.config.use_cache = False
    return model


SEEN = {
    "lora": (lambda: adapted(started=True), "1.self_attn.v_proj"),
    "dora": (lambda: adapted(dora=True, started=True), "1.self_attn.v_proj"),
    "conv1d": (adapted_gpt2, "1.mlp.c_fc"),
    "t5": (adapted_t5, "decoder.block.1.layer.1.EncDecAttention.v"),
}


@pytest.mark.parametrize("case", SEEN)
def test_the_gradient_seen_in_a_layer_is_autograds(case):
    """Of the effective weight: moving it is adding a product with the input to the layer's output."""
    make, end = SEEN[case]
    examples = random_examples(44)
    if case == "t5":
        examples = [Encoded(example.ids, example.n_prompt, is_pair=True) for example in examples]
    model, batch, found = make(), probe_batch(examples, 6, "sample", 0, 0), dict[str, torch.Tensor]()
    layers = find_layers(model, {})
    look_at_layers(model, list(layers), batch, lambda name, x, d: found.update({name: d.T @ x}), scale=8.0)
    path = next(path for path in layers if path.endswith(end))
    E = torch.zeros(layers[path].shape, requires_grad=True)
    hook = model.get_submodule(path).register_forward_hook(lambda _, inputs, out: out + inputs[0] @ E.T)
    model.eval()
    (expected,) = torch.autograd.grad(weighted_loss(model, batch), E)
    hook.remove()
    np.testing.assert_allclose(found[path], expected, atol=2e-7, rtol=1e-4)
    assert len(found) == len(layers)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dora", [False, True])
def test_the_change_of_a_layer_is_that_of_what_it_computes(dora):
    model = adapted(dora, started=True)
    layers = find_layers(model, {})
    path, layer = list(layers.items())[3]
    module, x = model.get_submodule(path).eval(), torch.eye(layers[path].shape[1])
    with torch.no_grad():
        before, was = layer.state(), module(x).clone()
        before = type(before)(**{k: v.clone() if torch.is_tensor(v) else v for k, v in vars(before).items()})
        for number, parameter in enumerate(p for p in module.parameters() if p.requires_grad):
            noise = torch.Generator().manual_seed(number)
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
        change = layer.change(before, layer.state())
        D = change.D_OI if isinstance(change, Dense) else change.left_OK @ change.right_KI
        np.testing.assert_allclose(D, (module(x) - was).T, atol=1e-5)


CASES = {
    "lora": {},
    "scaled": {"optimizer": {"name": "scaled_adamw"}},
    "full_ft": {"peft": {"use_peft": False}},
    "dora": {"peft": {"dora": True}},
    "conv1d": {"probes": {"curvature": False}},
    "4bit": {"probes": {"curvature": False}},
}


def quantised(folder):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config()).save_pretrained(folder)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.float32)
    model.config.use_cache = False
    torch.manual_seed(0)
    return get_peft_model(model, LORA)


@pytest.mark.parametrize("case", CASES)
def test_a_training_does_not_notice_them(case, tmp_path):
    def model():
        if case == "full_ft":
            return small_llama()
        if case in ("conv1d", "4bit"):
            return adapted_gpt2() if case == "conv1d" else quantised(tmp_path / "base")
        return adapted(case == "dora", started=case == "scaled")

    settings = config(**CASES[case])
    off = settings.model_copy(update={"probes": type(settings.probes)()})
    torch.manual_seed(5)
    plain = fit(tmp_path / "off", off, model())
    state = torch.get_rng_state()
    torch.manual_seed(5)
    probed = fit(tmp_path / "on", settings, model())
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(plain, probed)
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / f / "metrics.jsonl") if "loss" in row]
        for f in ("off", "on")
    ]
    assert losses[0] == losses[1]
    assert not (tmp_path / "off" / "probes.jsonl").exists()
    rows = read_metrics(tmp_path / "on" / "probes.jsonl")
    # The first step of the warm-up moves nothing, so the next is looked at too.
    assert [row["step"] for row in rows] == [0, 1, 2, 4, 5]
    assert rows[0]["totals"]["update/cosine_gradient"] is None
    for row in rows[1:-1]:
        assert (
            0
            < row["totals"]["update/cosine_gradient"]
            <= row["totals"]["update/best_cosine"] + (case == "full_ft")
        )
    assert len(rows[1]["layers"]) == (8 if case == "conv1d" else 14)
    assert ("variance/forward" in rows[1]["totals"]) == (case != "full_ft")
    assert not settings.probes.curvature or rows[1]["totals"]["curvature/top"] > 0


def test_adams_limit_counts_what_clipping_leaves(tmp_path):
    """Adam's step is the same for gradients of any size, so clipping all of them changes no limit."""
    asked, limits = {**dict.fromkeys(ALL, False), "curvature": True, "every": 12}, []
    # Weights that Adam moves by nothing: the second moments are of one gradient, clipped or not.
    for name, norm in (("clipped", 1e-3), ("whole", math.inf)):
        model = {
            "max_grad_norm": norm,
            "learning_rate": 0.0,
            "max_steps": 12,
            "epochs": 12,
            "real_batch_size": 44,
        }
        settings = config(model=model, probes=asked, optimizer={"eps": 1e-20})
        fit(tmp_path / name, settings, adapted(started=True))
        rows = read_metrics(tmp_path / name / "probes.jsonl")
        limits.append(rows[-1]["totals"]["curvature/adam_rate_limit"])
        assert rows[-1]["step"] == 12
    assert limits[0] == pytest.approx(limits[1], rel=0.05)


def test_a_resumed_run_ends_with_the_rows_of_one_that_was_not(tmp_path, monkeypatch):
    settings = config(model={"max_steps": 8, "save_steps": 4, "epochs": 2})
    fit(tmp_path / "whole", settings, adapted())
    log = training.Log.on_log

    def stop(self, args, state, control, **kwargs):
        log(self, args, state, control, **kwargs)
        if state.global_step == 7:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(training.Log, "on_log", stop)
        with pytest.raises(Interrupted):
            fit(tmp_path / "cut", settings, adapted())
    assert [row["step"] for row in read_metrics(tmp_path / "cut" / "probes.jsonl")] == [0, 1, 2, 4, 6]
    fit(tmp_path / "cut", settings, adapted())
    whole, cut = (
        [
            (row["step"], row["totals"], row["layers"])
            for row in read_metrics(tmp_path / name / "probes.jsonl")
        ]
        for name in ("whole", "cut")
    )
    assert cut == whole


def test_a_training_that_diverges_ends_as_it_would_without_them(tmp_path):
    settings = config(model={"learning_rate": 1e38, "warmup_steps": 0}, probes={"every": 1})
    with pytest.raises(DivergedError, match=r"step \d: the"):
        fit(tmp_path, settings, adapted())
    assert len(read_metrics(tmp_path / "probes.jsonl")) < 5


def fit_as_rank(folder: str) -> None:
    from pathlib import Path

    settings = config(probes={"every": 2})
    fit(Path(folder), settings, adapted(), processes=start_processes())


def test_two_processes_see_what_one_sees(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    fit(tmp_path / "one", config(), adapted())
    on_two_processes(fit_as_rank, str(tmp_path / "two"))
    one, two = (read_metrics(tmp_path / name / "probes.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for first, second in zip(one, two, strict=True):
        for key in ("spectrum/norm_B", "update/cosine_gradient", "variance/forward"):
            if first["totals"].get(key) is not None:
                assert second["totals"][key] == pytest.approx(first["totals"][key], rel=1e-3), key


def test_a_start_that_is_a_step_is_set_beside_the_gradient_at_the_pretrained_weights(tmp_path):
    """Factors of the sample's own gradient: the cosine is exactly the energy that they hold."""
    settings, model = config(model={"max_steps": 1}, probes={"n_examples": 6}), adapted()
    examples = tuple(random_examples(44))
    layers, starts, best = find_layers(model, {}), {}, []
    batch = probe_batch(examples, 6, "sample", 0, 0)

    def start(path, x, delta):
        U, S, Vt = torch.linalg.svd(delta.T @ x, full_matrices=False)
        scaling = layers[path].module.scaling["default"]
        init = init_factors(
            U, S, Vt.T, rank=4, direction="LoRA-One", scale="stable", gamma=128.0, scaling=scaling
        )
        starts[layers[path].name] = AdapterInit(init.A_RI, init.B_OR, shifts_base=False)
        best.append(float((S[:4].square().sum() / S.square().sum()).sqrt()))

    look_at_layers(model, list(layers), batch, start)
    for layer in layers.values():
        layer.module.lora_A["default"].weight.data = starts[layer.name].A_RI.clone()
        layer.module.lora_B["default"].weight.data = starts[layer.name].B_OR.clone()
    fit(tmp_path, settings, model, starts)
    row = read_metrics(tmp_path / "probes.jsonl")[0]
    own = [figures["start/cosine_gradient"] for figures in row["layers"].values()]
    assert sorted(own) == pytest.approx(sorted(best), rel=1e-4)


def test_a_trajectory_of_full_fine_tuning_is_compared_with(tmp_path):
    full = config(peft={"use_peft": False}, probes=dict.fromkeys(ALL, False) | {"snapshots": True})
    name = "model.layers.0.self_attn.q_proj"
    trained = fit(tmp_path / "full", full, small_llama())
    asked = dict.fromkeys(ALL, False) | {"spectrum": True, "reference": str(tmp_path / "full")}
    adapter = fit(tmp_path / "lora", config(probes=asked), adapted())
    assert set(Trajectory(str(tmp_path / "full"), {name: (32, 32)}).steps) == {0, 2, 4, 5}
    rows = read_metrics(tmp_path / "lora" / "probes.jsonl")
    assert [row["totals"]["trajectory/cosine"] is None for row in rows] == [True, *[False] * 3]
    # By hand, from the models that both runs left; two warm-up steps are the first interval.
    before, merged = small_llama(), adapter.merge_and_unload()
    ways = [
        torch.cat([(m.get_submodule(n).weight - before.get_submodule(n).weight).flatten() for n in targets])
        for m in (trained, merged)
        for targets in [linear_layers(before)]
    ]
    expected = float(torch.cosine_similarity(*(way.detach().double() for way in ways), dim=0))
    assert rows[-1]["totals"]["trajectory/cosine"] == pytest.approx(expected, rel=1e-4)
    assert rows[1]["totals"]["trajectory/cosine_since"] == pytest.approx(
        rows[1]["totals"]["trajectory/cosine"], rel=1e-3
    )
    with pytest.raises(
        UserError, match=r"began with other weights than this run \(model\.layers\.1\.mlp\.down_p"
    ):
        fit(tmp_path / "other", config(probes=asked), get_peft_model(small_llama(seed=1), LORA))
    with pytest.raises(UserError, match=r"q_proj is \(32, 32\) there and \(8, 8\) here"):
        Trajectory(str(tmp_path / "full"), {name: (8, 8)})
    with pytest.raises(UserError, match=r"probes\.reference=.*: holds no snapshots from step 0 on"):
        Trajectory(str(tmp_path), {name: (32, 32)})


def test_the_script_finds_the_stable_scale_where_it_is():
    script = load_script("compare_scales")
    ids = np.random.default_rng(0).integers(3, 64, size=(4, 32)).astype(np.int32)
    batch = collate([(Encoded(row, 1), 1 / 124) for row in ids], pad_id=0)
    model = script.random_llama(32, 64)
    found = {
        (row[1], row[2]): [float(cell) for cell in row[3:]]
        for row in script.rows_of("width 32", model, [2, 8, 64], batch, 1, 1e-3)
    }
    assert {rank for _, rank in found} == {"2", "8"}  # 64 is too many for these layers
    shapes = [layer.weight.shape for layer in linear_layers(model).values()]
    backward = math.exp(sum(math.log(out / into) for out, into in shapes) / len(shapes))
    for rank in (2, 8):
        assert found["LoRA-GA, stable", str(rank)][:2] == pytest.approx([1.0, backward], rel=5e-3)
        assert found["LoRA-GA, stable, s = α/r", str(rank)][0] == pytest.approx(1 / rank, rel=5e-3)
        assert found["LoRA", str(rank)][:4] == [0, 0, 0, 0]
        assert min(found["LoRA", str(rank)][4:]) > 0


# ---- as people ask for them


def tree(**sections):
    return {"dataset": {"name": "tiny"}, "model": {"name": "x"}, **sections}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"probes": {"updates": True}}, "unknown config key 'probes.updates' .did you mean 'probes.update'"),
        ({"probes": {"snapshots": True}}, r"probes\.snapshots=true: .*use peft=full_ft"),
        (
            {"probes": {"update": True}, "peft": {"adalora": True}, "init": {"mode": "simple"}},
            "probes: AdaLoRA",
        ),
        (
            {"probes": {"spectrum": True}, "peft": {"use_peft": False}},
            "probes: spectrum look at an adapter's",
        ),
        ({"probes": {"reference": "x"}, "peft": {"dora": True}}, r"probes\.reference: not with DoRA"),
        (
            {"probes": {"curvature": True}, "model": {"name": "x", "quantization": "4bit"}},
            "model.quantization=4bit: cannot be differentiated twice; use probes.curvature=false",
        ),
    ],
)
def test_what_cannot_be_is_one_line(sections, words):
    with pytest.raises(UserError, match=words) as caught:
        parse_tree(tree(**sections))
    assert "\n" not in str(caught.value)


def test_a_run_with_probes_is_the_run_without(cli, tmp_path):
    asked = ("probes=[update,spectrum]", "probes.every=1", "tensorboard=true")
    done = cli("debug=short", "eval.task=null", *asked)
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path / "results")
    rows = read_metrics(folder / "probes.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert (folder / "probes.png").stat().st_size > 10_000
    assert 0 < rows[0]["totals"]["start/cosine_gradient"] <= rows[0]["totals"]["start/best_cosine"]
    other = cli("debug=short", "eval.task=null", f"results_dir={tmp_path}/other")
    assert other.returncode == 0, other.stderr
    plain = only_run(tmp_path / "other")
    assert plain.name == folder.name
    weights = [(f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (plain, folder)]
    assert weights[0] == weights[1]
    assert not (plain / "probes.png").exists()
    again = cli("debug=short", "eval.task=null", *asked, f"results_dir={tmp_path}/other")
    assert "this run was trained without; to train it again with them" in again.stdout
    assert json.loads((plain / "record.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("asked", ["probes=updates", "probes=[update,updates]"])
def test_a_mistyped_probe_is_one_line_with_the_nearest(asked, cli):
    done = cli("debug=short", asked)
    assert done.returncode == 2
    assert "probes=updates: no such choice (did you mean 'update'?)" in done.stderr


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs/probes.md").read_text(), re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_of_the_page(command, cli, tmp_path, monkeypatch, capfd):
    if command[1] == "run_exp.py":
        asked, short = command[2:], ["debug=short", "eval.task=null"]
        if "probes.reference=results/RUN" in asked:
            full = ["peft=full_ft", "probes=update", "probes.snapshots=true"]
            assert cli(*full, *short, f"results_dir={tmp_path}/full").returncode == 0
            asked = [*asked[:-1], f"probes.reference={only_run(tmp_path / 'full')}"]
        else:
            short.append("dry_run=true")  # others run such: here, and in tests/test_readme.py
        done = cli(*asked, *short)
        assert done.returncode == 0, done.stderr
        return
    script = load_script(command[1].removeprefix("scripts/").removesuffix(".py"))
    asked = [argument.replace("results", f"{tmp_path}/results") for argument in command[2:]]
    if script.__name__ == "plot_probes":
        assert cli("debug=short", "eval.task=null", "probes=[update,subspaces]").returncode == 0
    else:
        asked += ["--ranks", "4", "--widths", "64", "--steps", "1"]
    monkeypatch.setattr("sys.argv", ["program", *asked])
    script.main()
    shown = capfd.readouterr().out
    assert "LoRA-One" in shown
    if script.__name__ == "plot_probes":
        assert (tmp_path / "results" / "probes.png").stat().st_size > 10_000
        monkeypatch.setattr("sys.argv", ["program", str(tmp_path / "results"), "--keys", "update/cosine"])
        with pytest.raises(SystemExit):
            script.main()
        assert "no run has it (did you mean 'update/" in capfd.readouterr().err


def test_a_folder_without_probes_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no run with a probes\.jsonl below it; train with probes=all"):
        load_script("plot_probes").read_runs(tmp_path)
