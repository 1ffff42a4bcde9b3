"""Sweeps through Hydra's launchers and sweepers: what each job came to, in whatever process it ran."""

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import ROOT, only_run, run_program
from test_interruption import record_of, signalled_at

from lora_one import sweeps, training
from lora_one.errors import UserError
from lora_one.interruption import UNFINISHED
from lora_one.sweeps import Outcome, prepare_engines, sweep_table

SHORT = ("debug=short",)
QUICK = (*SHORT, "eval.before_training=false", "eval.limit=2")
OPTUNA = ("-m", "hydra/sweeper=optuna", *QUICK)
RATES = "model.learning_rate=tag(log, interval(1e-4, 1e-2))"
ADAPTER = "adapter/adapter_model.safetensors"
needs = {
    name: pytest.mark.skipif(not sweeps._is_installed(plugin), reason=f"{plugin} is not installed")
    for name, plugin in [
        ("joblib", "hydra_joblib_launcher"),
        ("submitit", "hydra_submitit_launcher"),
        ("optuna", "hydra_optuna_sweeper"),
    ]
}


def rows_of(text: str) -> list[dict[str, str]]:
    """The jobs of the table in a program's output."""
    lines = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    head, _, *rows = [[cell.strip("| ") for cell in line] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def records_below(folder: Path) -> list[dict]:
    return [record_of(path.parent) for path in sorted(folder.rglob("record.json"))]


def test_the_table_holds_every_job_and_the_code_is_the_worst(cli, tmp_path):
    done = cli("-m", "peft.lora_r=4,500", "foo.bar=1", "seed=0,1", *QUICK)
    assert done.returncode == 2
    assert [row["remark"] for row in rows_of(done.stdout)] == ["unknown config key 'foo'"] * 4
    done = cli("-m", "peft.lora_r=4,500", *QUICK)
    assert done.returncode == 2
    good, bad = rows_of(done.stdout)
    record = record_of(only_run(tmp_path))
    loss = record["metrics"]["validation_loss"]
    assert (good["job"], good["choices"], good["run"]) == ("0", "peft.lora_r=4", record["run_id"])
    assert (good["state"], good["validation loss"]) == ("finished", f"{loss:.4f}")
    assert good["test"].startswith("0.0% ± 0.0% (n = ")
    assert (bad["state"], bad["validation loss"]) == ("failed", "")
    assert bad["remark"].startswith("peft.lora_r=500: is 500, but")
    assert f"folders: {tmp_path}/results/<run>" in done.stdout
    assert "error: 1 of 2 jobs failed" in done.stderr
    tables = [path.read_text() for path in tmp_path.rglob("table.md")]
    assert any(record["run_id"] in table for table in tables)


def test_a_repeated_sweep_runs_only_what_is_missing(cli, tmp_path):
    cli("-m", "seed=0,1", *QUICK)
    before = {path: path.read_bytes() for path in tmp_path.rglob("record.json")}
    done = cli("-m", "seed=range(0,3)", *QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("this run is finished, nothing to do") == 2
    assert [row["state"] for row in rows_of(done.stdout)] == ["finished"] * 3
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize(
    ("choices", "methods"),
    [
        ("+experiment=tiny_lora,tiny_lora_ga", 2),
        ("experiment=glob(tiny_*)", 4),
        ("experiment=glob(tiny_*,exclude=*full*)", 3),
        ("seed=range(3,9,2)", 3),
    ],
)
def test_lists_ranges_and_globs(cli, tmp_path, choices, methods):
    done = cli("-m", choices, "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trainable parameters") == methods
    assert not list(tmp_path.rglob("sweeps"))


def test_a_failed_dry_run_counts_too(cli):
    assert cli("-m", "peft.lora_r=4,0", "dry_run=true").returncode == 2


def test_a_table_of_one_job_and_of_none_finished():
    one = Outcome(0, ["seed=1"], state="finished", run_id="a", results_dir="out", validation_loss=0.5)
    assert "| 0 | seed=1 | a | finished | 0.5000 |" in sweep_table([one])
    assert "folders: out/<run>" in sweep_table([one])
    refused = Outcome(1, ["seed=x"], state="failed", error="a | b")
    assert "a \\| b" in sweep_table([refused])
    elsewhere = Outcome(1, ["seed=2"], state="finished", run_id="b", results_dir="other")
    assert "| out/a |" in sweep_table([one, elsewhere])
    assert "folders" not in sweep_table([one, elsewhere])


def test_a_job_whose_process_is_gone_is_said_to_have_died(tmp_path, capsys):
    journal = sweeps.Journal()
    journal.folder = tmp_path / "sweep"
    gone = subprocess.Popen(["true"])
    gone.wait()
    host = journal.home[0]
    journal.keep(Outcome(0, [], process=(host, gone.pid)))
    journal.keep(Outcome(1, [], process=(host, os.getpid())))
    journal.keep(Outcome(2, [], process=("another-host", gone.pid)))
    assert [outcome.state for outcome in journal.close()] == ["died", "running", "running"]
    assert "the same command goes on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hydra/launcher=joblib"], "has an effect only in a sweep; add -m"),
        (["-m", "hydra/launcher=submitit_slurm"], "there is no sbatch here"),
        (["-m", "hydra/launcher=jobs"], "hydra/launcher/jobs"),
        (["-m", "hydra/sweeper=optuna", "seed=0,1", "dry_run=true"], "a dry run has no losses"),
        (["-m", "hydra/sweeper=optuna"], "there is nothing to search; give for example"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@needs["joblib"]
@needs["submitit"]
@needs["optuna"]
def test_engines_that_cannot_be_used_are_refused_in_one_line(cli, monkeypatch, tmp_path, arguments, words):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = cli(*arguments, *SHORT)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("engine", [f"{group}={name}" for group, name in sweeps._ENGINES])
def test_an_engine_that_is_not_installed_names_the_extra(cli, monkeypatch, engine):
    monkeypatch.setattr(sweeps, "_is_installed", lambda _: False)
    done = cli("-m", engine, *SHORT)
    assert done.returncode == 2
    assert done.stderr == f"error: {engine}: is not installed; pip install -e '.[sweeps]'\n"


def test_processes_that_sweep_side_by_side_have_no_other_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert prepare_engines(["-m", "seed=0,1"]) == ["-m", "seed=0,1"]
    with pytest.raises(UserError, match="hydra/launcher=joblib: not under accelerate launch or torchrun"):
        prepare_engines(["-m", "hydra/launcher=joblib", "seed=0,1"])


@needs["joblib"]
def test_what_a_person_says_of_an_engine_stands_after_our_defaults():
    arguments = prepare_engines(["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=5"])
    assert arguments[0] == "-m"
    assert arguments.index("hydra.launcher.n_jobs=2") < arguments.index("hydra.launcher.n_jobs=5")


@needs["joblib"]
def test_joblib(tmp_path):
    """Two runs at the same time with one gradient, and two that fail."""
    command = [sys.executable, str(ROOT / "run_exp.py"), "-m", "hydra/launcher=joblib", *QUICK]
    command += ["model.learning_rate=1e-3,2e-3", "peft.lora_r=4,500", f"results_dir={tmp_path}/results"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    rows = rows_of(done.stdout)
    assert [row["state"] for row in rows] == ["finished", "failed"] * 2
    assert all(row["remark"].startswith("peft.lora_r=500: is 500") for row in rows[1::2])
    assert "error: 2 of 4 jobs failed" in done.stderr
    assert done.stdout.count("gradient: computed, kept in") == 1
    assert done.stdout.count("gradient: read from") == 1
    records = records_below(tmp_path)
    assert [record["status"] for record in records] == ["finished"] * 2
    for record in records:
        assert record["hardware"]["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
        assert "run_exp.py -m hydra.launcher.n_jobs=2" in record["code"]["command"]


@needs["joblib"]
@pytest.mark.slow
def test_a_signal_stops_the_jobs_of_joblib_with_checkpoints(tmp_path):
    command = [sys.executable, "run_exp.py", "-m", "hydra/launcher=joblib", *QUICK, "seed=0,1,2"]
    command += ["model.max_steps=2000", "model.epochs=1000", f"results_dir={tmp_path}/results"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as sweep:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.rglob("metrics.jsonl"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        sweep.send_signal(signal.SIGTERM)
        out, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == UNFINISHED
    rows = rows_of(out)
    assert [row["state"] for row in rows] == ["unfinished"] * 3
    assert [bool(re.search(r"stopped by .* after step", row["remark"])) for row in rows[:2]] == [True, True]
    assert rows[2]["remark"] == "not begun: the sweep was asked to stop"
    for record in records_below(tmp_path):
        assert record["status"] == "unfinished"
        assert training.last_checkpoint(tmp_path / "results" / record["run_id"]) is not None


@needs["submitit"]
def test_submitit_on_this_machine(tmp_path):
    """From another folder: the jobs find the code all the same."""
    command = [sys.executable, str(ROOT / "run_exp.py"), "-m", "hydra/launcher=submitit_local", *QUICK]
    command += ["peft.lora_r=4,500", f"results_dir={tmp_path}/results"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert [row["state"] for row in rows_of(done.stdout)] == ["finished", "failed"]
    record = record_of(only_run(tmp_path))
    assert record["status"] == "finished"
    logs = (tmp_path / "results" / "sweeps" / "submitit").rglob("*_0_log.out")
    assert any(record["run_id"] in log.read_text() for log in logs)


def test_submitits_signal_keeps_a_checkpoint_before_it_starts_the_job_again(cli, tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed")
    asked = []

    def theirs(number, frame):
        folder = only_run(tmp_path)
        asked.append((record_of(folder)["status"], training.last_checkpoint(folder).name))

    before = signal.signal(signal.SIGUSR2, theirs)
    try:
        with monkeypatch.context() as patch:
            patch.setenv("SUBMITIT_EXECUTOR", "local")
            patch.setattr(training.Log, "on_log", signalled_at(2, signal.SIGUSR2))
            done = cli(*QUICK, "model.max_steps=5")
        assert signal.getsignal(signal.SIGUSR2) is theirs
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert done.returncode == UNFINISHED
    assert asked == [("unfinished", "checkpoint-3")]
    assert cli(*QUICK, "model.max_steps=5").returncode == 0
    assert record_of(only_run(tmp_path))["training"]["resumed_from_step"] == 3


SBATCH = """
    #!{python}
    # Slurm's sbatch: notes what is submitted, and starts every task of the array.
    import os, pathlib, re, subprocess, sys
    here = pathlib.Path(__file__).parent
    script = pathlib.Path(sys.argv[-1]).read_text()
    number = 4242 + len(list(here.glob("submitted-*")))
    (here / f"submitted-{{number}}").write_text(script)
    array = re.search("#SBATCH --array=0-([0-9]+)", script)
    for task in range(int(array[1]) + 1) if array else [None]:
        environment = dict(os.environ, SLURM_JOB_ID=str(number), SLURM_PROCID="0", SLURM_NTASKS="1")
        if task is not None:
            environment.update(SLURM_ARRAY_JOB_ID=str(number), SLURM_ARRAY_TASK_ID=str(task))
        subprocess.Popen(["bash", "-c", script], env=environment, start_new_session=True,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print("Submitted batch job", number)
"""
SRUN = """
    #!/usr/bin/env bash
    # Slurm's srun without its options.
    until [[ -f $1 && -x $1 ]]; do shift; done
    exec "$@"
"""
SACCT = """
    #!/usr/bin/env bash
    printf 'JobID|State|NodeList\\n4242_0|RUNNING|here\\n4242_1|RUNNING|here\\n'
"""


@pytest.fixture
def slurm(tmp_path):
    """Stand-ins for Slurm's commands, on a PATH of their own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH.format(python=sys.executable)), ("srun", SRUN), ("sacct", SACCT)):
        (folder / name).write_text(textwrap.dedent(text).lstrip())
        (folder / name).chmod(0o755 | stat.S_IEXEC)
    return folder


@needs["submitit"]
def test_submitit_gives_slurm_one_array_for_a_sweep(slurm, tmp_path):
    command = ["-m", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", *QUICK]
    command += ["hydra.launcher.cpus_per_task=1", "hydra.launcher.array_parallelism=1", "peft.lora_r=4,500"]
    done = run_program(
        sys.executable,
        "run_exp.py",
        *command,
        f"results_dir={tmp_path}/results",
        PATH=f"{slurm}:{os.environ['PATH']}",
    )
    assert done.returncode == 2, done.stderr
    (script,) = [path.read_text() for path in slurm.glob("submitted-*")]
    for line in (
        "--array=0-1%1",
        "--job-name=lora-one",
        "--partition=gpu",
        "--cpus-per-task=1",
        "--time=60",
        "--signal=USR2@120",
        "--open-mode=append",
    ):
        assert f"#SBATCH {line}\n" in script
    assert [row["state"] for row in rows_of(done.stdout)] == ["finished", "failed"]
    record = record_of(only_run(tmp_path))
    assert (record["status"], record["job"]) == ("finished", "4242_0")


def test_a_pruned_run_says_so_is_left_alone_and_goes_on_without_the_limit(cli, tmp_path):
    cut, whole = f"results_dir={tmp_path}/cut", f"results_dir={tmp_path}/whole"
    setting = (*QUICK, "model.eval_epochs=0.07", "model.max_steps=4")
    done = cli(*setting, "model.prune_above=1", cut)
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path / "cut")
    record = record_of(folder)
    loss = record["metrics"]["validation_loss"]
    assert record["status"] == "pruned"
    assert record["error"] == (
        f"pruned after step 1 of 4: the validation loss {loss:.4g} is above model.prune_above=1"
    )
    assert f"{record['error']}; without the limit" in done.stdout
    assert record["training"]["n_steps"] == 1
    assert "test" not in record["metrics"]
    metrics = (folder / "metrics.jsonl").read_bytes()
    again = cli("-m", *setting, "model.prune_above=1", cut)
    assert again.returncode == 0
    (row,) = rows_of(again.stdout)
    assert (row["state"], row["validation loss"]) == ("pruned", f"{loss:.4f}")
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert cli(*setting, "model.prune_above=100", cut).returncode == 0
    assert (record_of(folder)["status"], record_of(folder)["training"]["resumed_from_step"]) == (
        "finished",
        1,
    )
    assert cli(*setting, whole).returncode == 0
    assert (folder / ADAPTER).read_bytes() == (only_run(tmp_path / "whole") / ADAPTER).read_bytes()


def test_a_run_is_not_pruned_when_it_has_ended(cli, tmp_path):
    assert cli(*QUICK, "model.prune_above=0", "model.eval_epochs=1").returncode == 0
    assert record_of(only_run(tmp_path))["status"] == "finished"


@needs["optuna"]
def test_optuna_searches_the_learning_rate_and_finds_its_runs_again(cli, tmp_path):
    search = (*OPTUNA, RATES, "hydra.sweeper.n_trials=3")
    done = cli(*search)
    assert done.returncode == 0, done.stderr
    records = records_below(tmp_path)
    losses = {r["config"]["model"]["learning_rate"]: r["metrics"]["validation_loss"] for r in records}
    assert len(losses) == 3
    assert all(1e-4 <= rate <= 1e-2 for rate in losses)
    found = (tmp_path / "results" / "optimization_results.yaml").read_text()
    best = min(losses, key=losses.__getitem__)
    assert f"model.learning_rate: {best}" in found
    assert f"best_value: {losses[best]}" in found
    again = cli(*search)
    assert again.stdout.count("this run is finished, nothing to do") == 3


@needs["optuna"]
def test_optuna_goes_on_after_trials_that_fail_diverge_or_are_pruned(cli, tmp_path):
    grid = ("hydra/sweeper/sampler=grid", "model.learning_rate=1e-3,1e38", "peft.lora_r=4,500")
    done = cli(*OPTUNA, *grid)
    assert done.returncode == 2
    rows = rows_of(done.stdout)
    assert sorted(row["state"] for row in rows) == ["failed"] * 3 + ["finished"]
    assert any("the validation loss is nan" in row["remark"] for row in rows)
    found = (tmp_path / "results" / "optimization_results.yaml").read_text()
    assert "model.learning_rate: 0.001" in found
    pruned = cli(*OPTUNA, RATES, "hydra.sweeper.n_trials=1", "model.prune_above=1", "model.eval_epochs=0.07")
    assert pruned.returncode == 0
    assert [row["state"] for row in rows_of(pruned.stdout)] == ["pruned"]
    assert "best_value: .inf" in (tmp_path / "results" / "optimization_results.yaml").read_text()


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs/sweeps.md").read_text(), re.DOTALL | re.MULTILINE)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


@needs["joblib"]
@needs["submitit"]
@needs["optuna"]
@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_on_sweeps(command, cli):
    """Without their launchers, which have tests above: as a dry run, or a search of one trial."""
    assert command[:3] == ["python", "run_exp.py", "-m"]
    here = [argument for argument in command[2:] if "hydra/launcher" not in argument]
    here = [argument for argument in here if "hydra.launcher" not in argument]
    launchers = [argument for argument in command if argument.startswith("hydra/launcher")]
    assert all(prepare_engines(["-m", launcher]) for launcher in launchers)
    is_search = "hydra/sweeper=optuna" in command
    done = cli(*here, *([*QUICK, "hydra.sweeper.n_trials=1"] if is_search else ["dry_run=true"]))
    assert done.returncode == 0, done.stderr


def test_the_command_for_slurm_composes(cli, slurm, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed")
    (text,) = re.findall(r"^```sh slurm\n(.*?)^```", (ROOT / "docs/sweeps.md").read_text(), re.DOTALL | re.M)
    monkeypatch.setenv("PATH", f"{slurm}:{os.environ['PATH']}")
    _, _, sweep, *arguments = shlex.split(text)
    assert (sweep, arguments[-1]) == ("-m", "seed=0,1,2")
    done = cli("--cfg", "hydra", "-p", "hydra.launcher", "hydra.mode=MULTIRUN", *arguments[:-1])
    assert done.returncode == 0, done.stderr
    assert "partition: gpu" in done.stdout
    assert "max_num_timeout: 100" in done.stdout
    assert "timeout_min: 240" in done.stdout


def test_outcomes_survive_the_way_through_their_files(tmp_path):
    journal = sweeps.Journal()
    journal.folder = tmp_path
    outcome = Outcome(3, ["seed=1"], objective=float("inf"), state="pruned", error="why")
    journal.keep(outcome)
    assert journal.collect() == [outcome]
    assert json.loads((tmp_path / "3.json").read_text())["state"] == "pruned"
