"""The library in a training script of one's own: PEFT's idiom, stock Trainer, and no silent default start."""

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
from conftest import ROOT, on_two_processes
from peft import PeftModel
from safetensors.torch import load_file
from test_layers import IDS, adapted, build, config_of, logits, loss_of, relative, targets_of, train_a_little
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM, Trainer, TrainingArguments

from lora_one import (
    LoraConfig,
    LoraGAConfig,
    LoraOneConfig,
    UserError,
    get_peft_model,
    preprocess_lora_one,
    preprocess_loraga,
)
from lora_one.collect import collect_gradients
from lora_one.layers import read_weight
from lora_one.processes import start_processes

ROWS = torch.randint(3, 64, (48, 12), generator=torch.Generator().manual_seed(9))


class Rows(Dataset):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": ROWS[index], "labels": ROWS[index]}


def trainer(model, folder, steps: int = 8) -> Trainer:
    return Trainer(
        model=model,
        train_dataset=Rows(),
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            save_steps=4,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
    )


def start_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("direction", ["LoRA-One", "ArB2r"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "t5"])
def test_quick_start_with_the_stock_trainer(direction, kind, tmp_path):
    base = build(kind)
    base.save_pretrained(tmp_path / "original")
    model = adapted(base, config_of(kind, direction))
    before = float(loss_of(model.eval()))
    trainer(model, tmp_path / "run").train()
    model.save_pretrained(
        tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "original")
    )
    again = PeftModel.from_pretrained(
        type(base).from_pretrained(tmp_path / "original"), str(tmp_path / "out")
    )
    assert relative(logits(again), logits(model)) < 1e-4
    assert float(loss_of(again)) != pytest.approx(before, abs=1e-4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "original")
    assert config["init_lora_weights"] is True
    assert "lora_one_config" not in config


def test_written_config_is_one_of_stock_peft(tmp_path):
    """Nothing of ours: a machine without this library loads it."""
    model = adapted(build("linear"), config_of("linear", "ArB2r"))
    train_a_little(model)
    model.save_pretrained(tmp_path / "out")
    build("linear").save_pretrained(tmp_path / "base")
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from peft import PeftModel;"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r});"
        f"m = PeftModel.from_pretrained(m, {str(tmp_path / 'out')!r}).eval();"
        "ids = torch.load(sys.argv[1]); torch.save(m(input_ids=ids).logits.detach(), sys.argv[2]);"
        "assert 'lora_one' not in sys.modules"
    )
    torch.save(IDS, tmp_path / "ids.pt")
    command = [sys.executable, "-W", "error::UserWarning:peft", "-c", program]
    subprocess.run(
        [*command, tmp_path / "ids.pt", tmp_path / "logits.pt"], check=True, cwd=tmp_path, timeout=120
    )
    assert relative(torch.load(tmp_path / "logits.pt"), logits(model)) < 1e-4


