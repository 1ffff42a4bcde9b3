"""Training: the same curve however it is cut, and the same adapter after an interruption."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALONE, on_two_processes, random_examples, small_llama
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lora_one import training
from lora_one.config import ExperimentConfig, WandbConfig
from lora_one.data.batches import Limits
from lora_one.errors import UserError
from lora_one.processes import Processes, start_processes
from lora_one.tracking import Tracker, read_metrics


def config(**model) -> ExperimentConfig:
    settings = {"name": "x", "real_batch_size": 8, "epochs": 2, "learning_rate": 5e-3, "warmup_steps": 2}
    return ExperimentConfig.model_validate({"dataset": {"name": "tiny"}, "model": settings | model})


def adapted_llama(dropout: float = 0.0):
    model = small_llama()
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout))


def fit(folder: Path, settings: ExperimentConfig, model=None, processes: Processes = ALONE):
    tracker = Tracker(WandbConfig(mode="disabled"), "run", folder, {})
    model = model or adapted_llama()
    result = training.train(
        model,
        random_examples(44),
        random_examples(10, seed=1),
        settings,
        pad_id=0,
        processes=processes,
        folder=folder,
        tracker=tracker,
    )
    return model, result


def curve(folder: Path, figure: str = "loss") -> list[float]:
    return [row[figure] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def test_any_micro_batching_gives_the_same_curve(tmp_path):
    curves, norms = [], []
    cuts = [{"per_device_batch_size": 1}, {"per_device_batch_size": 3}, {"max_tokens_per_device": 40}, {}]
    for number, cut in enumerate([*cuts, {"max_tokens_per_device": 40, "packing": True}]):
        folder = tmp_path / str(number)
        folder.mkdir()
        _, result = fit(folder, config(**cut))
        curves.append(curve(folder))
        # Adam hardly sees the gradient's scale, so look at it too.
        norms.append(curve(folder, "grad_norm"))
        assert result.n_steps == 12
    assert len(curves[0]) == 12
    for other, norm in zip(curves[1:], norms[1:], strict=True):
        np.testing.assert_allclose(other, curves[0], rtol=1e-4)
        np.testing.assert_allclose(norm, norms[0], rtol=1e-3)


def test_training_lowers_the_loss(tmp_path):
    fit(tmp_path, config(learning_rate=0.01, epochs=10), small_llama())
    losses = curve(tmp_path)
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def fit_as_rank(folder: str) -> None:
    fit(Path(folder), config(max_tokens_per_device=40), processes=start_processes())


def fit_packed_as_rank(folder: str) -> None:
    fit(Path(folder), config(max_tokens_per_device=40, packing=True), processes=start_processes())


@pytest.mark.parametrize("as_rank", [fit_as_rank, fit_packed_as_rank])
def test_two_processes_give_the_curve_of_one(tmp_path, as_rank):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    fit(tmp_path / "one", config(per_device_batch_size=2))
    on_two_processes(as_rank, str(tmp_path / "two"))
    for figure, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):
        two, one = curve(tmp_path / "two", figure), curve(tmp_path / "one", figure)
        np.testing.assert_allclose(two, one, rtol=tolerance)


def test_reported_loss_is_the_window_mean(tmp_path):
    _, result = fit(tmp_path, config(learning_rate=0.0, per_device_batch_size=2))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    per_epoch = [row["loss"] for row in rows if "loss" in row and row["step"] <= 6]
    weights = [8, 8, 8, 8, 8, 4]
    settings = {
        "reduction": "sample",
        "limits": Limits(max_examples=5),
        "pad_id": 0,
        "processes": ALONE,
    }
    expected = training.validation_loss(small_llama(), random_examples(44), **settings)
    assert np.average(per_epoch, weights=weights) == pytest.approx(expected, rel=1e-5)
    assert result.validation_loss == pytest.approx(
        training.validation_loss(small_llama(), random_examples(10, seed=1), **settings), rel=1e-6
    )


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(("save_steps", "last"), [(3, 6), (2, 8), (4, 8)])  # six steps an epoch
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch, save_steps, last):
    settings = config(save_steps=save_steps)
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, _ = fit(tmp_path / "whole", settings, adapted_llama(dropout=0.3))

    log = training.Log.on_log

    def stop_after_a_checkpoint(self, args, state, control, **kwargs):
        log(self, args, state, control, **kwargs)
        if state.global_step == last + 1:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(training.Log, "on_log", stop_after_a_checkpoint)
        with pytest.raises(Interrupted):
            fit(tmp_path / "cut", settings, adapted_llama(dropout=0.3))
    assert training.last_checkpoint(tmp_path / "cut").name == f"checkpoint-{last}"
    torch.manual_seed(123)
    resumed, result = fit(tmp_path / "cut", settings, adapted_llama(dropout=0.3))
    assert result.resumed_from_step == last
    for (name, one), (_, two) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    steps = [row["step"] for row in read_metrics(tmp_path / "cut" / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, 13))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_a_resumed_run_keeps_the_dtype_of_its_adapters(tmp_path, monkeypatch):
    def low_precision():
        model = adapted_llama()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16 if parameter.requires_grad else parameter.dtype)
        return model

    settings = config(max_steps=6, save_steps=3)
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, _ = fit(tmp_path / "whole", settings, low_precision())
    log = training.Log.on_log

    def stop_after_a_checkpoint(self, args, state, control, **kwargs):
        log(self, args, state, control, **kwargs)
        if state.global_step == 4:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(training.Log, "on_log", stop_after_a_checkpoint)
        with pytest.raises(Interrupted):
            fit(tmp_path / "cut", settings, low_precision())
    resumed, result = fit(tmp_path / "cut", settings, low_precision())
    assert result.resumed_from_step == 3
    for (name, one), (_, two) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert one.dtype == two.dtype, name
        assert torch.equal(one, two), name


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "last step only"])
def test_a_run_interrupted_after_its_last_step_takes_no_other(tmp_path, trained):
    settings = config(epochs=1.5, lr_scheduler="constant")
    whole, first = fit(tmp_path, settings)
    if not trained:
        (tmp_path / "checkpoints" / "trained.json").unlink()
    again, second = fit(tmp_path, settings)
    assert (first.n_steps, second.n_steps) == (9, 9)
    assert second.validation_loss == first.validation_loss
    assert len(curve(tmp_path)) == 9
    for (name, one), (_, two) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_early_stopping(tmp_path):
    settings = config(epochs=20, learning_rate=0.0, early_stopping_patience=2)
    _, result = fit(tmp_path, settings)
    assert result.n_steps == 3 * 6  # the first validation loss, and two that are no better
    _, again = fit(tmp_path, settings)
    assert again.n_steps == 3 * 6
    assert result.stopped_early and again.stopped_early


def test_several_visible_gpus_do_not_replicate_the_model(tmp_path):
    plan = training.TrainPlan(1, 1)
    arguments = training._arguments(config(), plan, tmp_path)
    assert arguments.n_gpu <= 1


def test_a_damaged_checkpoint_is_named(tmp_path):
    fit(tmp_path, config())
    checkpoint = training.last_checkpoint(tmp_path)
    for name in ("optimizer.pt", "adapter_model.safetensors"):
        file = checkpoint / name
        content = file.read_bytes()
        file.write_bytes(content[:100])
        with pytest.raises(UserError, match=f"{name}: damaged; remove the folder"):
            training.last_checkpoint(tmp_path)
        file.write_bytes(content)


def test_remarks_on_the_steps_to_come():
    lines = training.remarks(44, config(warmup_steps=100, max_steps=50))
    assert lines == [
        "2 epochs end after 12 steps, before model.max_steps=50",
        "model.warmup_steps=100 covers all 12 steps",
    ]


def test_warmup_is_so_many_steps_or_a_share_of_them(tmp_path):
    rates = []
    for settings in ({"warmup_steps": 3}, {"warmup_ratio": 0.25, "warmup_steps": 100}, {"warmup_ratio": 0.2}):
        folder = tmp_path / str(len(rates))
        folder.mkdir()
        fit(folder, config(lr_scheduler="constant", **settings))
        rates.append(curve(folder, "learning_rate"))
    assert rates[0] == rates[1] == rates[2]  # 2.4 of 12 steps is three
    assert rates[0][:5] == pytest.approx([0, 5e-3 / 3, 1e-2 / 3, 5e-3, 5e-3])
    lines = training.remarks(44, config(warmup_ratio=1.0))
    assert lines == ["model.warmup_ratio=1.0 covers all 12 steps"]


def test_an_unfinished_checkpoint_is_not_resumed(tmp_path):
    (tmp_path / "checkpoints" / "checkpoint-9").mkdir(parents=True)
    complete = tmp_path / "checkpoints" / "checkpoint-3"
    complete.mkdir()
    (complete / "trainer_state.json").write_text("{}")
    assert training.last_checkpoint(tmp_path) == complete


def test_a_metrics_line_cut_by_a_crash_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("cut", [False, True])
def test_the_best_weights_are_kept(tmp_path, monkeypatch, cut):
    """A rate that ruins what was learned: the lowest validation loss is not the last."""
    seen: dict[int, tuple[float, dict]] = {}
    evaluate = training._WindowTrainer.evaluate

    def watch(self, *arguments, **settings):
        metrics = evaluate(self, *arguments, **settings)
        seen[self.state.global_step] = (metrics["eval_loss"], weights(self.model))
        return metrics

    monkeypatch.setattr(training._WindowTrainer, "evaluate", watch)
    settings = config(
        keep_best=True, lr_scheduler="constant", learning_rate=0.3, eval_epochs=0.5, save_steps=2, epochs=3
    )
    if cut:
        log = training.Log.on_log

        def stop(self, args, state, control, logs=None, **more):
            log(self, args, state, control, logs=logs, **more)
            if state.global_step == 15:
                raise Interrupted

        with monkeypatch.context() as patch:
            patch.setattr(training.Log, "on_log", stop)
            with pytest.raises(Interrupted):
                fit(tmp_path, settings)
    model, result = fit(tmp_path, settings)
    best = min(seen, key=lambda step: seen[step][0])
    assert best < max(seen) == 18
    assert (result.best_step, result.validation_loss) == (best, seen[best][0])
    assert all(torch.equal(value, seen[best][1][name]) for name, value in weights(model).items())


def test_a_measure_of_right_answers_goes_along(tmp_path):
    shares = iter([0.25, 0.5])
    tracker = Tracker(WandbConfig(mode="disabled"), "run", tmp_path, {})
    training.train(
        adapted_llama(),
        random_examples(44),
        random_examples(10, seed=1),
        config(),
        pad_id=0,
        processes=ALONE,
        folder=tmp_path,
        tracker=tracker,
        exact_match=lambda model: next(shares),
    )
    rows = read_metrics(tmp_path / "metrics.jsonl")
    measured = [(row["step"], row["eval_exact_match"]) for row in rows if "eval_exact_match" in row]
    assert measured == [(6, 0.25), (12, 0.5)]


def test_packing_is_refused_where_examples_would_see_each_other(tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 2}
    bloom = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **shape))
    with pytest.raises(UserError, match=r"model\.packing=true: bloom with eager attention does not keep"):
        fit(tmp_path, config(packing=True), bloom)


def test_compiled_blocks_train_alike(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("model.compile on a CPU needs g++")
    curves = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        folder.mkdir()
        model, _ = fit(folder, config(compile=compiled, max_steps=3))
        curves.append(curve(folder))
        assert all(module._compiled_call_impl is None for module in model.modules())
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)


def test_a_tracker_that_fails_never_stops_a_run(tmp_path, monkeypatch, capsys):
    import wandb

    def refuse(**_):
        raise wandb.errors.CommError("no route\nto host")

    monkeypatch.setattr(wandb, "init", refuse)
    tracker = Tracker(WandbConfig(mode="online"), "run", tmp_path, {})
    tracker.log({"loss": 1.0}, step=1)
    with tracker:
        tracker.summarise({"loss": 1.0})
    assert "wandb could not start: no route; the run goes on" in capsys.readouterr().out


def test_a_tracker_that_fails_later_is_left_alone(tmp_path, monkeypatch, capsys):
    import wandb

    class Run:
        def log(self, *_, **__):
            raise OSError("disk full")

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    tracker = Tracker(WandbConfig(mode="offline"), "run", tmp_path, {})
    tracker.log({"loss": 1.0}, step=1)
    tracker.log({"loss": 1.0}, step=2)
    with tracker:
        tracker.summarise({})
    assert capsys.readouterr().out.count("wandb could not log: disk full") == 1


def test_offline_tracking_needs_no_account(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    tracker = Tracker(WandbConfig(), "run", tmp_path, {"seed": 1})
    tracker.log({"loss": 1.0}, step=1)
    with tracker:
        tracker.summarise({"loss": 1.0})
    assert list(tmp_path.glob("wandb/offline-run-*"))
