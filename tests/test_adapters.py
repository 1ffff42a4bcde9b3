"""Starts and exports: what the promise is, seen through stock PEFT and stock transformers."""

import json

import pytest
import torch
from conftest import small_llama
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_one import adapters, portable
from lora_one.config import ModelConfig, PeftConfig
from lora_one.errors import UserError
from lora_one.layers import shape_OI
from lora_one.models import LoadedModel, adapter_alphas, adapter_ranks, linear_layers
from lora_one.starts import GradientStart, gradient_starts, reduce_gradient

RANK = 4
SETTINGS = PeftConfig(lora_r=RANK, lora_alpha=16, use_rslora=True)
INPUT = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(5))


def loaded(tokenizer=None, dtype=torch.float32, source="") -> LoadedModel:
    model = small_llama(dtype=dtype)
    return LoadedModel(model, tokenizer, source, "", tuple(linear_layers(model)))


def adapted(base: LoadedModel | None = None, seed: int = 0, **settings) -> PeftModel:
    """A model with adapters that change nothing yet."""
    base = base or loaded()
    config = SETTINGS.model_copy(update=settings)
    ranks, alphas = adapter_ranks(base.model, base.targets, config), adapter_alphas(base.targets, config)
    peft_config = adapters.lora_config(base.targets, config, ranks, alphas, task_type="CAUSAL_LM")
    return adapters.add_adapter(base.model, peft_config, seed)


def started(direction: str, base: LoadedModel | None = None, scale: str = "stable", **settings):
    """A model with adapters started from random gradients, and those starts as stored."""
    base = base or loaded()
    shapes = {name: shape_OI(base.model.get_submodule(name)) for name in base.targets}
    model = adapted(base, **settings)
    if direction == "default":
        return model, {}, None
    generator = torch.Generator().manual_seed(1)
    start = GradientStart(direction, scale, gamma=16.0)
    gradients = {name: torch.randn(shape, generator=generator) * 1e-3 for name, shape in shapes.items()}
    config = model.peft_config["default"]
    ranks = {name: config.rank_pattern.get(f"^{name}", config.r) for name in shapes}
    inits = gradient_starts(
        {name: reduce_gradient(name, G, start, ranks[name], generator) for name, G in gradients.items()},
        start,
        ranks=ranks,
        scalings=adapters.scalings(model),
        read_weight=adapters.weight_reader(model),
    )
    report = adapters.apply_init(model, inits, probe=lambda: logits(model))
    return model, adapters.stored_init(model, inits), report


def train_a_little(model: PeftModel) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(INPUT).logits


@pytest.mark.parametrize("direction", ["LoRA-GA", "A2rBr", "ArBr", "random"])
def test_base_plus_adapter_is_the_pretrained_weight(direction):
    model, _, report = started(direction)
    pretrained = linear_layers(small_llama())
    for name, layer in adapters.lora_layers(model).items():
        weight = pretrained[name.removeprefix("base_model.model.")].weight.detach()
        shifted = layer.get_base_layer().weight.detach()
        assert relative_difference(shifted + adapters._product(layer).detach(), weight) < 1e-6
        assert relative_difference(shifted, weight) > 0.05
    assert report.shift == "weight"
    assert report.logit_drift < 1e-5


def test_lora_one_leaves_the_base_alone_and_moves_the_function():
    model, _, report = started("LoRA-One")
    pretrained = linear_layers(small_llama())
    for name, layer in adapters.lora_layers(model).items():
        assert torch.equal(
            layer.get_base_layer().weight, pretrained[name.removeprefix("base_model.model.")].weight
        )
    assert report.shift is None
    assert report.logit_drift > 1e-3