@pytest.mark.parametrize("direction", ["LoRA-One", "ArB2r"])
def test_an_interrupted_trainer_goes_on_to_the_bit(direction, tmp_path):
    cache = tmp_path / "gradients"
    model = build("linear")
    config = config_of("linear", direction)
    preprocess_loraga(model, config, lambda: loss_of(model).backward(), cache)
    whole = get_peft_model(model, config)
    trainer(whole, tmp_path / "run").train()

    model, config = build("linear"), config_of("linear", direction)
    preprocess_loraga(model, config, None, cache)
    resumed = get_peft_model(model, config)
    trainer(resumed, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    ours, theirs = start_of(resumed), start_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_another_start_is_refused(tmp_path):
    first = adapted(build("linear"), config_of("linear", "ArB2r"))
    first.save_pretrained(tmp_path)
    other = adapted(build("linear"), config_of("linear", "A2rBr"))
    with pytest.raises(UserError, match="trained from another start"):
        other.load_adapter(str(tmp_path), "default", is_trainable=True)


def test_gradient_is_the_mean_over_the_batches_and_zeroing_loses_nothing():
    def step_over(model, zero: bool) -> None:
        for row in (IDS[:1], IDS[1:]):
            model(input_ids=row, labels=row).loss.backward()
            if zero:
                model.zero_grad()

    starts = []
    for zero in (False, True):
        model = build("linear")
        config = config_of("linear", "LoRA-One")
        preprocess_lora_one(model, config, lambda model=model, zero=zero: step_over(model, zero))
        starts.append(start_of(get_peft_model(model, config)))
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    reference = build("linear")
    name = targets_of(reference, "linear")[0]
    loss = sum(reference(input_ids=row, labels=row).loss for row in (IDS[:1], IDS[1:])) / 2
    G_OI = torch.autograd.grad(loss, reference.get_submodule(name).weight)[0]
    A_RI = starts[0][f"base_model.model.{name}.lora_A.default.weight"]
    top = torch.linalg.svd(G_OI)[2][0]
    assert abs(float(torch.dot(A_RI[0] / A_RI[0].norm(), top))) == pytest.approx(1, abs=1e-4)


def test_preprocessing_leaves_the_model_as_it_was():
    model = build("t5").train()
    before = copy.deepcopy(model)
    preprocess_loraga(model, config_of("t5", "ArB2r"), lambda: loss_of(model).backward())
    assert model.training
    for (name, ours), theirs in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.grad is None
        assert ours.requires_grad == theirs.requires_grad


def two_stages(tmp_path, direction: str, quantised_model):
    cache = tmp_path / "loraga_gradients.pt"
    full_precision, config = build("linear"), config_of("linear", direction)
    preprocess_loraga(full_precision, config, lambda: backward(full_precision), cache_file=str(cache))
    return get_peft_model(quantised_model, config), cache


@pytest.mark.parametrize("direction", ["LoRA-One", "ArB2r"])
def test_two_stages_with_a_quantised_model(direction, tmp_path):
    from test_layers import quantised

    model, cache = two_stages(tmp_path, direction, quantised("4bit", tmp_path))
    reference = adapted(build("linear"), config_of("linear", direction))
    ours, theirs = start_of(model), start_of(reference)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    again = config_of("linear", direction)  # a second program reads the file, and runs no step
    base = quantised("4bit", tmp_path)
    preprocess_loraga(base, again, None, cache_file=str(cache))
    stored = start_of(get_peft_model(base, again))
    assert all(torch.equal(stored[name], ours[name]) for name in ours)
    trainer(model, tmp_path / "run", steps=2).train()


def ga(**settings) -> LoraConfig:
    return config_of("linear", "ArB2r", **settings)


def backward(model) -> None:
    loss_of(model).backward()


def stepping(model) -> None:
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model).backward()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(1.0)
    optimizer.step()


@pytest.mark.parametrize(
    ("train_step", "words"),
    [
        (loss_of, "no gradient arrived; call loss.backward"),
        (lambda model: None, "no gradient arrived"),
        (lambda model: (loss_of(model) * 0).backward(), "its gradient is zero.*multiplies the loss by zero"),
        (lambda model: (loss_of(model) * float("nan")).backward(), "its gradient is not finite"),
        (stepping, "changed its weight; run forward and backward passes only"),
        (
            lambda model: (
                model.model.layers[0](
                    torch.zeros(1, 2, 64), position_embeddings=(torch.ones(1, 2, 16), torch.zeros(1, 2, 16))
                )[0]
                .sum()
                .backward()
            ),
            "does not come from a call of the model itself",
        ),
    ],
    ids=["no backward", "nothing", "zeroed loss", "nan", "optimiser", "part of the model"],
)
def test_a_step_that_gives_no_gradient_is_named(train_step, words):
    model = build("linear")
    with pytest.raises(UserError, match=words):
        preprocess_loraga(model, ga(), lambda: train_step(model))
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_no_step_and_no_cache():
    with pytest.raises(UserError, match="train_step: give a function"):
        preprocess_loraga(build("linear"), ga(), None)


