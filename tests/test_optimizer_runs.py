"""The preconditioned optimisers in training: cut anyhow, interrupted, composed with other choices."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import on_two_processes, only_run, small_llama
from peft import LoraConfig, get_peft_model
from test_training import Interrupted, curve, fit

from lora_one import training
from lora_one.config import ExperimentConfig, result_identity
from lora_one.optimizers import LoraPro, ScaledAdamW, optimizer_class
from lora_one.processes import start_processes
from lora_one.records import read_record

NAMES = ["scaled_gd", "scaled_adamw", "lora_pro"]


def config(name: str, optimizer=None, peft=None, **model) -> ExperimentConfig:
    """At rates at which each of them learns here."""
    rate = {"scaled_gd": 1.0, "scaled_adamw": 5e-3, "lora_pro": 5e-3}[name]
    settings = {"name": "x", "real_batch_size": 8, "epochs": 2, "learning_rate": rate, "warmup_steps": 2}
    return ExperimentConfig.model_validate(
        {
            "dataset": {"name": "tiny"},
            "model": settings | {"prec_reg": 1e-2} | model,
            "optimizer": {"name": name} | (optimizer or {}),
            "peft": peft or {},
        }
    )


def adapted(dropout: float = 0.0):
    """With ``B A ≠ 0``, as a gradient start leaves it."""
    model = small_llama()
    torch.manual_seed(0)
    adapted_model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout))
    for parameter_name, parameter in adapted_model.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted_model


@pytest.mark.parametrize("name", NAMES)
def test_they_learn(name, tmp_path):
    fit(tmp_path, config(name, epochs=12), adapted())
    losses = curve(tmp_path)
    assert sum(losses[-6:]) < 0.985 * sum(losses[:6])


@pytest.mark.parametrize("name", NAMES)
def test_any_micro_batching_gives_the_same_curve(name, tmp_path):
    curves = []
    for size in (2, 8):
        (tmp_path / str(size)).mkdir()
        fit(tmp_path / str(size), config(name, per_device_batch_size=size), adapted())
        curves.append(curve(tmp_path / str(size)))
    np.testing.assert_allclose(*curves, rtol=1e-4)


def fit_as_rank(folder: str) -> None:
    processes = start_processes()
    for name in NAMES:
        fit(Path(folder) / name, config(name, per_device_batch_size=2), adapted(), processes)


def test_two_processes_give_the_curve_of_one(tmp_path):
    for name in NAMES:
        (tmp_path / "one" / name).mkdir(parents=True)
        (tmp_path / "two" / name).mkdir(parents=True)
        fit(tmp_path / "one" / name, config(name, per_device_batch_size=2), adapted())
    on_two_processes(fit_as_rank, str(tmp_path / "two"))
    for name in NAMES:
        np.testing.assert_allclose(curve(tmp_path / "two" / name), curve(tmp_path / "one" / name), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_ends_with_the_same_bits(name, dtype, tmp_path, monkeypatch):
    def model():
        made = adapted(dropout=0.3)
        for parameter in made.parameters():
            parameter.data = parameter.data.to(dtype if parameter.requires_grad else parameter.dtype)
        return made

    settings = config(name, save_steps=3, optimizer={"momentum": 0.9} if name == "scaled_gd" else {})
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, _ = fit(tmp_path / "whole", settings, model())
    log = training.Log.on_log

    def stop_after_a_checkpoint(self, args, state, control, **kwargs):
        log(self, args, state, control, **kwargs)
        if state.global_step == 7:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(training.Log, "on_log", stop_after_a_checkpoint)
        with pytest.raises(Interrupted):
            fit(tmp_path / "cut", settings, model())
    torch.manual_seed(123)
    resumed, result = fit(tmp_path / "cut", settings, model())
    assert result.resumed_from_step == 6
    for (parameter, one), (_, two) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert one.dtype == two.dtype, parameter
        assert torch.equal(one, two), parameter
    _, again = fit(tmp_path / "cut", settings, model())
    assert again.escalated_dampings == result.escalated_dampings == 0  # also where nothing is left to train


def trainer_of(monkeypatch, tmp_path, settings: ExperimentConfig):
    """The optimiser that training makes."""
    found = {}
    begin = training.Progress.on_train_begin

    def keep(self, args, state, control, optimizer=None, **kwargs):
        found["optimizer"] = getattr(optimizer, "optimizer", optimizer)
        begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(training.Progress, "on_train_begin", keep)
    fit(tmp_path, settings, adapted())
    return found["optimizer"]


def test_settings_reach_the_optimiser(monkeypatch, tmp_path):
    settings = config(
        "scaled_adamw",
        {"form": "symmetric", "beta1": 0.7, "beta2": 0.8, "eps": 1e-7},
        {"use_loraplus": True, "loraplus_lr_ratio": 4.0},
        weight_decay=0.01,
        lr_scheduler="constant",
        warmup_steps=0,
        max_steps=2,
    )
    made = trainer_of(monkeypatch, tmp_path, settings)
    assert type(made) is ScaledAdamW
    assert (made.form, made.damping, len(made.pairs)) == ("symmetric", 1e-2, 14)
    groups = [group for group in made.param_groups if group["params"]]
    assert {group["lr"] for group in groups} == {5e-3, 2e-2}
    assert all((group["betas"], group["eps"]) == ((0.7, 0.8), 1e-7) for group in groups)
    assert {group["weight_decay"] for group in groups} == {0.01}
    of_B = {id(pair.B_OR) for pair in made.pairs}
    assert all((group["lr"] == 2e-2) == (id(p) in of_B) for group in groups for p in group["params"])


def test_lora_pro_moves_b_at_its_own_rate(monkeypatch, tmp_path):
    plus = {"use_loraplus": True, "loraplus_lr_ratio": 4.0}
    shared = {"lr_scheduler": "constant", "warmup_steps": 0, "max_steps": 1}
    steps = []
    for number, peft in enumerate(({}, plus)):
        (tmp_path / str(number)).mkdir()
        before = {n: p.detach().clone() for n, p in adapted().named_parameters()}
        model, _ = fit(tmp_path / str(number), config("lora_pro", peft=peft, **shared), adapted())
        steps.append({n: p.detach() - before[n] for n, p in model.named_parameters() if "lora_" in n})
    for name, step in steps[0].items():
        assert torch.allclose(steps[1][name], step * (4 if "lora_B" in name else 1), atol=1e-5), name
    assert isinstance(trainer_of(monkeypatch, tmp_path, config("lora_pro", max_steps=1)), LoraPro)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=sgd", "optimizer.momentum=0.9"],
        ["optimizer=scaled_gd"],
        ["optimizer=scaled_adamw"],
        ["optimizer=scaled_adamw", "optimizer.form=symmetric", "peft=dora", "init.direction=LoRA-GA"],
        ["optimizer=scaled_adamw", "optimizer.form=sylvester", "peft.use_loraplus=true", "init=default"],
        ["optimizer=scaled_adamw", "model.bf16=true", "init.dtype=bf16"],
        ["optimizer=scaled_gd", "peft=all_w_emb"],
        ["optimizer=lora_pro", "init=default"],
    ],
    ids=" ".join,
)
def test_through_the_program(cli, tmp_path, overrides):
    done = cli("debug=short", *overrides)
    assert done.returncode == 0, done.stderr
    record = json.loads((only_run(tmp_path / "results") / "record.json").read_text())
    assert record["training"]["n_steps"] == 3
    name = overrides[0].split("=")[1]
    assert record["method"].endswith(name) or f"+{name}+" in record["method"]
    assert (record["training"]["escalated_dampings"] is None) == (name == "sgd")
    card = (only_run(tmp_path / "results") / "adapter" / "README.md").read_text()
    assert f"| optimizer.name | {name} |" in card


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer=scaled_adamw", "peft=adalora", "init=default"], "AdaLoRA's three factors have rules"),
        (["optimizer=scaled_gd", "peft=full_ft"], "optimizer=scaled_gd: there are no factors"),
        (["optimizer=scaled_adamw", "optimizer.momentum=0.9"], "optimizer.momentum: has no effect here"),
        (["optimizer=lora_pro", "optimizer.form=symmetric"], "optimizer.form: has no effect here"),
        (["optimizer=adam"], "optimizer=adam: no such choice (did you mean 'adamw'?)"),
        (["optimizer=scaled_adamw", "optimizer.form=symetric"], "did you mean 'symmetric'?"),
        (["optimizer=scaled_adamw", "model.prec_reg=0"], "model.prec_reg=0"),
        (["model.warmup_steps=5", "model.warmup_ratio=0.1"], "two lengths of one warm-up"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(cli, overrides, message):
    done = cli(*overrides)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_damping_belongs_to_the_run_only_where_it_is_read(cli):
    def folder(*overrides: str) -> str:
        out = cli("dry_run=true", *overrides).stdout
        return next(line.split()[-1] for line in out.splitlines() if line.startswith("run folder"))

    assert folder("model.prec_reg=0.1") == folder()
    assert folder("optimizer=scaled_gd", "model.prec_reg=0.1") != folder("optimizer=scaled_gd")
    assert folder("optimizer=scaled_gd", "model.prec_reg=1e-6") == folder("optimizer=scaled_gd")
    assert folder("optimizer=lora_pro", "model.prec_reg=1e-8") == folder("optimizer=lora_pro")


def test_settings_that_the_optimiser_does_not_read_make_no_other_run():
    tree = {"dataset": {"name": "tiny"}, "model": {"name": "x"}}
    plain, idle = (
        ExperimentConfig.model_validate(tree | {"optimizer": settings})
        for settings in ({"name": "sgd"}, {"name": "sgd", "form": "symmetric", "beta1": 0.5})
    )
    assert result_identity(plain) == result_identity(idle)
    assert plain.method == idle.method == "LoRA-One+sgd"
    assert result_identity(ExperimentConfig.model_validate(tree)) == result_identity(
        ExperimentConfig.model_validate(tree | {"optimizer": {"momentum": 0.9}})
    )


def test_weights_that_end_in_no_number_are_no_result(cli, tmp_path):
    """Nothing but the validation loss sees what the last step did."""
    done = cli("debug=short", "optimizer=scaled_gd", "model.learning_rate=1e6")
    assert done.returncode == 2
    assert "step 3: the validation loss is nan; lower model.learning_rate" in done.stderr
    folder = only_run(tmp_path / "results")
    assert json.loads((folder / "record.json").read_text())["status"] == "failed"
    assert not (folder / "adapter").exists()


def test_a_record_older_than_a_key_has_its_default(cli, tmp_path):
    assert cli("debug=short").returncode == 0
    folder = only_run(tmp_path / "results")
    now = read_record(folder)
    record = json.loads((folder / "record.json").read_text())
    del record["config"]["optimizer"], record["config"]["model"]["device_map"]
    (folder / "record.json").write_text(json.dumps(record))
    assert read_record(folder)["config"] == now["config"]


def test_a_plain_run_without_peft_takes_sgd(tmp_path):
    settings = ExperimentConfig.model_validate(
        {
            "dataset": {"name": "tiny"},
            "model": {
                "name": "x",
                "real_batch_size": 8,
                "learning_rate": 0.5,
                "warmup_steps": 0,
                "epochs": 10,
            },
            "optimizer": {"name": "sgd"},
            "peft": {"use_peft": False},
        }
    )
    _, result = fit(tmp_path, settings, small_llama().requires_grad_(True))
    assert result.escalated_dampings is None
    assert optimizer_class(settings, small_llama())[0] is torch.optim.SGD
    losses = curve(tmp_path)
    assert sum(losses[-6:]) < sum(losses[:6])