def test_bf16_shift_costs_no_more_than_rounding_the_shifted_weight():
    model, _, _ = started("LoRA-GA", loaded(dtype=torch.bfloat16))
    exact, rounded = linear_layers(small_llama()), linear_layers(small_llama(dtype=torch.bfloat16))
    for name, layer in adapters.lora_layers(model).items():
        plain = name.removeprefix("base_model.model.")
        weight, product = rounded[plain].weight.detach().float(), adapters._product(layer).detach()
        restored = layer.get_base_layer().weight.detach().float() + product
        rounding = relative_difference(weight, exact[plain].weight.detach())
        bound = 1.2 * rounding * (1 + (product.norm() / weight.norm()) ** 2) ** 0.5
        assert relative_difference(restored, weight) < bound
    assert next(iter(adapters.lora_layers(model).values())).lora_A["default"].weight.dtype == torch.float32


@pytest.mark.parametrize("direction", ["default", "LoRA-One", "LoRA-GA", "A2rBr", "ArBr", "random"])
def test_export_loads_with_stock_peft_on_the_untouched_base(direction, tmp_path):
    model, inits, _ = started(direction)
    train_a_little(model)
    portable.export_adapter(model, inits, tmp_path / "adapter")
    fresh = PeftModel.from_pretrained(small_llama(), str(tmp_path / "adapter"))
    assert relative_difference(logits(fresh), logits(model)) < 1e-4
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    shifts = direction not in {"default", "LoRA-One"}
    assert config["r"] == (2 * RANK if shifts else RANK)
    assert config["init_lora_weights"] is True


def test_export_of_an_untrained_lora_ga_is_no_change_at_all(tmp_path):
    model, inits, _ = started("LoRA-GA")
    portable.export_adapter(model, inits, tmp_path / "adapter")
    fresh = PeftModel.from_pretrained(small_llama(), str(tmp_path / "adapter"))
    assert relative_difference(logits(fresh), logits(small_llama())) < 1e-5


@pytest.mark.parametrize("direction", ["default", "LoRA-One", "LoRA-GA"])
def test_merged_folder_is_the_adapted_model(direction, tmp_path, tokenizer):
    small_llama().save_pretrained(tmp_path / "base")
    base = loaded(tokenizer, source=str(tmp_path / "base"))
    model, inits, _ = started(direction, base=base)
    train_a_little(model)
    portable.export_adapter(model, inits, tmp_path / "adapter")
    config = ModelConfig(name=str(tmp_path / "base"))
    portable.merge_adapter(base, config, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_difference(logits(merged), logits(model)) < 1e-4
    assert not list(tmp_path.glob("*.partial"))


def test_stored_start_survives_the_disk(tmp_path):
    _, inits, _ = started("LoRA-GA")
    portable.save_init(inits, tmp_path / "init.safetensors")
    again = portable.load_init(tmp_path / "init.safetensors")
    assert again.keys() == inits.keys()
    for name, init in inits.items():
        assert torch.equal(again[name].A_RI, init.A_RI)
        assert torch.equal(again[name].B_OR, init.B_OR)
        assert again[name].shifts_base


def test_damaged_start_is_named(tmp_path):
    (tmp_path / "init.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(UserError, match=r"init\.safetensors: damaged"):
        portable.load_init(tmp_path / "init.safetensors")


def test_plain_start_is_seeded_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    first = adapted(seed=3).state_dict()
    second = adapted(seed=3).state_dict()
    other = adapted(seed=4).state_dict()
    keys = [key for key in first if "lora_A" in key]
    assert all(torch.equal(first[key], second[key]) for key in keys)
    assert not any(torch.equal(first[key], other[key]) for key in keys)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    small = loaded()
    torch.set_rng_state(before)
    adapted(small, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)


def test_a_failed_export_leaves_nothing_half_written(tmp_path, monkeypatch):
    model, inits, _ = started("LoRA-One")
    monkeypatch.setattr(
        portable, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space"))
    )
    with pytest.raises(OSError, match="No space"):
        portable.export_adapter(model, inits, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_rank_2r_factors_hold_the_trained_and_the_first_ones(tmp_path):
    model, inits, _ = started("LoRA-GA")
    train_a_little(model)
    portable.export_adapter(model, inits, tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = next(iter(inits))
    A_KI = state[f"base_model.model.{name}.lora_A.weight"]
    assert torch.equal(A_KI[RANK:], -inits[name].A_RI)
    assert not torch.equal(A_KI[:RANK], inits[name].A_RI)