def test_adapter_before_gradient_and_gradient_after_adapter():
    with pytest.raises(UserError, match=r"call preprocess_loraga.*before get_peft_model"):
        get_peft_model(build("linear"), ga())
    with pytest.raises(UserError, match="call preprocess_lora_one"):
        get_peft_model(build("linear"), config_of("linear", "LoRA-One"))
    model = peft.get_peft_model(build("linear"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="already has adapters; estimate the gradients before"):
        preprocess_loraga(model, ga(), lambda: backward(model))


@pytest.mark.parametrize("prepare", [True, False])
@pytest.mark.parametrize("direction", ["LoRA-One", "ArB2r"])
def test_pefts_own_get_peft_model_refuses_rather_than_starting_in_its_default_way(prepare, direction):
    model, config = build("linear"), config_of("linear", direction)
    if prepare:
        preprocess_loraga(model, config, lambda: backward(model))
    with pytest.raises(ValueError, match=r"call lora_one\.get_peft_model, not PEFT"):
        peft.get_peft_model(model, config)


def test_configs_without_their_settings():
    with pytest.raises(UserError, match="give lora_ga_config=LoraGAConfig"):
        LoraConfig(init_lora_weights="lora_ga")
    with pytest.raises(UserError, match="give lora_one_config=LoraOneConfig"):
        LoraConfig(init_lora_weights="lora_one")
    model = build("linear")
    with pytest.raises(UserError, match="no gradient start; use"):
        preprocess_loraga(model, LoraConfig(target_modules=["q_proj"]), lambda: backward(model))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LoraGAConfig(direction="LoRA-One"), "direction='LoRA-One'; valid: LoRA-GA"),
        (lambda: LoraGAConfig(direction="up"), "direction='up'"),
        (lambda: LoraGAConfig(scale="loud"), "scale='loud'; valid: stable"),
        (lambda: LoraGAConfig(stable_gamma=0), "stable_gamma=0"),
        (lambda: LoraOneConfig(normalize="l2"), "normalize='l2'"),
        (lambda: LoraOneConfig(objective="x"), "objective='x'"),
    ],
)
def test_wrong_settings_are_named(make, words):
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 40}, "rank 40: the start needs 80 directions"),
        ({"target_modules": ["nothing"]}, "'nothing' matches no layer; the model has: down_proj"),
        ({"target_modules": ["q_proj", "c_attn"]}, "'c_attn' matches no layer"),
        ({"target_modules": "(("}, "no regular expression"),
        ({"layers_to_transform": [99]}, "no layer is left with .*layers_to_transform=.99"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens cannot take an adapter, it is an embedding"),
        ({"target_modules": ["input_layernorm"]}, "it is no linear layer but LlamaRMSNorm"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters"),
    ],
)
def test_targets_that_cannot_be_had(settings, words):
    model = build("linear")
    common = {"r": 4, "target_modules": ["q_proj"]}
    config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), **(common | settings))
    with pytest.raises(UserError, match=words):
        preprocess_loraga(model, config, lambda: backward(model))


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": None}, 4),  # PEFT's choice for a Llama: q and v
        ({"target_modules": r".*layers\.1\..*(gate|up)_proj"}, 2),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]}, 3),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
        ({"target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2}}, 2),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"layers.1.self_attn.q_proj": 32}}, 2),
    ],
)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_targets_and_patterns_as_peft_means_them(settings, layers, use_rslora, tmp_path):
    base = build("linear")
    config = LoraConfig(
        r=4, use_rslora=use_rslora, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), **settings
    )
    before = logits(base)
    model = adapted(base, config)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == layers
    assert relative(logits(model), before) < 1e-5
    train_a_little(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("linear"), str(tmp_path))
    assert relative(logits(again), logits(model)) < 1e-4


def test_cache_of_another_model_rank_or_objective_is_named(tmp_path):
    cache, model = tmp_path / "sub" / "gradients.safetensors", build("linear")
    preprocess_loraga(model, config_of("linear", "LoRA-One"), lambda: backward(model), cache)
    with pytest.raises(UserError, match="made for another rank"):
        preprocess_loraga(model, ga(), None, cache)  # LoRA-GA reads 2r triplets, LoRA-One r
    torch.manual_seed(1)
    stranger = type(model)(model.config)
    with pytest.raises(UserError, match="made for other weights than those of"):
        preprocess_loraga(stranger, config_of("linear", "LoRA-One"), None, cache)
    with pytest.raises(UserError, match=r"hold nothing on transformer\.h\.0"):
        preprocess_loraga(build("conv1d"), config_of("conv1d", "LoRA-One"), None, cache)
    other = config_of("linear", "LoRA-One")
    other.lora_one_config.objective = "sign"
    with pytest.raises(UserError, match="made with objective=gradient, but objective=sign"):
        preprocess_loraga(model, other, None, cache)
    cache.write_bytes(cache.read_bytes()[:200])
    with pytest.raises(UserError, match=r"damaged.*delete it"):
        preprocess_loraga(model, config_of("linear", "LoRA-One"), None, cache)


