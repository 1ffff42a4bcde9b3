"""Checkpoints: whole or not there, and a disk that is full costs none."""

import errno
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ALONE, only_run
from safetensors import SafetensorError
from test_training import adapted_llama, config, curve, fit

from lora_one import checkpoints, training
from lora_one.checkpoints import last_checkpoint, whole_checkpoint
from lora_one.errors import RunError, UserError


def write_checkpoint(folder: Path, step: int) -> Path:
    with whole_checkpoint(folder / "checkpoints", step, ALONE):
        written = checkpoints.partial_folder(folder / "checkpoints") / f"checkpoint-{step}"
        written.mkdir(parents=True)
        torch.save({"step": step}, written / "optimizer.pt")
        (written / "trainer_state.json").write_text("{}")
    return folder / "checkpoints" / f"checkpoint-{step}"


def test_a_new_checkpoint_replaces_the_old(tmp_path):
    write_checkpoint(tmp_path, 3)
    new = write_checkpoint(tmp_path, 6)
    assert last_checkpoint(tmp_path) == new
    assert list((tmp_path / "checkpoints").iterdir()) == [new]


def test_a_checkpoint_is_seen_only_when_whole_and_one_always_is(tmp_path, monkeypatch):
    """Looks at the folder after every change of it."""
    write_checkpoint(tmp_path, 3)
    seen = []

    def watched(owner, name):
        original = getattr(owner, name)

        def call(*values, **named):
            result = original(*values, **named)
            found = last_checkpoint(tmp_path)
            seen.append(found.name if found else "none")
            return result

        monkeypatch.setattr(owner, name, call)

    watched(Path, "rename")
    watched(Path, "write_text")
    watched(torch, "save")
    watched(shutil, "rmtree")
    write_checkpoint(tmp_path, 6)
    assert seen == sorted(seen)
    assert set(seen) == {"checkpoint-3", "checkpoint-6"}


@pytest.mark.parametrize("damage", ["missing", "shorter", "other size"])
def test_a_damaged_newer_checkpoint_falls_back_on_an_older_one(tmp_path, damage):
    older = write_checkpoint(tmp_path, 3)
    shutil.copytree(older, tmp_path / "kept")
    newer = write_checkpoint(tmp_path, 6)
    shutil.copytree(tmp_path / "kept", older)
    file = newer / ("trainer_state.json" if damage == "other size" else "optimizer.pt")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:50] if damage == "shorter" else b"{ }")
    notes: list[str] = []
    assert last_checkpoint(tmp_path, notes.append) == older
    assert notes == [f"note: {file}: damaged; going on from the older checkpoint-3"]
    shutil.rmtree(older)
    with pytest.raises(UserError, match=f"{file.name}: damaged; remove the folder {newer}"):
        last_checkpoint(tmp_path)
    assert write_checkpoint(tmp_path, 6) == last_checkpoint(tmp_path)  # the damaged one made room


def test_training_goes_on_from_the_older_checkpoint_to_the_same_bits(tmp_path, monkeypatch, capsys):
    settings = config(save_steps=4)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, _ = fit(tmp_path / "whole", settings, adapted_llama(dropout=0.3))
    folder = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_publish", keep_all(checkpoints._publish))
        fit(folder, settings, adapted_llama(dropout=0.3))
    (folder / "checkpoints" / "checkpoint-12" / "optimizer.pt").write_bytes(b"no")
    again, result = fit(folder, settings, adapted_llama(dropout=0.3))
    assert "optimizer.pt: damaged; going on from the older checkpoint-8" in capsys.readouterr().out
    assert result.resumed_from_step == 8  # though trained.json says that step 12 was the last
    assert curve(folder) == curve(tmp_path / "whole")
    for (name, one), (_, two) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def keep_all(publish):
    """``_publish`` that puts the pruned checkpoints back."""

    def call(folder, name, kept):
        aside = folder.parent / "aside"
        for old in folder.glob("checkpoint-*"):
            shutil.copytree(old, aside / old.name, dirs_exist_ok=True)
        publish(folder, name, kept)
        if aside.exists():
            shutil.copytree(aside, folder, dirs_exist_ok=True)

    return call


def test_early_stopping_is_final_however_it_was_interrupted(tmp_path, monkeypatch):
    settings = config(epochs=20, learning_rate=0.0, early_stopping_patience=2)
    fit(tmp_path, settings)
    (tmp_path / "checkpoints" / "trained.json").unlink()
    monkeypatch.setattr(training._WindowTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    assert fit(tmp_path, settings)[1].n_steps == 18


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_of_safetensors(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def torch_writer(*_, **__):
    raise RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file")


@pytest.mark.parametrize(
    ("function", "failure", "words"),
    [
        ("torch.save", full_disk, "no space is left on the disk of "),
        ("peft.peft_model.safe_save_file", full_disk_of_safetensors, "no space is left on the disk of "),
        ("torch.save", torch_writer, "PytorchStreamWriter failed writing file"),
        ("lora_one.checkpoints.to_disk", full_disk, "no space is left on the disk of "),
    ],
)
def test_a_full_disk_costs_no_checkpoint(tmp_path, monkeypatch, function, failure, words):
    settings = config(save_steps=4)
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, _ = fit(tmp_path / "whole", settings)
    log = training.Log.on_log

    def fill_the_disk(self, args, state, control, **kwargs):
        log(self, args, state, control, **kwargs)
        if state.global_step == 5:
            patch.setattr(function, failure)

    with monkeypatch.context() as patch:
        patch.setattr(training.Log, "on_log", fill_the_disk)
        with pytest.raises(RunError, match=r"^the checkpoint of step 8 could not be written: ") as e:
            fit(tmp_path / "cut", settings)
    last = tmp_path / "cut" / "checkpoints" / "checkpoint-4"
    assert words in str(e.value)
    assert f"the last complete one is {last}; the same command goes on from there" in str(e.value)
    assert "\n" not in str(e.value)
    assert [path.name for path in last.parent.iterdir()] == [last.name]
    again, result = fit(tmp_path / "cut", settings)
    assert result.resumed_from_step == 4
    for (name, one), (_, two) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.fixture
def small_disk(tmp_path):
    """A disk of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(cli, tmp_path, small_disk):
    settings = ("debug=short", f"results_dir={small_disk}", "model.save_steps=2", "cache_dir=null")
    done = cli(*settings)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "the checkpoint of step 3 could not be written: no space is left on the disk of" in line
    assert last_checkpoint(only_run(small_disk)).name == "checkpoint-2"
    assert "Traceback" not in done.stderr
    record = json.loads((only_run(small_disk) / "record.json").read_text())
    assert record["status"] == "failed"
    assert record["error"] in line
