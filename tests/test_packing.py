"""Packed rows that are attended example by example: the same sums as of each example alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_examples, small_llama
from test_data import CAUSAL, small_causal, split_loss
from test_training import adapted_llama, config, curve, fit
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations import sdpa_attention

from lora_one import packing, training
from lora_one.config import ModelConfig
from lora_one.data.batches import Limits
from lora_one.errors import UserError
from lora_one.losses import BY_EXAMPLE
from lora_one.packing import Packing, choose_packing
from lora_one.processes import Processes

PACKED, PADDED = Limits(max_tokens=64, packed=True), Limits(max_examples=1)
ALONE = Processes(0, 1, torch.device("cpu"))
WITH_SDPA = sorted(CAUSAL.keys() - {"bloom", "gemma2"})


def loss_and_gradients(model, limits):
    model.zero_grad()
    loss = split_loss(model, random_examples(9), limits, "sample")
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", WITH_SDPA)  # two of them with windows shorter than the examples
def test_every_example_is_attended_alone(kind, checkpointing, monkeypatch):
    model = small_causal(kind).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():  # checkpointing is for training only, and masks would differ
        for name in ("p", "dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    expected, grads = loss_and_gradients(model, PADDED)
    lengths = []
    real = packing.sdpa_attention_forward
    monkeypatch.setattr(
        packing, "sdpa_attention_forward", lambda *a, **k: lengths.append(a[1].shape[2]) or real(*a, **k)
    )
    with packing.attending(model, Packing.BY_EXAMPLE):
        assert model.config._attn_implementation == BY_EXAMPLE
        found, packed_grads = loss_and_gradients(model, PACKED)
    assert max(lengths) == max(len(example.ids) for example in random_examples(9))
    assert model.config._attn_implementation == "sdpa"
    assert found == pytest.approx(expected, rel=1e-6)
    assert packed_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(packed_grads[name], grad, rtol=1e-4, atol=1e-6)


def test_rows_that_are_not_packed_are_masked_as_before():
    model = small_llama()
    ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = model(input_ids=ids, attention_mask=mask).logits
    with packing.attending(model, Packing.BY_EXAMPLE):
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)


def test_another_attention_is_left_alone():
    model = small_causal("llama", "eager")
    assert chosen(model, {"packing": True}, random_examples(6)) is Packing.BY_MODEL
    with packing.attending(model, Packing.BY_MODEL):
        assert model.config._attn_implementation == "eager"


def long_examples(n):
    return [
        replace(example, ids=np.resize(example.ids, 130 + 3 * k))
        for k, example in enumerate(random_examples(n))
    ]


@pytest.mark.parametrize(
    ("settings", "examples", "expected"),
    [
        ({}, random_examples(6), Packing.NONE),
        ({}, long_examples(6), Packing.BY_EXAMPLE),
        ({"packing": False}, long_examples(6), Packing.NONE),
        ({"packing": True}, random_examples(6), Packing.BY_EXAMPLE),
        ({"compile": True}, long_examples(6), Packing.NONE),
        ({"compile": True, "packing": True}, long_examples(6), Packing.BY_MODEL),
    ],
    ids=["short", "long", "never", "always", "compiled", "compiled-always"],
)
def test_what_is_packed(settings, examples, expected):
    assert chosen(causal_for_long("llama"), settings, examples) is expected


def chosen(model, settings, examples):
    config = ModelConfig.model_validate({"name": "x"} | settings)
    return choose_packing(model, config, examples, 0, ALONE)


def causal_for_long(kind, **special):
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
    settings |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings | special))


# Attention of these is not told of windows or chunks, or the router's loss wants a mask of two dimensions.
EXPERTS = {"num_local_experts": 2, "output_router_logits": True}
NOT_BY_EXAMPLE = {
    "llama4_text": {"attention_chunk_size": 32, "intermediate_size_mlp": 64, "num_local_experts": 2}
    | {"head_dim": 16, "no_rope_layers": [1, 1]},
    "doge": {"sliding_window": 16},
    "mixtral": EXPERTS,
    "jetmoe": EXPERTS | {"kv_channels": 16},
}


@pytest.mark.parametrize("last", ["long", "short"])
@pytest.mark.parametrize("kind", NOT_BY_EXAMPLE)
def test_what_needs_its_own_mask_is_padded_unasked_and_packed_with_masks_where_asked(kind, last):
    model, examples = causal_for_long(kind, **NOT_BY_EXAMPLE[kind]), long_examples(6)
    examples[-1] = examples[-1] if last == "long" else random_examples(1)[0]
    assert chosen(model, {}, examples) is Packing.NONE
    assert chosen(model, {"packing": True}, examples) is Packing.BY_MODEL
    assert model.config._attn_implementation == "sdpa"


def test_a_model_without_masks_of_positions_is_not_packed_compiled():
    """OPT makes no mask of examples from positions."""
    model = causal_for_long("opt", ffn_dim=64, word_embed_proj_dim=32)
    assert chosen(model, {"packing": True}, long_examples(6)) is Packing.BY_EXAMPLE
    with pytest.raises(UserError, match=r"model\.packing=true: opt with sdpa attention does not keep"):
        chosen(model, {"packing": True, "compile": True}, long_examples(6))


def test_parts_with_another_attention_keep_it():
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = settings | {"vocab_size": 64, "num_key_value_heads": 2, "head_dim": 16}
    parts = {"text_config": text, "vision_config": settings | {"image_size": 28, "patch_size": 14}}
    both = {"text_config": "sdpa", "vision_config": "eager"}
    config = AutoConfig.for_model("gemma3", **parts, mm_tokens_per_image=4)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=both)
    before = {name: getattr(model.config, name)._attn_implementation for name in both}
    with packing.attending(model, Packing.BY_EXAMPLE):
        assert model.config.text_config._attn_implementation == BY_EXAMPLE
    assert before == both
    assert {name: getattr(model.config, name)._attn_implementation for name in both} == both


def test_only_exact_sums_are_packed_unasked(monkeypatch):
    """A model whose examples see each other: attention that takes no notice of where one ends."""

    def careless(module, query, key, value, mask, *, packed_lengths=None, **settings):
        return sdpa_attention.sdpa_attention_forward(module, query, key, value, None, **settings)

    packing.AttentionInterface.register(BY_EXAMPLE, careless)
    try:
        model = causal_for_long("llama")
        assert chosen(model, {}, long_examples(6)) is Packing.NONE
        assert chosen(model, {"packing": True}, long_examples(6)) is Packing.BY_MODEL
    finally:
        packing.AttentionInterface.register(BY_EXAMPLE, packing._attend)


def test_a_training_packs_and_gives_the_same_curve(tmp_path, monkeypatch):
    seen = []
    real = training.collate_slots
    monkeypatch.setattr(training, "collate_slots", lambda *a, **k: seen.append(k["packed"]) or real(*a, **k))
    curves = []
    for packed in (False, True):
        folder = tmp_path / str(packed)
        folder.mkdir()
        model, _ = fit(folder, config(packing=packed), adapted_llama())
        assert model.config._attn_implementation == "sdpa"
        curves.append(curve(folder))
    assert set(seen) == {False, True}
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
