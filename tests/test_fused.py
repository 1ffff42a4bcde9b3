"""Fused LoRA layers compute what PEFT's do."""

import copy

import pytest
import torch
from conftest import random_examples, small_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, OlmoConfig, OlmoForCausalLM

from lora_one.adapters import lora_layers
from lora_one.data.batches import collate
from lora_one.fused import fused_adapters
from lora_one.losses import weighted_loss


def adapted(model=None, **settings):
    torch.manual_seed(0)
    model = get_peft_model(
        model or small_llama(),
        LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=False, **settings),
    )
    return model.train()


def batch():
    return collate([(example, 0.2) for example in random_examples(5)], 0)


def loss_and_gradients(model, dtype: torch.dtype | None = None):
    model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = weighted_loss(model, batch())
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def n_layers(model) -> int:
    return len(lora_layers(model))


def worst(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    return max(((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_peft(checkpointing):
    model = adapted()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected_loss, expected = loss_and_gradients(model)
    with fused_adapters(model) as n:
        loss, found = loss_and_gradients(model)
    assert n == n_layers(model)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert worst(found, expected) < 1e-5
    assert loss_and_gradients(model)[0] == expected_loss
    assert not any("forward" in vars(layer) for layer in lora_layers(model).values())


def test_gradients_are_right_to_float64():
    layer = adapted(nn.Sequential(nn.Linear(6, 5))).double()
    inner = next(iter(lora_layers(layer).values()))
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    with fused_adapters(layer):
        assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *inner.lora_A.parameters()))
        A, B = inner.lora_A["default"].weight, inner.lora_B["default"].weight
        y = layer(x)
        dx, dA, dB = torch.autograd.grad(y.sin().sum(), (x, A, B))
    y_ref = x @ inner.base_layer.weight.T + inner.base_layer.bias + 3 * x @ A.T @ B.T
    assert torch.allclose(y, y_ref)
    for found, expected in zip((dx, dA, dB), torch.autograd.grad(y_ref.sin().sum(), (x, A, B)), strict=True):
        assert torch.allclose(found, expected)


def test_under_autocast_in_bfloat16():
    model = adapted(small_llama().to(torch.bfloat16))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    exact = copy.deepcopy(model).float()
    _, truth = loss_and_gradients(exact)
    _, peft = loss_and_gradients(model, torch.bfloat16)
    with fused_adapters(model) as n:
        _, found = loss_and_gradients(model, torch.bfloat16)
        # In bfloat16 alone, PEFT adds in float32: such a call stays PEFT's.
        loss_and_gradients(model)
    assert n == n_layers(model)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert worst(found, truth) < 1.2 * worst(peft, truth)


@pytest.mark.parametrize("kind", ["dropout", "dora", "conv1d", "hook", "trained weight"])
def test_other_layers_stay_as_they_are(kind):
    gpt2 = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model = {
        "dropout": lambda: adapted(lora_dropout=0.5),
        "dora": lambda: adapted(use_dora=True),
        "conv1d": lambda: adapted(GPT2LMHeadModel(gpt2), fan_in_fan_out=True),
    }.get(kind, adapted)()
    for layer in lora_layers(model).values():
        if kind == "hook":
            layer.base_layer.register_forward_hook(lambda *_: None)
        if kind == "trained weight":
            layer.base_layer.weight.requires_grad_(True)
    with fused_adapters(model) as n:
        assert n == 0


def test_a_trained_bias_is_trained():
    model = small_llama()
    layer = model.model.layers[0].self_attn
    layer.q_proj = nn.Linear(layer.q_proj.in_features, layer.q_proj.out_features)
    model = adapted(model, bias="lora_only")
    _, expected = loss_and_gradients(model)
    with fused_adapters(model) as n:
        _, found = loss_and_gradients(model)
    assert n == n_layers(model) - 1
    assert any(name.endswith("q_proj.base_layer.bias") for name in expected)
    assert worst(found, expected) < 1e-5


def test_outputs_may_be_changed_in_place():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = adapted(OlmoForCausalLM(OlmoConfig(vocab_size=64, clip_qkv=8.0, pad_token_id=0, **sizes)))
    _, expected = loss_and_gradients(model)
    with fused_adapters(model) as n:
        _, found = loss_and_gradients(model)
    assert n == n_layers(model)
    assert worst(found, expected) < 1e-5


def test_one_vector_is_left_to_peft():
    layer = adapted(nn.Sequential(nn.Linear(6, 5)))
    x = torch.randn(6)
    expected = layer(x)
    with fused_adapters(layer):
        assert torch.equal(layer(x), expected)


def test_a_disabled_adapter_stays_disabled():
    model = adapted()
    with model.disable_adapter():
        expected = loss_alone(model)
    with fused_adapters(model), model.disable_adapter():
        assert loss_alone(model) == expected


def loss_alone(model) -> float:
    with torch.no_grad():
        return weighted_loss(model, batch()).item()