@pytest.mark.parametrize("direction", ["A2rBr", "random"])
def test_adam_objective_through_the_library_and_its_cache(direction, tmp_path):
    settings = {"direction": direction, "scale": "gd_scale", "objective": "adam"}
    model = build("linear")
    config = ga()
    config.lora_ga_config = LoraGAConfig(**settings)
    before = logits(model)
    preprocess_loraga(model, config, lambda: backward(model), tmp_path / "cache")
    first = get_peft_model(model, config)
    assert relative(logits(first), before) < 1e-5
    for layer in config._lora_one_prepared.layers.values():
        assert layer.after <= layer.before
    model, config = build("linear"), ga()
    config.lora_ga_config = LoraGAConfig(**settings)
    preprocess_loraga(model, config, None, tmp_path / "cache")
    second = start_of(get_peft_model(model, config))
    assert all(torch.equal(second[name], value) for name, value in start_of(first).items())
    config.lora_ga_config = LoraGAConfig(direction="ArB2r", objective="adam")
    with pytest.raises(UserError, match="adam fixes the size"):
        preprocess_loraga(build("linear"), config, lambda: None)


def test_dropout_with_a_shifted_base_warns():
    with pytest.warns(UserWarning, match="lora_dropout > 0 with LoRA-GA"):
        adapted(build("linear"), ga(lora_dropout=0.1))


def test_merging_in_place_gives_the_same_function():
    model = adapted(build("linear"), ga())
    train_a_little(model)
    expected = logits(model)
    assert relative(logits(model.merge_and_unload()), expected) < 1e-5


def test_a_folder_without_a_model_is_refused(tmp_path):
    model = adapted(build("linear"), ga())
    with pytest.raises(UserError, match="holds no saved model"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path))


def test_other_configs_go_to_peft_untouched():
    model = get_peft_model(build("linear"), LoraConfig(r=4, target_modules=["q_proj"]))
    assert float(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.norm()) == 0
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    assert type(get_peft_model(build("linear"), config)) is peft.PeftModel


def half_of_the_rows(path: str, estimator: str) -> None:
    processes = start_processes()
    model, config = build("linear"), config_of("linear", "LoRA-One")
    config.lora_one_config.estimator = estimator
    row = IDS[processes.rank :: 2]
    preprocess_lora_one(model, config, lambda: model(input_ids=row, labels=row).loss.backward())
    if processes.is_main:
        torch.save(start_of(get_peft_model(model, config)), path)


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_two_processes_share_the_mean(estimator, tmp_path):
    on_two_processes(half_of_the_rows, str(tmp_path / "two.pt"), estimator)
    two = torch.load(tmp_path / "two.pt")
    one = start_of(adapted(build("linear"), config_of("linear", "LoRA-One")))
    assert all(relative(two[name], one[name]) < 1e-3 for name in one)


def test_the_sketch_is_of_the_mean_over_the_calls():
    def many(model, estimator):
        config = LoraConfig(
            r=4,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights="lora_one",
            lora_one_config=LoraOneConfig(estimator=estimator, normalize="none"),
        )
        preprocess_lora_one(
            model, config, lambda: [model(input_ids=r[None], labels=r[None]).loss.backward() for r in ROWS]
        )
        return start_of(get_peft_model(model, config))

    exact, found = many(build("linear"), "exact"), many(build("linear"), "sketch")
    # The spectrum of a random model is flat, so the vectors differ; their size must not.
    assert all(float(found[name].norm() / exact[name].norm()) == pytest.approx(1, abs=0.1) for name in exact)


def test_a_sketch_does_not_serve_where_the_exact_gradient_is_asked_for(tmp_path):
    model, config = build("linear"), config_of("linear", "LoRA-One")
    preprocess_lora_one(model, config, lambda: backward(model), cache_file=tmp_path / "exact")
    other = LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="lora_one",
        lora_one_config=LoraOneConfig(estimator="sketch"),
    )
    with pytest.raises(UserError, match="made with estimator=exact, but estimator=sketch is asked for"):
        preprocess_lora_one(model, other, None, cache_file=tmp_path / "exact")
    with pytest.raises(UserError, match="objective='sign' needs every entry"):
        LoraOneConfig(estimator="sketch", objective="sign")


def test_float32_factors_are_written_as_they_are(tmp_path):
    model = adapted(build("linear"), ga())
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    A_KI = next(tensor for key, tensor in state.items() if "lora_A" in key)
    assert A_KI.shape[0] == 8
    assert torch.equal(A_KI[4:], -A_KI[:4])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert read_weight(layer.get_base_layer()).dtype == torch.float32


