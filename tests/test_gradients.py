"""The gradient estimate is the gradient of the training loss over the sample, however it is cut."""

import numpy as np
import pytest
import torch
from conftest import ALONE, on_two_processes, random_examples, small_llama

from lora_one.collect import collect_gradients
from lora_one.config import ExperimentConfig, InitConfig
from lora_one.data.batches import whole_window
from lora_one.errors import UserError
from lora_one.gradients import estimate_gradient
from lora_one.losses import weighted_loss
from lora_one.models import linear_layers
from lora_one.processes import start_processes
from lora_one.sample import collate_slots, sample_indices

TARGETS = tuple(linear_layers(small_llama()))


def config(reduction: str = "sample", **init) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {"dataset": {"name": "tiny"}, "model": {"name": "x", "loss_reduction": reduction}, "init": init}
    )


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
    batches = whole_window(
        examples, range(len(examples)), batch_size=batch_size, reduction=reduction, pad_id=0
    )
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


def test_gradient_checkpointing_happens_and_changes_nothing(monkeypatch):
    examples, calls = random_examples(4), []
    plain = our_gradients(small_llama(), examples, "sample", 2)
    model = small_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.model.layers:
        checkpoint = layer._gradient_checkpointing_func
        monkeypatch.setattr(
            layer, "_gradient_checkpointing_func", lambda *a, f=checkpoint, **k: calls.append(1) or f(*a, **k)
        )
    checkpointed = our_gradients(model, examples, "sample", 2)
    assert len(calls) == 4  # two layers, two batches
    assert all(torch.allclose(plain[name], checkpointed[name], rtol=1e-4, atol=1e-7) for name in TARGETS)


def test_only_the_targets_take_gradients():
    examples = random_examples(4)
    batches = whole_window(examples, range(4), batch_size=4, reduction="sample", pad_id=0)
    assert set(accumulated(small_llama(), TARGETS[:1], examples, batches)) == {TARGETS[0]}


def estimate_on_two_processes(path: str) -> None:
    processes = start_processes()
    estimate = estimate_gradient(
        small_llama(),
        TARGETS,
        random_examples(40),
        config(bsz=2, iters=7),
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
        estimate_gradient(small_llama(), TARGETS, random_examples(40), config(bsz=2, iters=7), **settings)
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
