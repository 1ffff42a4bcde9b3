"""Every start and adapter that the configuration offers, on a small model and through the program."""

import json

import pytest
import torch
from conftest import ALONE, only_run, random_examples, small_llama
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_adapters import logits, relative_difference, train_a_little
from transformers import AutoModelForCausalLM

from lora_one import portable, training
from lora_one.baselines import PEFT_MODES
from lora_one.config import ExperimentConfig, result_identity
from lora_one.errors import UserError
from lora_one.gradients import estimate_gradient
from lora_one.initialise import probe_logits, start_adapters
from lora_one.layers import read_weight
from lora_one.models import LoadedModel, adapter_ranks, check_rank, linear_layers, target_names
from lora_one.sample import gradient_batches
from lora_one.tracking import read_metrics

EXAMPLES = random_examples(24, longest=16)
RANK = 4
SHORT = [
    "model.max_steps=4",
    "model.warmup_steps=1",
    "model.save_steps=2",
    "eval.limit=2",
    "eval.before_training=false",
    "wandb.mode=disabled",
]


def config(seed: int = 0, peft: dict | None = None, **init) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "dataset": {"name": "tiny"},
            "model": {"name": "x"},
            "peft": {"lora_r": RANK} | (peft or {}),
            "init": {"bsz": 4, "iters": 4} | init if init.get("mode", "gradient") != "simple" else init,
            "seed": seed,
        }
    )


def small(dtype: torch.dtype = torch.float32, settings: ExperimentConfig | None = None) -> LoadedModel:
    model = small_llama(dtype=dtype)
    targets = target_names(model, settings.peft) if settings else tuple(linear_layers(model))
    return LoadedModel(model, None, "", "", targets)


def begin(settings: ExperimentConfig, loaded: LoadedModel | None = None, stored=None):
    """Model, starts and report, as the program makes them."""
    loaded = loaded or small(settings=settings)
    estimates = None
    if settings.init.mode == "gradient" and stored is None:
        ranks = adapter_ranks(loaded.model, loaded.targets, settings.peft)
        common = {"ranks": ranks, "pad_id": 0, "processes": ALONE}
        estimates = estimate_gradient(loaded.model, loaded.targets, EXAMPLES, settings, **common).layers
    return start_adapters(
        settings,
        loaded,
        estimates=estimates,
        stored=stored,
        batches=gradient_batches(EXAMPLES, settings, 0, ALONE.device),
        total_steps=100,
        probe=lambda model: probe_logits(model, EXAMPLES[:3], 0, ALONE.device),
    )


