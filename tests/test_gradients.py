"""The gradient estimate is the gradient of the training loss over the sample, however it is cut."""

import numpy as np
import pytest
import torch
from conftest import ALONE, on_two_processes, random_examples, small_llama

from lora_one.collect import collect_gradients
from lora_one.config import ExperimentConfig, InitConfig
from lora_one.data.batches import collate_slots, whole_window
from lora_one.errors import UserError
from lora_one.gradients import choose_estimator, estimate_gradient
from lora_one.losses import weighted_loss
from lora_one.models import linear_layers
from lora_one.processes import start_processes
from lora_one.sample import sample_indices

TARGETS = tuple(linear_layers(small_llama()))


def config(reduction: str = "sample", **init) -> ExperimentConfig:
    model = {"name": "x", "loss_reduction": reduction}
    return ExperimentConfig.model_validate({"dataset": {"name": "tiny"}, "model": model, "init": init})


def reference_gradients(model, examples, reduction: str) -> dict[str, torch.Tensor]:
    """Autograd on the loss as one would write it down, one example at a time, in float64."""
    model = model.double()
    losses, counts = [], []
    for example in examples:
        ids = torch.tensor(example.ids, dtype=torch.long)
        logits = model(ids[None]).logits[0, :-1]
        token_losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        target_losses = token_losses[example.n_prompt - 1 :]
        losses.append(target_losses.sum())
        counts.append(len(target_losses))
    if reduction == "sample":
        loss = sum(one / count for one, count in zip(losses, counts, strict=True)) / len(losses)
    else:
        loss = sum(losses) / sum(counts)
    weights = [model.get_submodule(name).weight for name in TARGETS]
    return dict(zip(TARGETS, torch.autograd.grad(loss, weights), strict=True))


def our_gradients(model, examples, reduction: str, batch_size: int) -> dict[str, torch.Tensor]:
    batches = whole_window(examples, range(len(examples)), batch_size=batch_size, reduction=reduction)
    return accumulated(model, TARGETS, examples, batches)


def accumulated(model, targets, examples, batches) -> dict[str, torch.Tensor]:
    with collect_gradients(model, targets) as sums:
        for slots in batches:
            weighted_loss(model, collate_slots(examples, slots, 0)).backward()
    return sums.G_OI


