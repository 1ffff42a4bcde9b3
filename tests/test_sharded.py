"""Gradients of models that are spread over processes or places: FSDP2, a device map with offloading."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from conftest import ALONE, on_two_processes, only_run, random_examples, small_llama
from test_layers import build, config_of, loss_of
from test_library import start_of
from test_streaming import config, kept, products
from test_training import adapted_llama, curve, fit
from test_training import config as training_config
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lora_one import get_peft_model, preprocess_loraga
from lora_one.data.batches import Limits, WindowLoader, WindowSampler
from lora_one.errors import UserError
from lora_one.fused import fused_adapters
from lora_one.gradients import estimate_gradient
from lora_one.losses import weighted_loss
from lora_one.models import linear_layers
from lora_one.processes import start_processes

ESTIMATORS = ["exact", "sketch", "sketch_two_pass"]
EXAMPLES = random_examples(42)


def estimate(model, estimator: str, processes=ALONE, **init):
    targets = tuple(linear_layers(model))
    return estimate_gradient(
        model,
        targets,
        EXAMPLES,
        config(estimator, n_triplets=24, **init),  # so that the sketches are as wide as the layers
        ranks=dict.fromkeys(targets, 4),
        pad_id=0,
        processes=processes,
    )


def sharded_as_rank(path: str, estimator: str, checkpointing: bool) -> None:
    processes = start_processes()
    model = small_llama()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    # Three batches of 14: the second process gets an empty one.
    found = estimate(model, estimator, processes, bsz=14, iters=3)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    if processes.is_main:
        torch.save((products(found), found.layers, found.loss), path)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_fsdp2_on_two_processes_gives_the_exact_gradient_of_one(estimator, checkpointing, tmp_path):
    on_two_processes(sharded_as_rank, str(tmp_path / "sharded.pt"), estimator, checkpointing)
    found, layers, loss = torch.load(tmp_path / "sharded.pt", weights_only=False)
    exact = estimate(small_llama(), "exact", bsz=14, iters=3)
    assert loss == pytest.approx(exact.loss, rel=1e-5)
    for name, product in products(exact).items():
        # The sketches are as wide as these layers.
        assert (found[name] - product).norm() < (1e-5 if estimator == "exact" else 1e-3) * product.norm()
        assert kept(layers[name], exact.layers[name]) > 0.999


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_model_dispatched_by_a_device_map_with_an_offloaded_layer(estimator, tmp_path):
    model = small_llama()
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    found, exact = products(estimate(model, estimator)), products(estimate(small_llama(), "exact"))
    for name, product in exact.items():
        assert (found[name] - product).norm() < (1e-5 if estimator == "exact" else 1e-3) * product.norm()


def library_as_rank(path: str, cache: str, direction: str, estimator: str) -> None:
    processes = start_processes()
    model, config = build("linear"), config_of("linear", direction)
    (config.lora_one_config or config.lora_ga_config).estimator = estimator
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    preprocess_loraga(model, config, lambda: loss_of(model).backward(), cache_file=cache)
    adapted = get_peft_model(build("linear"), config)  # before it is sharded itself
    if processes.is_main:
        torch.save(start_of(adapted), path)


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
@pytest.mark.parametrize("direction", ["LoRA-One", "ArB2r"])
def test_the_library_prepares_on_a_sharded_model(direction, estimator, tmp_path):
    path, cache = tmp_path / "start.pt", tmp_path / "gradients.safetensors"
    on_two_processes(library_as_rank, str(path), str(cache), direction, estimator)
    model, config = build("linear"), config_of("linear", direction)
    preprocess_loraga(model, config, lambda: loss_of(model).backward())
    expected, found = start_of(get_peft_model(model, config)), torch.load(path)
    for name, start in expected.items():
        # One pass is approximate here: the spectrum of random weights is flat.
        assert (found[name] - start).norm() < (1e-3 if estimator == "exact" else 0.1) * start.norm(), name
    again = config_of("linear", direction)
    (again.lora_one_config or again.lora_ga_config).estimator = estimator
    preprocess_loraga(build("linear"), again, None, cache_file=str(cache))  # whole weights, the same model


def test_a_device_map_changes_nothing_on_one_device_and_is_refused_for_several_processes(
    cli, tmp_path, monkeypatch
):
    losses = []
    for name, extra in (("plain", []), ("mapped", ["model.device_map=auto"])):
        done = cli("debug=short", f"results_dir={tmp_path}/{name}", *extra)
        assert done.returncode == 0, done.stderr
        losses.append(json.loads((only_run(tmp_path / name) / "record.json").read_text())["metrics"])
    assert losses[0]["validation_loss"] == losses[1]["validation_loss"]
    monkeypatch.setattr("run_exp.start_processes", lambda: replace(ALONE, world_size=2))
    done = cli("debug=short", "model.device_map=auto")
    assert done.returncode == 2
    assert "model.device_map=auto: spreads the model over all GPUs of one process" in done.stderr


def shared_as_rank(path: str) -> None:
    processes = start_processes()
    model, config = build("shared_pair"), config_of("shared_pair", "LoRA-One")
    fully_shard(model)
    preprocess_loraga(model, config, lambda: loss_of(model).backward())
    adapted = get_peft_model(build("shared_pair"), config)
    tied = fully_shard(build("tied_head"))
    with pytest.raises(UserError, match=r"lm_head: shares its weight with model\.embed_tokens"):
        preprocess_loraga(tied, config_of("tied_head", "LoRA-One"), lambda: loss_of(tied).backward())
    if processes.is_main:
        torch.save(start_of(adapted), path)


def test_layers_that_share_one_sharded_weight_get_its_whole_gradient(tmp_path):
    on_two_processes(shared_as_rank, str(tmp_path / "start.pt"))
    model, config = build("shared_pair"), config_of("shared_pair", "LoRA-One")
    preprocess_loraga(model, config, lambda: loss_of(model).backward())
    expected, found = start_of(get_peft_model(model, config)), torch.load(tmp_path / "start.pt")
    for name, start in expected.items():
        assert (found[name] - start).norm() < 1e-3 * start.norm(), name


def trained_as_rank(path: str, fused: bool) -> None:
    """A loop of one's own over our windows and our loss: what Accelerate does with FSDP needs GPUs."""
    processes, model = start_processes(), adapted_llama().train()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    with pytest.raises(UserError, match="sharded"):
        fit(Path(path).parent, training_config(), model=model, processes=processes)
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0)
    settings = {"real_batch_size": 8, "limits": Limits(max_examples=2), "reduction": "sample", "seed": 0}
    place = {"rank": processes.rank, "world_size": processes.world_size}
    losses = []
    with fused_adapters(model) if fused else nullcontext(14) as n_layers:
        assert n_layers == 14
        for window in WindowLoader(WindowSampler(random_examples(44), **settings, **place), pad_id=0):
            total = torch.zeros(())
            for batch in window:
                loss = weighted_loss(model, batch)
                total += loss.detach()
                (loss * processes.world_size).backward()  # FSDP means over processes; the weights want sums
            optimizer.step()
            optimizer.zero_grad()
            losses.append(processes.sum_(total).item())
    if processes.is_main:
        torch.save(losses, path)


@pytest.mark.parametrize("fused", [False, True])
def test_training_sharded_layer_by_layer_gives_the_curve_of_one_process(fused, tmp_path):
    on_two_processes(trained_as_rank, str(tmp_path / "losses.pt"), fused)
    (tmp_path / "one").mkdir()
    model = {"epochs": 1, "warmup_steps": 0, "lr_scheduler": "constant", "max_grad_norm": float("inf")}
    fit(tmp_path / "one", training_config(**model, weight_decay=0.0, per_device_batch_size=3))
    expected = curve(tmp_path / "one", "loss")
    assert len(expected) == 6
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)
    assert torch.load(tmp_path / "losses.pt") == pytest.approx(expected, rel=1e-4)
