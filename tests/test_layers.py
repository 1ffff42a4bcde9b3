"""Every layer kind that people target: its gradient, its start, and the adapter that travels."""

import copy

import numpy as np
import pytest
import torch
from conftest import EMBEDDED, small_llama
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from lora_one import LoraConfig, LoraGAConfig, LoraOneConfig, get_peft_model, preprocess_loraga
from lora_one.collect import collect_gradients
from lora_one.errors import UserError
from lora_one.layers import (
    quantisation,
    read_weight,
    separate_weights,
    settle,
    shape_OI,
    to_OI,
    weight_norm,
    write_weight,
)

RANK = 4
IDS = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(5))
DIRECTIONS = ["LoRA-One", "ArB2r", "A2rBr", "ArBr", "random"]


class SharedPair(LlamaForCausalLM):
    """Two layers with one weight: the q projections of both blocks."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        first, second = (layer.self_attn for layer in self.model.layers)
        second.q_proj.weight = first.q_proj.weight


def llama_config(**settings) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **settings,
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
        )
    )


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        d_kv=8,
        decoder_start_token_id=0,
        dropout_rate=0.1,
    )
    return T5ForConditionalGeneration(config)


KINDS = {
    "linear": (lambda: LlamaForCausalLM(llama_config()), ["q_proj", "down_proj"]),
    "conv1d": (gpt2, ["c_attn", "mlp.c_fc", "c_proj"]),
    "t5": (t5, ["q", "v", "wi", "wo"]),
    "tied_head": (lambda: LlamaForCausalLM(llama_config(tie_word_embeddings=True)), ["lm_head", "v_proj"]),
    "shared_pair": (lambda: SharedPair(llama_config()), ["q_proj"]),
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind][0]().eval()


def targets_of(model: nn.Module, kind: str) -> list[str]:
    ends = KINDS[kind][1]
    return [
        name
        for name, module in model.named_modules()
        if hasattr(module, "weight") and any(name == end or name.endswith("." + end) for end in ends)
    ]


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def config_of(kind: str, direction: str, **settings) -> LoraConfig:
    if direction == "LoRA-One":
        settings |= {"init_lora_weights": "lora_one", "lora_one_config": LoraOneConfig(stable_gamma=16)}
    else:
        shift = settings.pop("shift", "auto")
        settings |= {
            "init_lora_weights": "lora_ga",
            "lora_ga_config": LoraGAConfig(direction=direction, shift=shift),
        }
    return LoraConfig(r=RANK, lora_alpha=16, use_rslora=True, target_modules=KINDS[kind][1], **settings)


def adapted(model: nn.Module, config: LoraConfig):
    preprocess_loraga(model, config, lambda: loss_of(model).backward())
    return get_peft_model(model, config)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS, labels=IDS).logits.float()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def train_a_little(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_autograds_own(kind):
    model, reference = build(kind), build(kind).double()
    names = targets_of(model, kind)
    with collect_gradients(model, names) as sums:
        loss_of(model).backward()
    weights = [reference.get_submodule(name).weight for name in names]
    expected = torch.autograd.grad(loss_of(reference), weights)
    for name, gradient in zip(names, expected, strict=True):
        G_OI = to_OI(reference.get_submodule(name), gradient)
        assert sums.G_OI[name].shape == shape_OI(model.get_submodule(name))
        assert relative(sums.G_OI[name], G_OI) < 1e-5, name
    assert sums.n_calls == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_start_keeps_the_function_or_is_one_gradient_step(kind, direction):
    base = build(kind)
    pretrained, before = copy.deepcopy(base), logits(base)
    model = adapted(base, config_of(kind, direction))
    if direction != "LoRA-One":
        assert relative(logits(model), before) < 1e-5
        assert model.init_report.shift == "weight"
        return
    weights = [pretrained.get_submodule(name).weight for name in targets_of(pretrained, kind)]
    gradients = torch.autograd.grad(loss_of(pretrained), weights)
    scaling = 16 / RANK**0.5
    with torch.no_grad():
        for name, gradient in zip(targets_of(pretrained, kind), gradients, strict=True):
            layer = pretrained.get_submodule(name)
            separate_weights(pretrained, [layer])  # the adapters of layers that share a weight stay apart
            U, S, Vt = np.linalg.svd(to_OI(layer, gradient).double().numpy(), full_matrices=False)
            step = scaling / (16 * S[0]) * (U[:, :RANK] * S[:RANK]) @ Vt[:RANK]
            write_weight(layer, (read_weight(layer).double() - torch.tensor(step)).float())
    assert relative(logits(model), logits(pretrained)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["LoRA-One", "ArB2r"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_what_is_saved_loads_with_stock_peft_on_the_stock_model(kind, direction, dora, tmp_path):
    model = adapted(build(kind), config_of(kind, direction, use_dora=dora))
    train_a_little(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(kind), str(tmp_path))
    assert relative(logits(again), logits(model)) < 1e-4
    assert again.peft_config["default"].r == (RANK if direction == "LoRA-One" else 2 * RANK)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "t5"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_dora_magnitude_is_the_row_norm_of_what_the_layer_computes_with(kind, direction):
    base = build(kind)
    model = adapted(base, config_of(kind, direction, use_dora=True))
    for layer in (module for module in model.modules() if hasattr(module, "lora_magnitude_vector")):
        A_RI, B_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        W_OI = read_weight(layer.get_base_layer()).double()
        full = W_OI + layer.scaling["default"] * B_OR.double() @ A_RI.double()
        magnitude = layer.lora_magnitude_vector["default"].weight.flatten()
        assert relative(magnitude, full.norm(dim=1)) < 1e-5
    if direction != "LoRA-One":
        assert relative(logits(model), logits(build(kind))) < 1e-5


def quantised(bits: str, tmp_path, double_quantisation: bool = False) -> nn.Module:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if not (tmp_path / "base").exists():
        build("linear").save_pretrained(tmp_path / "base")
    settings = {"load_in_8bit": True} if bits == "8bit" else {"load_in_4bit": True}
    if bits == "4bit":
        settings |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        settings["bnb_4bit_use_double_quant"] = double_quantisation
    config = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, dtype=torch.float32
    )
    settle(model)  # else its logits are those of weights repacked in bfloat16, on some CPUs
    return model.eval()


def assert_gradient_is_that_at_the_dequantised_weights(model: nn.Module, tolerance: float) -> None:
    reference = build("linear").double()
    for name, layer in reference.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.weight.data = read_weight(model.get_submodule(name)).double()
    names = targets_of(reference, "linear")
    with collect_gradients(model, names) as sums:
        for _ in range(2):
            loss_of(model).backward()
    expected = torch.autograd.grad(loss_of(reference), [reference.get_submodule(n).weight for n in names])
    for name, G_OI in zip(names, expected, strict=True):
        assert relative(sums.G_OI[name] / sums.n_calls, G_OI) < tolerance, name


def test_gradient_of_a_4_bit_model_is_that_at_its_dequantised_weights(tmp_path):
    assert_gradient_is_that_at_the_dequantised_weights(quantised("4bit", tmp_path), 1e-5)


@pytest.mark.parametrize("double_quantisation", [False, True])
def test_a_generation_before_the_estimate_does_not_spoil_a_4_bit_gradient(tmp_path, double_quantisation):
    """On some CPUs bitsandbytes repacks the weights for inference; gradients through those are wrong."""
    model = quantised("4bit", tmp_path, double_quantisation)
    before = {name: read_weight(model.get_submodule(name)) for name in targets_of(model, "linear")}
    for layer in model.modules():
        if quantisation(layer) == "4bit":
            layer.support_avx512bf16_for_cpu = type(layer)(64, 64).support_avx512bf16_for_cpu
    logits(model)
    settle(model)
    for name, W_OI in before.items():
        assert relative(read_weight(model.get_submodule(name)), W_OI) < 1e-2  # repacked in bfloat16
    assert_gradient_is_that_at_the_dequantised_weights(model, 1e-2)


def test_gradient_of_an_8_bit_model_is_near_that_at_its_dequantised_weights(tmp_path):
    """Its forward pass rounds the activations too, so near is all there is."""
    model, reference = quantised("8bit", tmp_path), build("linear")
    names = targets_of(reference, "linear")
    with collect_gradients(model, names) as sums, collect_gradients(reference, names) as expected:
        loss_of(model).backward()
        loss_of(reference).backward()
    assert all(relative(sums.G_OI[name], expected.G_OI[name]) < 0.05 for name in names)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_lora_one_starts_on_the_quantised_model_itself_and_leaves_it_alone(bits, tmp_path):
    base = quantised(bits, tmp_path)
    before = {name: read_weight(base.get_submodule(name)) for name in targets_of(base, "linear")}
    model = adapted(base, config_of("linear", "LoRA-One"))
    for name, W_OI in before.items():
        layer = model.get_submodule("base_model.model." + name)
        assert torch.equal(read_weight(layer.get_base_layer()), W_OI)
    train_a_little(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(quantised(bits, tmp_path), str(tmp_path / "adapter"))
    assert relative(logits(again), logits(model)) < 1e-5


@pytest.mark.parametrize(("bits", "drift"), [("4bit", 1e-5), ("8bit", 1e-2)])
def test_lora_ga_keeps_the_function_of_a_quantised_base_with_the_shift_in_the_adapter(bits, drift, tmp_path):
    base = quantised(bits, tmp_path)
    before = logits(base)
    model = adapted(base, config_of("linear", "ArB2r"))
    assert model.init_report.shift == "adapter"
    assert relative(logits(model), before) < drift
    train_a_little(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(quantised(bits, tmp_path), str(tmp_path / "adapter"))
    assert relative(logits(again), logits(model)) < 10 * drift
    with pytest.raises(UserError, match="save_pretrained, and merge with"):
        model.merge_and_unload()


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_lora_ga_requantises_where_asked_and_reports_the_drift(bits, tmp_path):
    base = quantised(bits, tmp_path)
    kind = {quantisation(base.get_submodule(name)) for name in targets_of(base, "linear")}
    assert kind == {bits}
    W_OI = read_weight(base.model.layers[0].self_attn.q_proj)
    model = adapted(base, config_of("linear", "ArB2r", shift="weight"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert quantisation(layer.get_base_layer()) == bits
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    drift = relative(read_weight(layer.get_base_layer()) + product.detach(), W_OI)
    assert drift > 1e-3
    assert model.init_report.weight_drift >= drift * 0.999
    assert torch.isfinite(logits(model)).all()


def test_dora_on_4_bit_keeps_lora_one_and_refuses_a_shift_in_the_adapter(tmp_path):
    model = adapted(quantised("4bit", tmp_path), config_of("linear", "LoRA-One", use_dora=True))
    assert torch.isfinite(logits(model)).all()
    with pytest.raises(UserError, match="DoRA needs the norm"):
        adapted(quantised("4bit", tmp_path), config_of("linear", "ArB2r", use_dora=True))


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_writing_a_weight_back_changes_nothing_beyond_its_quantisation(bits, tmp_path):
    layer = quantised(bits, tmp_path).model.layers[0].self_attn.q_proj
    W_OI = read_weight(layer)
    write_weight(layer, W_OI)
    assert relative(read_weight(layer), W_OI) < 1e-2
    x = torch.randn(2, 5, 64)
    assert relative(layer(x), x @ W_OI.T) < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_lose_no_more_than_their_rounding(dtype):
    base = build("linear").to(dtype)
    before = {name: read_weight(base.get_submodule(name)) for name in targets_of(base, "linear")}
    model = adapted(base, config_of("linear", "ArB2r"))
    for name, W_OI in before.items():
        layer = model.get_submodule("base_model.model." + name)
        assert layer.lora_A["default"].weight.dtype == torch.float32
        product = (
            layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        ).detach()
        exact = build("linear").get_submodule(name).weight
        rounding = relative(W_OI, exact.detach())
        bound = 1.2 * rounding * (1 + (product.norm() / W_OI.norm()) ** 2) ** 0.5
        assert relative(read_weight(layer.get_base_layer()) + product, W_OI) < bound


def test_shift_in_the_adapter_leaves_a_bfloat16_base_as_it_is():
    base = build("linear").to(torch.bfloat16)
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = adapted(base, config_of("linear", "ArB2r", shift="adapter"))
    stored = model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().weight
    assert torch.equal(stored, weight)


def test_the_tied_embedding_stays_when_the_head_is_shifted():
    base = build("tied_head")
    embeddings = base.get_input_embeddings().weight.detach().clone()
    model = adapted(base, config_of("tied_head", "ArB2r"))
    assert torch.equal(model.get_input_embeddings().weight, embeddings)


def test_gradient_checkpointing_of_either_kind_changes_nothing():
    model = small_llama()
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    with collect_gradients(model, names) as plain:
        loss_of(model).backward()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        with collect_gradients(model, names) as sums:
            loss_of(model).backward()
        assert sums.n_calls == 1
        assert all(relative(sums.G_OI[name], plain.G_OI[name]) < 1e-5 for name in names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", ["LoRA-One", "ArB2r"])
def test_what_is_trained_on_a_half_precision_base_travels_to_it(dtype, direction, tmp_path):
    model = adapted(build("linear").to(dtype), config_of("linear", direction))
    train_a_little(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("linear").to(dtype), str(tmp_path))
    rounding = relative(logits(build("linear").to(dtype)), logits(build("linear")))
    assert relative(logits(again), logits(model)) < 10 * rounding


def test_drift_of_the_embedded_model_in_bfloat16_is_within_that_of_its_rounding():
    """At the logits, with the arithmetic in float32, so that only what is stored counts."""
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.bfloat16).eval()
    exact = logits(AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32))
    stored = logits(copy.deepcopy(base).float())
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        use_rslora=True,
        target_modules="all-linear",
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )
    model = adapted(base, config)
    ratio = model.init_report.relative_product_norm
    drift = relative(logits(model.float()), stored)
    assert drift < 1.2 * (1 + ratio**2) ** 0.5 * relative(stored, exact)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_t5_is_estimated(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = T5Config(
        vocab_size=64, d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    settings = BitsAndBytesConfig(load_in_4bit=bits == "4bit", load_in_8bit=bits == "8bit")
    base = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5", quantization_config=settings)
    settle(base)
    before = logits(base)
    model = adapted(base, config_of("t5", "ArB2r"))
    assert relative(logits(model), before) < 2e-2


@pytest.mark.parametrize("kind", ["linear", "conv1d", "transposed", "bfloat16"])
def test_the_norm_of_a_weight(kind):
    torch.manual_seed(0)
    layer = Conv1D(70, 50) if kind == "conv1d" else nn.Linear(50, 70, bias=False)
    if kind == "transposed":  # in memory
        layer.weight.data = layer.weight.data.T.contiguous().T
    if kind == "bfloat16":
        layer.bfloat16()
    assert weight_norm(layer) == pytest.approx(layer.weight.double().norm().item(), rel=1e-6)
