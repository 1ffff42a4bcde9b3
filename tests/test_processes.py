"""Several processes of one launch: who writes, who computes what, and what happens when one dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, load_script, on_two_processes, only_run, random_examples, run_program, small_llama
from test_streaming import config as estimator_config

from lora_one.gradients import _Sample, estimate_gradient
from lora_one.models import linear_layers
from lora_one.processes import start_processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
LAUNCH += ["--config_file", "accelerate_config.yaml"]
LONG = ["debug=short", "model.max_steps=5000", "model.epochs=5000", "model.save_steps=5000", "eval.task=null"]

# Ahead of the program itself, on every process; ``rank`` is known.
PREAMBLE = """
import os, sys
sys.path.insert(0, {root!r})
import run_exp
from lora_one import training
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path({folder!r})
"""


def program(folder: Path, what: str) -> str:
    """A script that runs the program after some lines of its own."""
    path = folder / "program.py"
    text = PREAMBLE.format(root=str(ROOT), folder=str(folder))
    path.write_text(f"{text}\n{what}\nrun_exp.main()\n")
    return str(path)


def state_of(folder: Path) -> str:
    """What scripts/status.py says of the only run below ``folder``."""
    status = load_script("status")
    return status.describe(only_run(folder), 600)[status.HEAD.index("state")]


# ---- a process that dies

RAISES = """
step = training._WindowTrainer.training_step
def failing(self, *arguments):
    if rank == 1 and self.state.global_step == 3:
        raise ValueError("the third step of process 1")
    return step(self, *arguments)
training._WindowTrainer.training_step = failing
"""


@pytest.mark.slow
def test_an_exception_on_one_process_ends_the_launch_with_it_shown(tmp_path):
    script = program(tmp_path, RAISES)
    begin = time.monotonic()
    done = run_program(*TORCHRUN, script, *LONG, f"results_dir={tmp_path}/results", timeout=180)
    assert time.monotonic() - begin < 120  # the start on a busy machine; the 5,000 steps take far longer
    assert done.returncode != 0
    assert "error (process 1): ValueError: the third step of process 1" in done.stderr
    assert state_of(tmp_path) in ("dead", "failed", "unfinished")


NAMES_ITSELF = """
(folder / f"pid{rank}").write_text(str(os.getpid()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
def test_a_killed_process_ends_the_launch(dying, tmp_path):
    command = [*LAUNCH, program(tmp_path, NAMES_ITSELF), *LONG, f"results_dir={tmp_path}/results"]
    launch = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not any(path.read_text().count("\n") > 3 for path in tmp_path.rglob("metrics.jsonl")):
            assert launch.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        assert state_of(tmp_path) == "running"
        os.kill(int((tmp_path / f"pid{dying}").read_text()), signal.SIGKILL)
        killed = time.monotonic()
        _, errors = launch.communicate(timeout=60)
        assert time.monotonic() - killed < 45
    finally:
        launch.kill()
    assert launch.returncode != 0
    assert "exitcode  : -9" in errors
    assert f"rank      : {dying}" in errors
    assert state_of(tmp_path) in ("dead", "failed", "unfinished")
    for rank in (0, 1):  # nobody is left behind
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), 0)


# ---- who writes

# The mode of a file tells who made it, also where C++ did; the audit, who opened one to write. Safetensors
# gives its files a mode of its own, so there the writer is asked.
MARKS_ITS_FILES = """
import types, lora_one.runs, safetensors.torch
def write(tensors, path, *arguments, serialize=safetensors.torch.serialize_file, **settings):
    if rank:
        sys.stderr.write(f"OPENED {path}\\n")
    serialize(tensors, path, *arguments, **settings)
safetensors.torch.serialize_file = write
os.umask(0o006 if rank else 0)
def audit(event, arguments):
    if event != "open" or rank == 0 or not isinstance(arguments[0], (str, bytes)):
        return
    path, mode, flags = arguments
    path = os.fsdecode(path)
    if "results" in path and flags & (os.O_WRONLY | os.O_RDWR):
        sys.stderr.write(f"OPENED {path}\\n")
sys.addaudithook(audit)
lora_one.runs.shutil = types.SimpleNamespace(rmtree=lambda *_, **__: None)  # what a finished run removes
"""