STARTS = {
    "svd": {"mode": "svd", "scale": "default"},
    "svd stable": {"mode": "svd", "scale": "stable", "stable_gamma": 64},
    "svd unit": {"mode": "svd", "scale": "unit"},
    "svd normalized": {"mode": "svd", "scale": "normalized"},
    "gaussian": {"mode": "simple", "lora_A": "gaussian", "lora_B": "gaussian"},
    "kaiming": {"mode": "simple", "lora_B": "kaiming", "norm_clip": True},
    "orthogonal": {"mode": "simple", "lora_A": "orthogonal", "lora_B": "xavier"},
    "pissa": {"mode": "pissa"},
    "olora": {"mode": "olora"},
    "corda": {"mode": "corda", "corda_method": "ipm"},
    "PEFT's LoRA-GA": {"mode": "peft_lora_ga", "direction": "LoRA-GA", "scale": "gd"},
    "LoRA-GA": {"direction": "LoRA-GA", "stable_gamma": 16},
    "LoRA-GA weightS": {"direction": "ArBr", "scale": "weightS"},
    "LoRA-GA sign": {"direction": "A2rBr", "objective": "sign"},
    "LoRA-GA adam": {"direction": "LoRA-GA", "objective": "adam", "scale": "gd"},
    "LoRA-GA clipped": {"direction": "LoRA-GA", "scale": "unit", "norm_clip": True},
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_every_start_that_shifts_the_base_keeps_the_function_and_travels(start, dora, tmp_path):
    model, inits, report = begin(config(peft={"dora": dora}, **STARTS[start]))
    assert report.shift == "weight"
    assert report.product_norm > 0
    assert report.logit_drift < 1e-5
    assert relative_difference(logits(model), logits(small_llama())) < 2e-5
    train_a_little(model)
    portable.export_adapter(model, inits, tmp_path / "adapter")
    again = PeftModel.from_pretrained(small_llama(), str(tmp_path / "adapter"))
    assert again.peft_config["default"].r == 2 * RANK
    assert relative_difference(logits(again), logits(model)) < 1e-4


@pytest.mark.parametrize("mode", ["pissa", "olora"])
def test_pefts_starts_are_pefts_own(mode):
    settings = config(mode=mode)
    ours, inits, _ = begin(settings)
    from lora_one.adapters import lora_config

    loaded = small()
    ranks, alphas = dict.fromkeys(loaded.targets, RANK), dict.fromkeys(loaded.targets, 16.0)
    theirs = get_peft_model(
        loaded.model, lora_config(loaded.targets, settings.peft, ranks, alphas, init_lora_weights=mode)
    )
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        if "lora_" in name or "base_layer" in name:
            assert torch.allclose(value, expected[name], atol=1e-5), name
    assert set(inits) == set(loaded.targets)


@pytest.mark.parametrize("mode", PEFT_MODES)
def test_pefts_starts_leave_the_model_as_it_was_and_are_repeatable(mode):
    from lora_one.baselines import peft_starts

    direction = {"direction": "random"} if mode == "peft_lora_ga" else {}
    settings, loaded = config(mode=mode, **direction), small()
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    ranks, alphas = dict.fromkeys(loaded.targets, RANK), dict.fromkeys(loaded.targets, 16.0)
    state = torch.get_rng_state()
    runs = [
        peft_starts(
            loaded.model,
            loaded.targets,
            settings,
            ranks=ranks,
            alphas=alphas,
            batches=list(gradient_batches(EXAMPLES, settings, 0, ALONE.device)),
        )
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert not hasattr(loaded.model, "peft_config")
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    assert all(torch.equal(runs[0][name].A_RI, runs[1][name].A_RI) for name in runs[0])


def test_eva_moves_ranks_and_keeps_the_budget_and_each_layers_scaling(tmp_path):
    settings = config(mode="eva", eva_rho=2.0)
    model, inits, report = begin(settings)
    ranks = [init.A_RI.shape[0] for init in inits.values()]
    assert sum(ranks) == RANK * len(linear_layers(small_llama()))
    assert len(set(ranks)) > 1
    assert report.shift is None
    assert report.logit_drift == 0
    train_a_little(model)
    portable.export_adapter(model, inits, tmp_path / "adapter")
    again = PeftModel.from_pretrained(small_llama(), str(tmp_path / "adapter"))
    assert relative_difference(logits(again), logits(model)) < 1e-5


@pytest.mark.parametrize("start", ["svd", "pissa", "LoRA-GA adam", "eva"])
def test_a_resumed_run_takes_its_start_from_the_disk(start, tmp_path):
    settings = config(**({"mode": "eva"} if start == "eva" else STARTS[start]))
    first, inits, _ = begin(settings)
    portable.save_init(inits, tmp_path / "init.safetensors")
    second, _, _ = begin(settings, stored=portable.load_init(tmp_path / "init.safetensors"))
    expected = first.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.state_dict().items())


def test_dtype_of_the_adapter():
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        model, inits, report = begin(config(direction="LoRA-GA", dtype=name))
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert layer.lora_A["default"].weight.dtype == dtype
        # The base is shifted by the factors as stored, so the cast costs nothing.
        assert report.weight_drift < 1e-6
        assert next(iter(inits.values())).A_RI.dtype == dtype


def test_dropout_with_a_shifted_base_is_measured_and_said():
    _, _, report = begin(config(direction="LoRA-GA", peft={"lora_dropout": 0.2}))
    assert report.logit_drift < 1e-5
    assert report.dropout_drift > 1e-3
    assert "dropout" in report.remarks()[0]
    assert begin(config(direction="LoRA-One", peft={"lora_dropout": 0.2}))[2].remarks() == []


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_trained_along_travel_and_stay_tied(tied, tmp_path):
    def base():
        model = small_llama()
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        return model

    settings = config(direction="LoRA-GA", peft={"train_embeddings": True})
    model = base()
    adapted, inits, report = begin(settings, LoadedModel(model, None, "", "", tuple(linear_layers(model))))
    assert report.logit_drift < 1e-5
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("embed_tokens" in name for name in trained)
    embeddings, head = adapted.get_input_embeddings(), adapted.get_output_embeddings()
    ends = [getattr(end, "modules_to_save", {"default": end})["default"].weight for end in (embeddings, head)]
    assert (ends[0] is ends[1]) == tied
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    train_a_little(adapted)
    portable.export_adapter(adapted, inits, tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), str(tmp_path / "adapter"))
    assert relative_difference(logits(again), logits(adapted)) < 1e-4
    merged = again.merge_and_unload()
    assert relative_difference(logits(merged), logits(adapted)) < 1e-4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lora_target_modules": "q_proj"}, 2),
        ({"lora_target_modules": ["q_proj", "layers.0.mlp.up_proj"]}, 3),
        ({"lora_target_modules": r".*layers\.1\..*_proj"}, 7),
        ({"lora_exclude_modules": ["q_proj", "k_proj"]}, 10),
        ({"lora_exclude_modules": r".*mlp.*"}, 8),
        ({"layers_to_transform": 1}, 7),
        ({"layers_to_transform": [0, 1], "lora_target_modules": ["v_proj"]}, 2),
        ({"lora_target_modules": ["lm_head"]}, 1),
    ],
)
def test_targets(settings, expected):
    assert len(target_names(small_llama(), config(peft=settings).peft)) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_target_modules": ["nothing"]}, "'nothing' matches no linear layer; the model has: down_proj"),
        ({"lora_target_modules": "(("}, "'\\(\\(' is no regular expression"),
        ({"lora_target_modules": ["embed_tokens"]}, "means model.embed_tokens, but it is an embedding"),
        ({"lora_target_modules": ["mlp"]}, "but it is no linear layer but LlamaMLP"),
        ({"layers_to_transform": 7}, "no target is left; without them there are 14"),
        ({"lora_exclude_modules": ".*"}, "no target is left"),
    ],
)
def test_targets_that_cannot_be_had(settings, words):
    with pytest.raises(UserError, match=words):
        target_names(small_llama(), config(peft=settings).peft)


