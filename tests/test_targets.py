"""Which layers ``peft=qv`` means, on a small random model of every architecture of the table."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lora_one.config import PeftConfig
from lora_one.errors import UserError
from lora_one.models import linear_layers, target_names
from lora_one.targets import QV_LAYERS

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0},
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
# Sizes of the architectures that do not understand those names.
OWN_SIZES = {
    **{"t5": T5, "mt5": T5, "umt5": T5},
    "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global"], 2]]},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
}
# Encoder, decoder, and from one to the other; two blocks each.
N_ATTENTIONS = dict.fromkeys(("bart", "t5", "mt5", "umt5"), 6)


def small_model(kind: str):
    config = AutoConfig.for_model(kind, **OWN_SIZES.get(kind, SIZES))
    with torch.device("meta"):
        return (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(
            config
        )


@pytest.mark.parametrize("kind", QV_LAYERS)
def test_qv_is_found_in_every_block(kind):
    model = small_model(kind)
    names = target_names(model, PeftConfig(lora_target_modules="qv"))
    assert {name.rsplit(".", 1)[-1] for name in names} == set(QV_LAYERS[kind])
    assert len(names) == N_ATTENTIONS.get(kind, 2) * len(QV_LAYERS[kind])
    assert set(names) <= set(linear_layers(model))
    spelled = target_names(model, PeftConfig(lora_target_modules=list(QV_LAYERS[kind])))
    assert names == spelled


def test_published_meanings():
    assert QV_LAYERS["llama"] == ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    assert QV_LAYERS["t5"] == ("q", "v")


def test_an_unknown_architecture_is_told_its_layers():
    with pytest.raises(UserError) as caught:
        target_names(small_model("mpt"), PeftConfig(lora_target_modules="qv"))
    assert str(caught.value) == (
        "peft.lora_target_modules=qv: not known for the architecture mpt; "
        "give a list of its linear layers: Wqkv, down_proj, out_proj, up_proj"
    )