def test_the_package_installs_without_the_runner():
    """Neither Hydra nor the runner's files are touched by an import of the library."""
    program = (
        "import sys; from lora_one import LoraConfig; assert not {'hydra', 'run_exp'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)


def test_a_stock_config_is_marked_too_so_that_peft_refuses_it():
    model = build("linear")
    settings = {"init_lora_weights": "lora_ga", "lora_ga_config": peft.tuners.lora.LoraGAConfig()}
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], **settings)
    preprocess_loraga(model, config, lambda: backward(model))
    with pytest.raises(ValueError, match=r"call lora_one\.get_peft_model, not PEFT"):
        peft.get_peft_model(build("linear"), config)
    assert relative(logits(get_peft_model(model, config)), logits(build("linear"))) < 1e-5


def test_one_module_under_two_names_is_refused():
    model = build("linear")
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    with pytest.raises(UserError, match="one and the same module"):
        preprocess_loraga(model, ga(), lambda: backward(model))


@pytest.mark.parametrize("kind", ["linear", "t5"])
def test_dropout_stays_off_when_the_step_sets_train_mode(kind):
    def in_train_mode(model) -> None:
        model.train()
        loss_of(model).backward()

    starts = []
    for step in (in_train_mode, backward):
        model = build(kind)
        config = config_of(kind, "LoRA-One")
        preprocess_lora_one(model, config, lambda model=model, step=step: step(model))
        starts.append(start_of(get_peft_model(model, config)))
    assert all(torch.equal(starts[0][name], value) for name, value in starts[1].items())


def test_dropout_inside_a_checkpointed_layer_is_off():
    settings = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=64, word_embed_proj_dim=32, dropout=0.5, **settings)
    torch.manual_seed(0)
    model = OPTForCausalLM(config).eval()
    names = ["model.decoder.layers.0.fc1"]
    with collect_gradients(model, names) as plain:
        loss_of(model).backward()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with collect_gradients(model, names) as checkpointed:
        loss_of(model).backward()
    assert relative(checkpointed.G_OI[names[0]], plain.G_OI[names[0]]) < 1e-5
    assert float((nn.functional.dropout(torch.ones(1000), 0.5) == 0).float().mean()) > 0.3


def test_a_failure_leaves_the_model_as_it_was():
    model = build("linear").train()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(AttributeError), collect_gradients(model, ["no.such.layer"]):
        pass
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_adapters_cast_after_the_start_are_written_exactly(tmp_path):
    model = adapted(build("linear"), ga())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("linear"), str(tmp_path))
    assert relative(logits(again), logits(model.float())) < 1e-5
    model.load_adapter(str(tmp_path), "default", is_trainable=True)


def test_without_the_adapter_the_model_is_the_pretrained_one():
    pretrained = logits(build("linear"))
    model = adapted(build("linear"), ga())
    train_a_little(model)
    trained = logits(model)
    with model.disable_adapter():
        assert relative(logits(model), pretrained) < 1e-5
    assert torch.equal(logits(model), trained)
    with pytest.raises(UserError, match="would fit a base that nobody else has"):
        model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
    plain = adapted(build("linear"), config_of("linear", "LoRA-One"))
    plain.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
    with plain.disable_adapter():
        assert relative(logits(plain), pretrained) < 1e-6


def test_settings_changed_after_the_preparation_are_refused():
    model, config = build("linear"), ga()
    preprocess_loraga(model, config, lambda: backward(model))
    config.lora_ga_config.objective = "sign"
    with pytest.raises(UserError, match=r"prepared with .*gradient.*prepare them again"):
        get_peft_model(model, config)


def test_dora_is_refused_before_the_model_is_touched():
    model = build("linear")
    with pytest.raises(UserError, match="DoRA needs the norm"):
        adapted(model, ga(use_dora=True, shift="adapter"))
    assert relative(logits(adapted(model, ga(use_dora=True))), logits(build("linear"))) < 1e-5


def test_resized_embeddings_are_saved(tmp_path):
    build("linear").save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70)
    model = adapted(model, ga())
    model.save_pretrained(tmp_path / "adapter")
    assert any("embed_tokens" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


@pytest.mark.parametrize("shift", ["weight", "adapter"])
def test_the_model_survives_a_pickle(shift, tmp_path):
    model = adapted(build("linear"), ga(shift=shift))
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert relative(logits(again), logits(model)) < 1e-6
    again.save_pretrained(tmp_path / "adapter")
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "adapter")).r == 8