def test_patterns_of_rank_and_alpha(tmp_path):
    settings = config(
        direction="LoRA-GA",
        peft={"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 8}, "alpha_pattern": {"v_proj": 64}},
    )
    model, inits, report = begin(settings)
    assert report.logit_drift < 1e-5
    assert inits["model.layers.0.self_attn.q_proj"].A_RI.shape[0] == 2
    assert inits["model.layers.1.mlp.up_proj"].A_RI.shape[0] == 8
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    assert layer.scaling["default"] == pytest.approx(64 / RANK**0.5)
    train_a_little(model)
    portable.export_adapter(model, inits, tmp_path / "adapter")
    again = PeftModel.from_pretrained(small_llama(), str(tmp_path / "adapter"))
    assert relative_difference(logits(again), logits(model)) < 1e-4
    for key in ("rank_pattern", "alpha_pattern"):
        wrong = config(peft={key: {"nothing": 2}})
        with pytest.raises(UserError, match=f"peft.{key}: 'nothing' matches no target"):
            begin(wrong)
    with pytest.raises(UserError, match=r"needs 2r = 40 directions"):
        large = config(direction="LoRA-GA", peft={"rank_pattern": {"q_proj": 20}})
        check_rank(small_llama(), tuple(linear_layers(small_llama())), large)


def test_one_module_under_two_names_is_refused():
    model = small_llama()
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    with pytest.raises(UserError, match="are one and the same module"):
        target_names(model, config().peft)


@pytest.mark.parametrize("mode", ["pissa", "olora", "corda", "peft_lora_ga"])
def test_pefts_starts_refuse_a_quantised_base(mode, monkeypatch):
    monkeypatch.setattr("lora_one.baselines.quantisation", lambda layer: "4bit")
    with pytest.raises(UserError, match=f"init.mode={mode}: .* is quantised"):
        begin(config(mode=mode))


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        (["init=pissa"], "pissa"),
        (["init=eva"], "eva"),
        (["peft=dora"], "LoRA-One+dora"),
        (["peft=adalora"], "adalora"),
        (["init=default", "peft.use_loraplus=true"], "loraplus"),
        (["peft=qv_w_emb", "init.direction=LoRA-GA"], "LoRA-GA"),
    ],
    ids=["pissa", "eva", "dora", "adalora", "loraplus", "embeddings"],
)
def test_through_the_program(cli, arguments, method, tmp_path):
    done = cli(*SHORT, "model.max_steps=12", "model.saving=true", *arguments)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path / "results")
    record = json.loads((run / "record.json").read_text())
    assert record["method"] == method
    assert record["training"]["n_steps"] == 12
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(record["model"]["source"]), str(run / "adapter")
    )
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert relative_difference(merged(ids).logits, adapted(ids).logits) < 1e-4
    card = (run / "adapter" / "README.md").read_text()
    assert f"| validation loss | {record['metrics']['validation_loss']:.4f} |" in card


