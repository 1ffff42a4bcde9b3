"""Every command of the README runs, shortened to a few steps."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import EMBEDDED, ROOT, run_program, run_script

BLOCKS = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
COMMANDS = [
    shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines() if line.strip()
]
SHORT = ["debug=short"]


@pytest.fixture
def own_files(tmp_path):
    """What ``path/to/`` stands for."""
    shutil.copytree(EMBEDDED, tmp_path / "model")
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(500)]
    for name, part in (("train", rows[:400]), ("test", rows[400:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return tmp_path


def test_the_first_two_commands_stand_at_the_top():
    assert COMMANDS[:2] == [["make", "run"], ["make", "test"]]
    # These tests may themselves have been started by make.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for command, program in (("run", "run_exp.py"), ("test", "-m pytest")):
        plan = subprocess.run(
            ["make", "-n", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert plan.stdout.splitlines()[-1].endswith(program)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[:2] == ["python", "run_exp.py"]], ids=" ".join)
def test_experiments_run(cli, own_files, command):
    arguments = [argument.replace("path/to/", f"{own_files}/") for argument in command[2:]]
    done = cli(*arguments, *SHORT)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr


def test_the_table_is_made(cli, tmp_path):
    sweep = next(c for c in COMMANDS if "-m" in c)
    assert cli(*sweep[2:], *SHORT, f"results_dir={tmp_path}/results").returncode == 0
    script = next(c for c in COMMANDS if "make_table" in c[1])
    shown = next(c for c in COMMANDS if "status" in c[1])
    assert "12 finished" in run_script(shown[1], f"{tmp_path}/results").stdout
    done = run_script(script[1], f"{tmp_path}/results")
    assert done.returncode == 0, done.stderr
    for method in ("lora ", "LoRA-GA", "LoRA-One", "full-ft"):
        assert method in done.stdout
    assert "missing" not in done.stdout
    report = next(c for c in COMMANDS if "make_report" in c[1])
    done = run_program(sys.executable, report[1], f"{tmp_path}/results")
    assert done.returncode == 0, done.stderr
    for name in ("table.md", "table.tex", "table.csv", "loss.png", "report.html"):
        assert (tmp_path / "results" / name).stat().st_size > 100


def test_accelerate_launch_runs(tmp_path):
    command = next(c for c in COMMANDS if c[0] == "accelerate")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *command[2:]]
    done = run_program(*launch, *SHORT, f"results_dir={tmp_path}/results")
    assert done.returncode == 0, done.stderr[-2000:]
    (record,) = tmp_path.rglob("record.json")
    assert json.loads(record.read_text())["status"] == "finished"


def test_every_command_is_tested():
    kinds = {" ".join(c[:2]) for c in COMMANDS}
    assert kinds == {
        "make run",
        "make test",
        "python run_exp.py",
        "accelerate launch",
        "python scripts/make_report.py",
        "python scripts/make_table.py",
        "python scripts/status.py",
    }
