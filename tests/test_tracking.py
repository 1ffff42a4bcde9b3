"""What a person sees: TensorBoard, and the bar."""

import importlib.util
import re

import pytest
from conftest import only_run
from test_training import Interrupted, config, fit
from torch.utils import tensorboard

from lora_one import training
from lora_one.config import WandbConfig
from lora_one.tracking import Tracker, read_metrics

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
OFF = WandbConfig(mode="disabled")


def points(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_what_the_metrics_file_holds(cli, tmp_path):
    assert cli("debug=short", "tensorboard=true").returncode == 0
    folder = only_run(tmp_path / "results")
    shown, rows = points(folder), read_metrics(folder / "metrics.jsonl")
    for figure in ("loss", "learning_rate", "grad_norm", "eval_loss"):
        held = [(row["step"], pytest.approx(row[figure], rel=1e-6)) for row in rows if figure in row]
        assert shown[figure] == held, figure
    assert {"final/validation_loss", "final/test"} <= set(shown)
    assert not (folder / "wandb").exists()


def test_tensorboard_goes_on_over_a_kill(tmp_path, monkeypatch):
    settings, log = config(save_steps=4), training.Log.on_log

    def track():
        with Tracker(OFF, "run", tmp_path, {}, tensorboard=True) as tracker:
            fit_tracked(tmp_path, settings, tracker)

    def stop(self, args, state, control, **kwargs):
        log(self, args, state, control, **kwargs)
        if state.global_step == 7:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(training.Log, "on_log", stop)
        patch.setattr(tensorboard.SummaryWriter, "close", lambda self: None)
        with pytest.raises(Interrupted):
            track()
    assert [step for step, _ in points(tmp_path)["loss"]] == [1, 2, 3, 4, 5, 6, 7]
    track()
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert points(tmp_path)["loss"] == [(row["step"], pytest.approx(row["loss"])) for row in rows]
    assert [row["step"] for row in rows] == list(range(1, 13))


def fit_tracked(folder, settings, tracker):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_training.Tracker", lambda *_: tracker)
        fit(folder, settings)


def test_a_start_that_did_not_come_to_training_takes_no_point_back(tmp_path):
    with Tracker(OFF, "run", tmp_path, {}, tensorboard=True) as tracker:
        tracker.log({"loss": 1.0}, step=1)
    with Tracker(OFF, "run", tmp_path, {}, tensorboard=True):
        pass
    assert points(tmp_path) == {"loss": [(1, 1.0)]}


def test_a_tensorboard_that_fails_is_said_once(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(tensorboard.SummaryWriter, "add_scalar", refuse)
    with Tracker(OFF, "run", tmp_path, {}, tensorboard=True) as tracker:
        tracker.log({"loss": 1.0}, step=1)
        tracker.log({"loss": 1.0}, step=2)
        tracker.summarise({"loss": 1.0})
    assert capsys.readouterr().out.count("tensorboard could not log: disk full; the run goes on") == 1


def test_one_failing_tracker_leaves_the_other_alone(tmp_path, monkeypatch, capsys):
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    with Tracker(WandbConfig(mode="offline"), "run", tmp_path, {}, tensorboard=True) as tracker:
        tracker.log({"loss": 1.0}, step=1)
    assert "wandb could not start: division by zero" in capsys.readouterr().out
    assert points(tmp_path) == {"loss": [(1, 1.0)]}


def test_without_the_package_it_is_one_line(cli, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name, *rest)
    )
    done = cli("debug=short", "tensorboard=true")
    assert done.returncode == 2
    assert "error: tensorboard=true: the package is not installed; pip install tensorboard" in done.stderr


def test_the_bar_shows_tokens_per_second_without_a_terminal_too(cli):
    done = cli("debug=short")
    last = [line for line in re.split(r"[\r\n]", done.stderr) if line.startswith("train: 100%")][-1]
    assert re.search(r"3/3 \[.*<.*, .*step/s, loss=\d\.\d{4}, lr=\d\.\de-\d\d, tokens/s=[\d,]{3,}\]", last)