@pytest.mark.parametrize("direction", ["LoRA-One", "LoRA-GA"])
def test_on_a_4_bit_base_through_the_program(cli, direction, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    done = cli(*SHORT, "model.quantization=4bit", f"init.direction={direction}")
    assert done.returncode == 0, done.stderr
    record = json.loads((only_run(tmp_path / "results") / "record.json").read_text())
    assert record["init"]["shift"] == (None if direction == "LoRA-One" else "adapter")
    if direction == "LoRA-GA":
        assert record["init"]["logit_drift"] < 1e-5


def test_loraplus_learns_b_faster(cli, tmp_path):
    norms = []
    for ratio in (1, 16):
        arguments = ["init=default", "peft.use_loraplus=true", f"peft.loraplus_lr_ratio={ratio}"]
        results = tmp_path / str(ratio)
        done = cli(*SHORT, *arguments, "model.learning_rate=1e-4", f"results_dir={results}")
        assert done.returncode == 0, done.stderr
        state = load_file(only_run(results) / "adapter" / "adapter_model.safetensors")
        norms.append(sum(float(value.norm()) for key, value in state.items() if "lora_B" in key))
    assert norms[1] / norms[0] == pytest.approx(16, rel=0.2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["init=svd", "init.scale=gd"], "init.scale=gd: not for init.mode=svd; valid: default, stable"),
        (["init.scale=normalized"], "init.scale=normalized: not for init.mode=gradient"),
        (["init.objective=adam"], "init.objective=adam: adam chooses both factors"),
        (["init.objective=adam", "init.direction=LoRA-GA"], "use it with scale gd"),
        (["init=pissa", "init.scale=unit"], "scale has no effect with init.mode=pissa"),
        (["init=default", "init.lora_A=zeros"], "two zero factors never learn"),
        (["peft=adalora", "init=gradient"], "AdaLoRA has its own start; use init=default"),
        (["peft=adalora", "peft.dora=true"], "does not go with dora"),
        (["peft=dora", "init.direction=LoRA-GA", "init.shift=adapter"], "DoRA needs the norm"),
        (["peft=full_ft", "init=default", "model.quantization=4bit"], "quantised weights cannot be trained"),
        (["init=peft_lora_ga", "init.direction=LoRA-One"], "PEFT's lora_ga has no such direction"),
        (["peft.loraplus_lr_ratio=4"], "peft.loraplus_lr_ratio: has no effect here"),
    ],
)
def test_what_does_not_go_together_is_named(cli, arguments, words):
    done = cli("dry_run=true", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1


def test_an_adapter_is_trained_on(cli, tmp_path):
    first = cli(*SHORT, "dataset.train_size=64", "init.direction=LoRA-GA", "peft.lora_r=4")
    assert first.returncode == 0, first.stderr
    adapter = only_run(tmp_path / "results") / "adapter"
    on = [f"results_dir={tmp_path}/on", "init=adapter", f"init.adapter={adapter}"]
    second = cli(*SHORT, "dataset.train_size=64", "optimizer=scaled_adamw", *on)
    assert second.returncode == 0, second.stderr
    run = only_run(tmp_path / "on")
    record = json.loads((run / "record.json").read_text())
    assert record["method"] == "adapter+scaled_adamw"
    # LoRA-GA's portable adapter has rank 2r, which is kept, and what it had learned.
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, run / "adapter"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.shape == after[name].shape
        assert 0 < relative_difference(after[name], tensor) < 0.7
    assert record["init"]["product_norm"] > 0
    losses = [read_metrics(folder / "metrics.jsonl")[0]["loss"] for folder in (adapter.parent, run)]
    assert losses[1] < losses[0]
    again = ["dataset.train_size=64", "optimizer=scaled_adamw", *on]
    assert "nothing to do" in cli(*SHORT, *again).stdout
    save_file({name: 2 * tensor for name, tensor in before.items()}, adapter / "adapter_model.safetensors")
    changed = cli(*SHORT, *again)
    assert changed.returncode == 2
    assert f"init.adapter={adapter}: has changed since {run}" in changed.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["init=adapter"], "init.adapter: is required with init.mode=adapter"),
        (["init=adapter", "init.adapter=./none"], "init.adapter=./none: "),
        (["init=adapter", "init.adapter=x", "peft.lora_r=4"], "peft.lora_r: "),
        (["init=adapter", "init.adapter=x", "peft=dora"], "peft.dora: init.mode=adapter takes it from"),
    ],
)
def test_an_adapter_that_cannot_be_had_is_named(cli, arguments, words):
    done = cli(*SHORT, "dataset.train_size=64", *arguments)
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in error
    assert "[model]" not in done.stdout  # before any weights are read