def test_a_layer_of_zeros_gets_its_start():
    model = build("linear")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    assert torch.isfinite(logits(adapted(model, config_of("linear", "LoRA-One")))).all()


def step_that_fails_on_one_process(_: str) -> None:
    processes = start_processes()
    model = build("linear")
    step = backward if processes.is_main else loss_of
    with pytest.raises(UserError, match="no gradient arrived"):
        preprocess_lora_one(model, config_of("linear", "LoRA-One"), lambda: step(model))


def test_a_failure_on_one_process_ends_them_all():
    on_two_processes(step_that_fails_on_one_process, "")


def test_data_that_runs_out_is_named():
    model, batches = build("linear"), iter([IDS, IDS])

    def train_step() -> None:
        for _ in range(64):
            ids = next(batches)
            model(input_ids=ids, labels=ids).loss.backward()

    with pytest.raises(UserError, match="ran out after 2 batches"):
        preprocess_loraga(model, ga(), train_step)


def test_wrong_arguments_are_named(tmp_path):
    model = build("linear")
    with pytest.raises(UserError, match=r"give model\.module"):
        preprocess_loraga(nn.DataParallel(model), ga(), lambda: backward(model))
    with pytest.raises(UserError, match="the first argument is the model"):
        preprocess_loraga(ga(), model, lambda: backward(model))
    with pytest.raises(UserError, match="no such file yet; give a train_step"):
        preprocess_loraga(model, ga(), None, tmp_path / "missing")
    with pytest.raises(UserError, match="give a LoraGAConfig, not LoraOneConfig"):
        LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraOneConfig())
    with pytest.raises(UserError, match='has no effect here; use init_lora_weights="lora_ga"'):
        LoraConfig(lora_ga_config=LoraGAConfig())
    with pytest.raises(UserError, match="did you mean 'lora_ga'"):
        LoraConfig(init_lora_weights="loraga")


@pytest.mark.parametrize("start", [True, False, "gaussian", "pissa", "pissa_niter_4", "olora"])
def test_pefts_other_starts_work_with_our_config(start):
    model = get_peft_model(
        build("linear"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start)
    )
    assert torch.isfinite(logits(model)).all()


def test_unloading_a_shifted_base_is_refused():
    with pytest.raises(UserError, match="load the pretrained model again"):
        adapted(build("linear"), ga()).unload()
    plain = adapted(build("linear"), config_of("linear", "LoRA-One")).unload()
    assert relative(logits(plain), logits(build("linear"))) < 1e-6


def sketching(direction: str = "LoRA-One") -> LoraConfig:
    config = config_of("linear", direction)
    config.lora_one_config.estimator = "sketch"
    return config


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_sketch_of_what_is_not_finite_is_refused(bad):
    model = build("linear")

    def step():
        for number, row in enumerate(ROWS[:6]):
            loss = model(input_ids=row[None], labels=row[None]).loss
            (loss * (float("nan") if number == bad else 1)).backward()

    with pytest.raises(UserError, match="its gradient is not finite"):
        preprocess_lora_one(model, sketching(), step)


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_mixed_precision_in_the_users_step(estimator, backward_inside):
    def start(precise: bool):
        model, config = build("linear"), config_of("linear", "LoRA-One")
        config.lora_one_config.estimator = estimator

        def step():
            for row in ROWS[:6]:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not precise):
                    loss = model(input_ids=row[None], labels=row[None]).loss
                    if backward_inside:
                        loss.backward()
                if not backward_inside:
                    loss.backward()

        preprocess_lora_one(model, config, step)
        return start_of(get_peft_model(model, config))

    exact, found = start(True), start(False)
    assert all(float(found[name].norm() / exact[name].norm()) == pytest.approx(1, abs=0.1) for name in exact)


def test_calls_without_a_gradient_cost_no_decomposition(monkeypatch):
    from lora_one.sketch import OnePassSketch

    model, aimed = build("linear"), []
    aim = OnePassSketch.aim
    monkeypatch.setattr(OnePassSketch, "aim", lambda group: (aimed.append(len(group)), aim(group)))

    def step():
        loss_of(model).backward()
        with torch.no_grad():
            for _ in range(5):
                loss_of(model)
        loss_of(model).backward()

    preprocess_lora_one(model, sketching(), step)
    assert sum(aimed) == 4  # targets, once
