"""Nothing is lost: killed anywhere, any number of times, a run ends with the bits of an uninterrupted one."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, only_run

from lora_one.tracking import read_metrics

SETTINGS = [
    "debug=short",
    "model.max_steps=16",
    "model.save_steps=3",
    "model.eval_epochs=0.5",
    "peft.lora_dropout=0.1",
    "eval.limit=4",
    "eval.max_new_tokens=16",
    "eval.before_training=false",
]
# From the first thing that a run does to the last; each start is killed at one of them.
POINTS = [
    ("run_exp.prepare_data", 1, "before"),
    ("lora_one.gradients._Sample._run_batch", 5, "before"),
    ("lora_one.cache.save_file", 1, "half"),
    ("lora_one.portable.save_file", 1, "half"),  # the init file
    ("lora_one.portable.save_init", 1, "after"),
    ("lora_one.tracking.MetricsFile.append", 2, "after"),
    ("torch.save", 1, "half"),  # the first checkpoint: its optimiser
    ("torch.save", 3, "before"),  # its random state
    ("transformers.TrainerState.save_to_json", 1, "half"),
    ("pathlib.Path.rename", 1, "before"),
    ("pathlib.Path.rename", 1, "after"),
    ("lora_one.tracking.MetricsFile.append", 2, "half"),
    ("lora_one.checkpoints.to_disk", 3, "before"),
    ("pathlib.Path.rename", 2, "before"),  # two complete checkpoints
    ("shutil.rmtree", 2, "half"),  # pruning
    ("lora_one.training.validation_loss", 1, "after"),
    ("torch.save", 4, "half"),
    ("lora_one.training.write_text", 1, "before"),  # trained, but nobody says so
    ("lora_one.portable.save_file", 1, "half"),  # the adapter
    ("run_exp.grade", 1, "before"),
    ("run_exp.plot_run", 1, "before"),
    ("lora_one.runs.finish", 1, "after"),
]
RANDOM_POINTS = [
    ("pathlib.Path.replace", 12),
    ("pathlib.Path.rename", 6),
    ("torch.save", 9),
    ("shutil.rmtree", 5),
    ("lora_one.files.os.fsync", 40),
    ("lora_one.tracking.MetricsFile.append", 8),
]


class Starts:
    """Starts the program; forks of one process, so that the imports are paid for once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.server = subprocess.Popen(
            [sys.executable, "tests/killed_starts.py"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.server.stdout.readline().strip() == "0"

    def __call__(self, name: str, death: tuple | None = None) -> int:
        start = {
            "arguments": [*SETTINGS, f"results_dir={self.folder / name}"],
            "log": str(self.folder / f"{name}.log"),
            "death": death,
        }
        self.server.stdin.write(json.dumps(start) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def result(self, name: str) -> tuple[bytes, list[dict]]:
        """The adapter's bytes, and every row of the metrics without its time."""
        folder = only_run(self.folder / name)
        assert json.loads((folder / "record.json").read_text())["status"] == "finished"
        assert not (folder / "checkpoints").exists()
        rows = read_metrics(folder / "metrics.jsonl")
        for row in rows:
            del row["seconds"]
        return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), rows

    def finish(self, name: str) -> tuple[bytes, list[dict]]:
        assert self(name) == 0, (self.folder / f"{name}.log").read_text()
        return self.result(name)


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    starts = Starts(tmp_path_factory.mktemp("starts"))
    yield starts
    starts.server.stdin.close()
    starts.server.wait(timeout=60)


@pytest.fixture(scope="module")
def whole(starts):
    """What an uninterrupted run leaves."""
    adapter, rows = starts.finish("whole")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 17))
    assert [row["step"] for row in rows if "eval_loss" in row] == [8, 16]
    return adapter, rows


@pytest.mark.slow
def test_killed_at_every_stage(starts, whole):
    for point in POINTS:
        assert starts("staged", point) == -signal.SIGKILL, point
    print(f"{len(POINTS)} named kill points")
    assert starts.finish("staged") == whole


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_calls(starts, whole, seed):
    choice, n_killed, name = random.Random(seed), 0, f"random{seed}"
    for _ in range(7):
        function, most = choice.choice(RANDOM_POINTS)
        death = (function, choice.randint(1, most), choice.choice(("before", "after")))
        status = starts(name, death)
        assert status in (0, -signal.SIGKILL), death
        n_killed += status != 0
    print(f"{n_killed} random kill points")
    assert n_killed >= 5
    assert starts.finish(name) == whole


@pytest.mark.slow
def test_killed_by_the_clock(starts, whole):
    choice = random.Random(2)
    seconds = [choice.uniform(0.2, 1.6) for _ in range(6)]
    n_killed = sum(starts("clock", ("seconds", s, "")) == -signal.SIGKILL for s in seconds)
    print(f"{n_killed} kills by the clock")
    assert starts.finish("clock") == whole