def test_an_adapter_of_another_model_is_named(tmp_path):
    other = get_peft_model(small_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    other.save_pretrained(tmp_path / "broken")
    state = load_file(tmp_path / "broken" / "adapter_model.safetensors")
    kept = dict(list(state.items())[1:])
    save_file(kept, tmp_path / "broken" / "adapter_model.safetensors")
    IA3Config(target_modules=["q_proj"], feedforward_modules=[]).save_pretrained(tmp_path / "ia3")
    get_peft_model(small_llama(), LoraConfig(r=2, target_modules=["embed_tokens"])).save_pretrained(
        tmp_path / "embedding"
    )
    for folder, words in (
        ("broken", "missing adapter keys"),
        ("ia3", "is no LoRA adapter but"),
        ("embedding", "adapts model.embed_tokens; adapters of linear layers"),
    ):
        settings = config(mode="adapter", adapter=str(tmp_path / folder), bsz=1, iters=1)
        with pytest.raises(UserError, match=words):
            begin(settings)


def test_push_to_the_hub_happens_once_the_run_is_finished(cli, monkeypatch, tmp_path):
    calls = []

    class Api:
        def create_repo(self, repository, **settings):
            calls.append(("create", repository, settings))
            return f"https://huggingface.co/{repository}"

        def upload_folder(self, **settings):
            calls.append(("upload", sorted(path.name for path in settings["folder_path"].iterdir())))

    monkeypatch.setattr("lora_one.hub.HfApi", Api)
    done = cli(*SHORT, "model.push_to_hub=someone/adapter")
    assert done.returncode == 0, done.stderr
    assert "pushed to https://huggingface.co/someone/adapter" in done.stdout
    assert calls == [
        ("create", "someone/adapter", {"private": True, "exist_ok": True}),
        ("upload", ["README.md", "adapter_config.json", "adapter_model.safetensors"]),
    ]

    monkeypatch.setattr(Api, "create_repo", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no")))
    again = cli(*SHORT, "model.push_to_hub=someone/adapter")
    assert again.returncode == 2
    assert "model.push_to_hub=someone/adapter: the Hugging Face Hub cannot be reached" in again.stderr
    assert json.loads((only_run(tmp_path / "results") / "record.json").read_text())["status"] == "finished"


def test_dora_start_of_lora_one_has_the_magnitude_of_the_stepped_weight():
    model, _, _ = begin(config(peft={"dora": True}))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    A_RI, B_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    stepped = read_weight(layer.get_base_layer()) + layer.scaling["default"] * B_OR @ A_RI
    assert torch.allclose(layer.lora_magnitude_vector["default"].weight, stepped.norm(dim=1), atol=1e-6)


def test_eva_with_too_few_tokens_is_named():
    with pytest.raises(UserError, match=r"init.mode=eva: its batches hold at most .* raise init.bsz"):
        begin(config(mode="eva", bsz=1, iters=2, peft={"lora_r": 16}))


def test_the_first_pattern_that_matches_counts_as_in_peft():
    settings = config(peft={"rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 3}})
    ranks = adapter_ranks(small_llama(), tuple(linear_layers(small_llama())), settings.peft)
    assert ranks["model.layers.1.self_attn.q_proj"] == 2
    assert ranks["model.layers.0.self_attn.q_proj"] == 3
    turned = config(peft={"rank_pattern": {"q_proj": 3, "layers.1.self_attn.q_proj": 2}})
    assert result_identity(settings) != result_identity(turned)


def test_a_head_trained_in_full_takes_no_adapter():
    wrong = config(peft={"lora_target_modules": ["q_proj", "lm_head"], "train_embeddings": True})
    with pytest.raises(UserError, match="lm_head is trained in full then"):
        target_names(small_llama(), wrong.peft)


@pytest.mark.parametrize("start", ["default", "gradient"])
def test_embeddings_trained_along_in_a_bfloat16_base(cli, start, tmp_path):
    arguments = ["peft=all_w_emb", f"init={start}", "model.bf16=true"]
    done = cli(*SHORT, *arguments)
    assert done.returncode == 0, done.stderr
    again = cli(*SHORT, *arguments, "eval.limit=3")
    assert again.returncode == 0, again.stderr


def test_adalora_trains_embeddings_along_too(cli, tmp_path):
    done = cli(*SHORT, "model.max_steps=12", "peft=adalora", "peft.train_embeddings=true")
    assert done.returncode == 0, done.stderr
    state = load_file(only_run(tmp_path / "results") / "adapter" / "adapter_model.safetensors")
    assert any("embed_tokens" in key for key in state)


def test_a_loss_that_is_not_finite_ends_the_run_as_failed(cli, monkeypatch, tmp_path):
    loss = training.weighted_loss
    monkeypatch.setattr(training, "weighted_loss", lambda *arguments: loss(*arguments) * float("nan"))
    done = cli(*SHORT, "init=default")
    assert done.returncode == 2
    assert "step 1: the training loss is nan; lower model.learning_rate" in done.stderr
    assert json.loads((only_run(tmp_path / "results") / "record.json").read_text())["status"] == "failed"