@pytest.mark.slow
def test_only_the_main_process_writes(tmp_path):
    """In the run's folder; digests of weights, a cache of every machine's own, are anybody's."""
    script = program(tmp_path, MARKS_ITS_FILES)
    extra = ["eval.limit=4", "eval.max_new_tokens=8", "model.saving=true", "model.save_steps=2"]
    folder = f"results_dir={tmp_path}/results"
    done = run_program(*TORCHRUN, script, "debug=short", *extra, folder, f"cache_dir={tmp_path}/cache")
    assert done.returncode == 0, done.stderr[-3000:]
    files = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert any(path.name == "adapter_model.safetensors" for path in files)
    files = [path for path in files if path.suffix != ".safetensors"]
    of_main = {path.name for path in files if path.stat().st_mode & 0o006}
    assert {"record.json", "optimizer.pt", "rng_state_0.pth", "metrics.jsonl", "test.jsonl"} <= of_main
    of_others = {path.name for path in files if not path.stat().st_mode & 0o006}
    assert of_others == {"rng_state_1.pth"}
    opened = {Path(line.split()[1]).name for line in done.stderr.splitlines() if line.startswith("OPENED")}
    assert opened <= {"rng_state_1.pth", "run.lock"}, opened


# ---- who computes what


def counted_estimate(folder: str, estimator: str) -> None:
    processes, seen, run_batch = start_processes(), [], _Sample._run_batch

    def counting(self, number, slots):
        seen.append([index for index, _ in slots if index >= 0])
        return run_batch(self, number, slots)

    _Sample._run_batch = counting
    model = small_llama()
    targets = tuple(linear_layers(model))
    estimate_gradient(
        model,
        targets,
        random_examples(64),
        estimator_config(estimator, bsz=4, iters=12),
        ranks=dict.fromkeys(targets, 4),
        pad_id=0,
        processes=processes,
    )
    (Path(folder) / f"{processes.rank}.json").write_text(json.dumps(seen))


@pytest.mark.parametrize(("estimator", "n_passes"), [("exact", 1), ("sketch", 1), ("sketch_two_pass", 2)])
def test_the_estimate_is_shared_and_not_repeated(estimator, n_passes, tmp_path):
    on_two_processes(counted_estimate, str(tmp_path), estimator)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == len(second) == 6 * n_passes  # of twelve batches
    for number in range(n_passes):
        part = slice(6 * number, 6 * number + 6)
        examples = [index for batch in first[part] + second[part] for index in batch]
        assert len(examples) == len(set(examples)) == 48


# ---- what a launcher may be told


def test_sharding_launchers_are_refused_in_one_line(cli, monkeypatch):
    for name, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        with monkeypatch.context() as patch:
            patch.setenv(name, "true")
            done = cli("debug=short")
        assert done.returncode == 2
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
        assert line.startswith(f"error: {what} was asked of the launcher")
        assert "scripts/launchers/multi_gpu.yaml" in line


LAUNCH_FILES = sorted((ROOT / "scripts" / "launchers").glob("*.yaml"))


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_launch_files_are_accelerates_and_begin_with_their_command(path):
    first, second, *_ = path.read_text().splitlines()
    assert f"accelerate launch --config_file scripts/launchers/{path.name}" in first
    is_cpu = path.stem == "cpu"
    assert ("not run here" in second) is not is_cpu
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes == {"cpu": 2, "two_nodes": 16}.get(path.stem, 8)
    kind = {"fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}.get(path.stem, "MULTI_GPU")
    assert loaded.distributed_type == kind
    # Every key is one that the launcher has: it would leave others out without a word.
    settings = {**(loaded.fsdp_config or {}), **(loaded.deepspeed_config or {})}
    options = {action.dest for action in launch_command_parser()._actions}
    for key in settings:
        assert key in options or f"fsdp_{key}" in options, key
    if kind == "DEEPSPEED":
        assert settings["zero_stage"] == int(path.stem[-1])
    if kind == "FSDP":
        assert settings["fsdp_version"] == 2


def test_the_cpu_file_starts_two_processes(tmp_path):
    line = (ROOT / "scripts" / "launchers" / "cpu.yaml").read_text().splitlines()[0].removeprefix("# ")
    setting, *words = line.split()
    assert words[:2] == ["accelerate", "launch"]
    name, value = setting.split("=")
    done = run_program(*LAUNCH[:5], *words[2:], "dry_run=true", **{name: value})
    assert done.returncode == 0, done.stderr[-2000:]
    assert ", 2 at a time" in done.stdout
