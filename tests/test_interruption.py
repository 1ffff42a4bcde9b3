"""Asked to stop: a checkpoint, a code that says unfinished, and the same bits in the end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ALONE, ROOT, on_two_processes, only_run, run_program
from test_training import adapted_llama, config, curve, fit

from lora_one import interruption, training
from lora_one.interruption import UNFINISHED, StopOnSignal, Unfinished, heeding_signals
from lora_one.processes import start_processes
from lora_one.training import last_checkpoint

SHORT = ("debug=short", "model.max_steps=5", "peft.lora_dropout=0.1")
ADAPTER = "adapter/adapter_model.safetensors"


def record_of(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())


def signalled_at(step: int, number: int = signal.SIGTERM):
    """Training's log, which sends the signal to this process in a step."""
    log = training.Log.on_log

    def on_log(self, args, state, control, logs=None, **kwargs):
        log(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == step and "loss" in logs:
            os.kill(os.getpid(), number)

    return on_log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_training_keeps_a_checkpoint_and_goes_on_to_the_same_bits(cli, tmp_path, monkeypatch, number):
    whole, cut = f"results_dir={tmp_path}/whole", f"results_dir={tmp_path}/cut"
    assert cli(*SHORT, whole).returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr(training.Log, "on_log", signalled_at(2, number))
        done = cli(*SHORT, cut)
    assert done.returncode == UNFINISHED == 75
    reason = f"stopped by {number.name} after step 3 of 5"
    assert done.stderr.splitlines()[-1] == (
        f"error: {reason}; a checkpoint is kept, the same command goes on from it"
    )
    assert "Traceback" not in done.stderr
    folder = only_run(tmp_path / "cut")
    assert (record_of(folder)["status"], record_of(folder)["error"]) == ("unfinished", reason)
    assert last_checkpoint(folder).name == "checkpoint-3"
    assert signal.getsignal(number) is signal.SIG_DFL
    assert cli(*SHORT, cut).returncode == 0
    assert record_of(folder)["training"]["resumed_from_step"] == 3
    assert (folder / ADAPTER).read_bytes() == (only_run(tmp_path / "whole") / ADAPTER).read_bytes()
    assert curve(folder) == curve(only_run(tmp_path / "whole"))


@pytest.mark.parametrize("stage", ["load_model", "estimate_gradient", "grade", "plot_run"])
def test_elsewhere_the_signal_ends_the_run_at_once(cli, tmp_path, monkeypatch, stage):
    def signalled(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        pytest.fail("it went on")

    settings = (*SHORT, "eval.before_training=false")
    with monkeypatch.context() as patch:
        patch.setattr(f"run_exp.{stage}", signalled)
        done = cli(*settings)
    assert done.returncode == UNFINISHED
    assert "error: stopped by SIGTERM; the same command goes on" in done.stderr
    assert record_of(only_run(tmp_path / "results"))["status"] == "unfinished"
    assert cli(*settings).returncode == 0


def test_an_interruption_by_hand_is_no_failure(cli, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("run_exp.grade", interrupted)
    assert cli(*SHORT).returncode == 130
    assert record_of(only_run(tmp_path / "results"))["status"] == "unfinished"


def test_a_signal_while_a_finished_run_is_closed_takes_nothing_back(cli, tmp_path, monkeypatch):
    def signalled(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("lora_one.runs.shutil", SimpleNamespace(rmtree=signalled))
        assert cli(*SHORT).returncode == UNFINISHED
    folder = only_run(tmp_path / "results")
    assert record_of(folder)["status"] == "finished"
    assert "nothing to do" in cli(*SHORT).stdout
    assert not (folder / "checkpoints").exists()


def test_the_rest_of_a_sweep_is_not_started(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(training.Log, "on_log", signalled_at(2))
    assert cli("-m", "seed=0,1", *SHORT).returncode == UNFINISHED
    assert record_of(only_run(tmp_path / "results"))["status"] == "unfinished"


def test_adalora_says_that_it_starts_over(cli, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training.Log, "on_log", signalled_at(2))
        done = cli("peft=adalora", "debug=short", "model.max_steps=5")
    assert done.returncode == UNFINISHED
    assert (
        "after step 3 of 5; AdaLoRA keeps no checkpoints, so the same command starts the training over"
        in (done.stderr)
    )
    assert cli("peft=adalora", "debug=short", "model.max_steps=5").returncode == 0
    assert record_of(only_run(tmp_path / "results"))["training"]["resumed_from_step"] == 0


def test_a_signal_in_the_last_step_lets_the_training_end(cli, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training.Log, "on_log", signalled_at(5))
        done = cli(*SHORT)
    assert done.returncode == UNFINISHED
    folder = only_run(tmp_path / "results")
    assert json.loads((folder / "checkpoints" / "trained.json").read_text()) == {"step": 5}
    assert cli(*SHORT).returncode == 0
    assert record_of(folder)["training"]["resumed_from_step"] == 5


def test_a_second_signal_ends_the_program_on_the_spot(monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)
    with heeding_signals(), pytest.raises(SystemExit) as ended, StopOnSignal(ALONE, True).deferring():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the same request, forwarded by a launcher
        monkeypatch.setattr(interruption, "_SAME_REQUEST_SECONDS", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == UNFINISHED


def test_signals_of_others_stay_theirs():
    def theirs(*_):
        return None

    before = signal.signal(signal.SIGUSR1, theirs)
    try:
        with heeding_signals():
            assert signal.getsignal(signal.SIGUSR1) is theirs
            assert signal.getsignal(signal.SIGTERM) is interruption._on_signal
            assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL  # the submitit launcher's
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def stop_as_rank(folder: str) -> None:
    """Process 1 alone gets a signal in its third step; both stop after it, and then go on."""
    processes, settings = start_processes(), config(per_device_batch_size=2, max_steps=8)
    whole, _ = fit(Path(folder) / "whole", settings, adapted_llama(0.3), processes)

    class Signalled(training._WindowTrainer):
        def training_step(self, *arguments):
            if processes.rank == 1 and self.state.global_step == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().training_step(*arguments)

        def _save_rng_state(self, output_dir):
            time.sleep(processes.rank)  # the main process has written everything else by then
            super()._save_rng_state(output_dir)

        def _save_checkpoint(self, *arguments):
            super()._save_checkpoint(*arguments)
            files = {file.name for file in last_checkpoint(Path(folder) / "cut").iterdir()}
            assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= files

    original, training._WindowTrainer = training._WindowTrainer, Signalled
    with heeding_signals(), pytest.raises(Unfinished) as stop:
        fit(Path(folder) / "cut", settings, adapted_llama(0.3), processes)
    training._WindowTrainer = original
    who = "SIGUSR1" if processes.rank == 1 else "a signal to another process"
    assert stop.value.together
    assert stop.value.reason == f"stopped by {who} after step 3 of 8"
    assert last_checkpoint(Path(folder) / "cut").name == "checkpoint-3"
    cut, result = fit(Path(folder) / "cut", settings, adapted_llama(0.3), processes)
    assert result.resumed_from_step == 3
    for (name, one), (_, two) in zip(whole.named_parameters(), cut.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_two_processes_stop_at_the_same_step(tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    on_two_processes(stop_as_rank, str(tmp_path))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


@pytest.mark.slow
def test_a_launcher_forwards_the_signal(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", "accelerate_config.yaml", "run_exp.py", "debug=short", "model.max_steps=400"]
    command += [f"results_dir={tmp_path}/results", "model.real_batch_size=4", "model.epochs=100"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as launch:
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob("metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        asked = time.monotonic()
        launch.send_signal(signal.SIGTERM)
        _, errors = launch.communicate(timeout=60)
    assert time.monotonic() - asked < 30
    assert launch.returncode != 0
    assert "stopped by SIGTERM after step" in errors
    folder = only_run(tmp_path)
    assert record_of(folder)["status"] == "unfinished"
    last = int(last_checkpoint(folder).name.split("-")[1])
    assert 0 < last < 400
    again = run_program(*command)
    assert again.returncode == 0, again.stderr[-2000:]
    assert record_of(folder)["training"]["resumed_from_step"] == last