@pytest.mark.parametrize("reduction", ["sample", "token"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_equals_autograd_for_any_batch_size(reduction, batch_size):
    examples = random_examples(16)
    expected = reference_gradients(small_llama(), examples, reduction)
    actual = our_gradients(small_llama(), examples, reduction, batch_size)
    for name in TARGETS:
        error = (actual[name].double() - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, name


def test_the_two_reductions_differ():
    examples = random_examples(16)
    by_sample = our_gradients(small_llama(), examples, "sample", 4)
    by_token = our_gradients(small_llama(), examples, "token", 4)
    assert all((by_sample[name] - by_token[name]).norm() > 0.01 * by_token[name].norm() for name in TARGETS)


def test_touches_nothing_else():
    model = small_llama()
    model.lm_head.weight.requires_grad_(False)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    our_gradients(model, random_examples(4), "sample", 2)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_happens_and_changes_nothing(monkeypatch, reentrant):
    examples, calls = random_examples(4), []
    plain = our_gradients(small_llama(), examples, "sample", 2)
    model = small_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for layer in model.model.layers:
        checkpoint = layer._gradient_checkpointing_func
        monkeypatch.setattr(
            layer, "_gradient_checkpointing_func", lambda *a, f=checkpoint, **k: calls.append(1) or f(*a, **k)
        )
    checkpointed = our_gradients(model, examples, "sample", 2)
    assert len(calls) == 4  # two layers, two batches
    assert all((plain[name] - checkpointed[name]).norm() < 1e-5 * plain[name].norm() for name in TARGETS)


def test_only_the_targets_take_gradients():
    examples = random_examples(4)
    batches = whole_window(examples, range(4), batch_size=4, reduction="sample")
    assert set(accumulated(small_llama(), TARGETS[:1], examples, batches)) == {TARGETS[0]}


def estimate_on_two_processes(path: str) -> None:
    processes = start_processes()
    estimate = estimate_gradient(
        small_llama(),
        TARGETS,
        random_examples(40),
        config(bsz=2, iters=7, estimator="exact"),
        ranks=dict.fromkeys(TARGETS, 8),
        pad_id=0,
        processes=processes,
    )
    if processes.is_main:
        torch.save(products(estimate), path)


def products(estimate) -> dict[str, torch.Tensor]:
    return {name: (t.U_OK * t.S_K) @ t.V_IK.T for name, t in estimate.layers.items()}


def test_two_processes_give_the_estimate_of_one(tmp_path):
    on_two_processes(estimate_on_two_processes, str(tmp_path / "two.pt"))
    two = torch.load(tmp_path / "two.pt")
    settings = {"ranks": dict.fromkeys(TARGETS, 8), "pad_id": 0, "processes": ALONE}
    one = products(
        estimate_gradient(
            small_llama(), TARGETS, random_examples(40), config(bsz=2, iters=7, estimator="exact"), **settings
        )
    )
    for name in TARGETS:
        assert (two[name] - one[name]).norm() < 1e-5 * one[name].norm()


def test_sample_is_random_and_seeded():
    eight = InitConfig(bsz=2, iters=4)
    assert len(set(sample_indices(100, eight, seed=0))) == 8
    assert sample_indices(100, eight, seed=0) == sample_indices(100, eight, seed=0)
    assert sample_indices(100, eight, seed=0) != sample_indices(100, eight, seed=1)
    assert sample_indices(100, eight, seed=0) != list(range(8))
    for epoch in range(3):  # not the first examples of any training epoch either
        order = np.random.default_rng([0, epoch]).permutation(100)[:8].tolist()
        assert sample_indices(100, eight, seed=0) != order
    assert len(sample_indices(100, InitConfig(do_subsampling=True, sub_size=50), seed=0)) == 50
    assert sorted(sample_indices(100, InitConfig(do_subsampling=False), seed=0)) == list(range(100))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bsz": 11, "iters": 10}, "bsz\\*init.iters=110"),
        ({"do_subsampling": True, "sub_size": 101}, "sub_size=101"),
    ],
)
def test_sample_larger_than_the_data(settings, words):
    with pytest.raises(UserError, match=words + ".*only 100 examples"):
        sample_indices(100, InitConfig(**settings), seed=0)


def test_the_whole_split_announces_its_time(capsys):
    settings = {"ranks": dict.fromkeys(TARGETS, 4), "pad_id": 0, "processes": ALONE}
    estimate = estimate_gradient(
        small_llama(), TARGETS, random_examples(12), config(do_subsampling=False), **settings
    )
    assert estimate.n_examples == 12
    assert "12 examples, expected" in capsys.readouterr().out


ESTIMATORS = ["exact", "sketch", "sketch_two_pass"]


def estimated(model, estimator: str, examples=None, targets=TARGETS, processes=ALONE, **init):
    settings = {"estimator": estimator, "n_triplets": 64, "bsz": 4, "iters": 10} | init
    return estimate_gradient(
        model,
        targets,
        examples or random_examples(40),
        config(**settings),
        ranks=dict.fromkeys(targets, 8),
        pad_id=0,
        processes=processes,
    )


@pytest.mark.parametrize("estimator", ["exact", "sketch_two_pass"])
@pytest.mark.parametrize("bsz", [1, 4, 40])
def test_the_whole_estimate_is_the_mean_in_float64(estimator, bsz):
    """All triplets are kept here, and the two-pass sketch is as wide as the layers.

    It loses directions a few thousand times weaker than the leading one.
    """
    examples = random_examples(40)
    expected = reference_gradients(small_llama(), examples, "sample")
    found = products(estimated(small_llama(), estimator, examples, bsz=bsz, iters=40 // bsz))
    for name in TARGETS:
        limit = (1e-5 if estimator == "exact" else 1e-4) * expected[name].norm()
        assert (found[name].double() - expected[name]).norm() < limit, name


def overflowing(model):
    """Loses its head over token 63."""
    with torch.no_grad():
        model.model.embed_tokens.weight[63] = float("inf")
    return model


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_loss_that_is_not_finite_names_the_batch_and_its_examples(estimator):
    examples = [example for example in random_examples(200) if 63 not in example.ids][:40]
    indices = sample_indices(40, InitConfig(bsz=4, iters=10), seed=0)
    bad = indices[9]  # in the third batch
    examples[bad].ids[0] = 63
    where = ", ".join(str(index) for index in indices[8:12])
    with pytest.raises(
        UserError, match=rf"gradient batch 3 of 10: its loss is nan; .*examples {where} of the encoded"
    ):
        estimated(overflowing(small_llama()), estimator, examples)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("when", [1, 4])
def test_a_gradient_that_is_not_finite_names_the_batch(estimator, when):
    model, calls = small_llama(), [0]

    def spoil(_, __, output):
        calls[0] += 1
        if calls[0] == when:
            output.register_hook(lambda gradient: gradient * float("inf"))

    model.model.layers[0].mlp.up_proj.register_forward_hook(spoil)
    with pytest.raises(UserError, match=rf"gradient batch {when} of 10: its gradient is not finite"):
        estimated(model, estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_target_that_takes_no_part_is_named(estimator):
    model = small_llama()
    model.spare = torch.nn.Linear(32, 32)
    with pytest.raises(UserError, match=r"^spare: (its gradient is zero|no gradient reached it)"):
        estimated(model, estimator, targets=(*TARGETS, "spare"))


def with_dropout():
    model = small_llama()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return model


def dropout_as_rank(path: str) -> None:
    processes = start_processes()
    found = estimated(with_dropout(), "exact", processes=processes, dropout=True)
    if processes.is_main:
        torch.save(products(found), path)


def test_dropout_is_off_unless_asked_for_and_drawn_the_same_in_every_pass(tmp_path):
    off, plain = products(estimated(with_dropout(), "exact")), products(estimated(small_llama(), "exact"))
    assert all(torch.equal(off[name], plain[name]) for name in TARGETS)
    state = torch.random.get_rng_state()
    model = with_dropout().eval()
    on = products(estimated(model, "exact", dropout=True))
    assert not model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all((on[name] - off[name]).norm() > 0.05 * off[name].norm() for name in TARGETS)
    twice = products(estimated(with_dropout(), "sketch_two_pass", dropout=True))
    on_two_processes(dropout_as_rank, str(tmp_path / "two.pt"))
    two = torch.load(tmp_path / "two.pt")
    for found in (twice, two):
        assert all((found[name] - on[name]).norm() < 1e-4 * on[name].norm() for name in TARGETS)


def test_auto_takes_what_loses_nothing():
    def choice(model, targets, n_examples, **init):
        ranks = dict.fromkeys(targets, 8)
        return choose_estimator(config(**init), model, targets, ranks, n_examples).name

    model = small_llama()
    assert choice(model, TARGETS, 64) == "sketch"
    assert choice(model, TARGETS, 63) == "sketch_two_pass"
    assert choice(model, TARGETS, 64, objective="sign") == "exact"
    assert choice(model, TARGETS, 64, estimator="exact") == "exact"
    model.lm_head.weight = model.model.embed_tokens.weight
    assert choice(model, TARGETS, 64) == "sketch"
    assert choice(model, ("lm_head",), 64) == "exact"
    with pytest.raises(UserError, match=r"init\.n_triplets=4: the adapters' ranks need 8"):
        choice(model, TARGETS, 64, n_triplets=4)


def test_the_progress_bar_counts_the_tokens_of_all(capsys):
    examples = random_examples(40)
    estimated(small_llama(), "exact", examples)
    n_tokens = sum(len(example.ids) for example in examples)
    assert f"{n_tokens}/{n_tokens}" in capsys.readouterr().err


@pytest.mark.parametrize("estimator", ["exact", "sketch_two_pass"])
def test_small_gradients_survive_float16(estimator):
    """Float16's smallest number is 6e-8: unscaled, most of these would be zero."""
    examples = random_examples(16)
    starts = []
    for dtype, fp16 in ((torch.float32, False), (torch.float16, True)):
        settings = ExperimentConfig.model_validate(
            {
                "dataset": {"name": "tiny"},
                "model": {"name": "x", "fp16": fp16},
                "init": {"bsz": 4, "iters": 4, "estimator": estimator},
            }
        )
        model = small_llama(dtype=dtype)
        with torch.no_grad():
            model.lm_head.weight.mul_(1e-2)  # gradients shrink with it
        estimate = estimate_gradient(
            model, TARGETS, examples, settings, ranks=dict.fromkeys(TARGETS, 4), pad_id=0, processes=ALONE
        )
        starts.append(estimate.layers)
    for name in TARGETS:
        exact, half = (layers[name] for layers in starts)
        assert half.norm == pytest.approx(exact.norm, rel=2e-2)
        assert torch.allclose(half.S_K[:2], exact.S_K[:2], rtol=2e-2)
        assert (half.U_OK[:, 0] @ exact.U_OK[:, 0]).abs() > 0.99
