"""``scripts/slurm_array.sh`` and ``scripts/launch.py`` with stand-ins for Slurm's commands."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, load_script, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs the bash of a Linux, 4.4 or newer")
SCRIPT = ROOT / "scripts" / "slurm_array.sh"
# Writes its arguments down, and ends as PROGRAM says.
PROGRAM = """
import os, signal, sys, time
with open("started", "a") as file:
    print(sys.argv, file=file)
what = os.environ.get("PROGRAM", "exit 0").split()
if what[0] == "wait":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    open("listens", "w").close()
if what[0] in ("wait", "deaf"):
    time.sleep(30)
sys.exit(int(what[1]))
"""
SWEEP = """# two rates
seed=1 'model.name=a b' "eval.tasks=[gsm8k, mmlu]"   # a remark

 seed=2 x=$HOME y=`touch pwned` z=* w=a#b "q='c d'"
seed=3"""


@pytest.fixture
def place(tmp_path):
    """A working folder in which the script finds a program and Slurm's commands."""
    (tmp_path / "run_exp.py").write_text(PROGRAM)
    (tmp_path / "sweep.txt").write_text(SWEEP)
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sbatch", "scontrol"):
        answer = 'echo "JobState=${STATE:-RUNNING} Reason=None"' if name == "scontrol" else ""
        (commands / name).write_text(f'#!/bin/bash\necho "{name} ${{*@Q}}" >> asked\n{answer}\n')
        (commands / name).chmod(0o755)
    return tmp_path


def command(place, *arguments, **environment):
    slurm = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    path = f"{place}/bin:{os.environ['PATH']}"
    return {
        "args": [str(SCRIPT), *arguments],
        "cwd": place,
        "env": slurm | {"PATH": path, "PYTHON": sys.executable} | environment,
    }


def run(place, *arguments, **environment):
    return subprocess.run(
        **command(place, *arguments, **environment), capture_output=True, text=True, timeout=60
    )


def task(place, number, *arguments, **environment):
    return run(place, "sweep.txt", *arguments, **as_task(number), **environment)


def as_task(number):
    return {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": str(number)}


def asked(place):
    file = place / "asked"
    return [shlex.split(line) for line in file.read_text().splitlines()] if file.exists() else []


def started(place):
    file = place / "started"
    return [eval(line)[1:] for line in file.read_text().splitlines()] if file.exists() else []


REQUEUE = ["scontrol", "requeue", "17_5"]


def test_submits_the_lines_that_hold_a_run_and_a_copy_of_the_file(place):
    done = run(place, "--partition=gpu", "--array=%2", "sweep.txt", "results_dir=a b")
    assert done.returncode == 0, done.stderr
    ((copy,),) = [list(place.glob("slurm/sweep-*.txt"))]
    assert copy.read_text() == SWEEP
    (call,) = asked(place)
    assert call == [
        *("sbatch", "--output=slurm/%A_%a.log", "--partition=gpu", "--array=2,4-5%2", str(SCRIPT)),
        *(str(copy.relative_to(place)), "results_dir=a b"),
    ]
    assert run(place, "--array=5", "sweep.txt").returncode == 0
    assert "--array=5" in asked(place)[1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (2, ["seed=1", "model.name=a b", "eval.tasks=[gsm8k, mmlu]"]),
        (4, ["seed=2", "x=$HOME", "y=`touch", "pwned`", "z=*", "w=a#b", "q='c d'"]),
        (5, ["seed=3"]),
    ],
)
def test_a_task_runs_its_line(place, line, words):
    done = task(place, line, "results_dir=a b")
    assert done.returncode == 0, done.stderr
    assert started(place) == [["results_dir=a b", *words]]
    assert not (place / "pwned").exists()
    assert f"job 17_{line} on " in done.stdout
    assert asked(place) == []


def test_a_line_without_a_run_is_nothing_to_do(place):
    for line in (1, 3):
        done = task(place, line)
        assert done.returncode == 0
        assert f"line {line} of sweep.txt holds no run" in done.stdout
    assert started(place) == []


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ([], {}, "no sweep file"),
        (["none.txt"], {}, "none.txt: no such file"),
        (["-p", "gpu", "sweep.txt"], {}, "gpu: no such file; .*--option=value"),
        (["empty.txt"], {}, "empty.txt: no run in it"),
        (["broken.txt"], {}, "broken.txt, line 2: no closing quotation"),
        (["none.txt"], as_task(1), "none.txt: no such file"),
        ([], as_task(1), "no sweep file"),
        (["broken.txt"], as_task(2), "broken.txt, line 2: no closing quotation"),
        (["sweep.txt"], as_task(6), r"sweep.txt: has 5 lines, none for task 6; submit --array=1-5"),
        (["sweep.txt"], {"PYTHON": "no-python"}, "PYTHON=no-python: no such program"),
        (["sweep.txt"], {"PROCESSES": "all"}, "PROCESSES=all: not a number"),
    ],
)
def test_bad_input_is_one_line(place, arguments, environment, words):
    (place / "empty.txt").write_text("# nothing\n\n")
    (place / "broken.txt").write_text("seed=1\n'seed=2\n")
    done = run(place, *arguments, **environment)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert re.match(f"error: .*{words}", done.stderr), done.stderr
    assert asked(place) == started(place) == []


def test_it_wants_the_repositorys_root_and_an_array(place):
    (place / "elsewhere").mkdir()
    done = run(place, "sweep.txt")
    assert done.returncode == 0
    settings = command(place, "sweep.txt") | {"cwd": place / "elsewhere"}
    done = subprocess.run(**settings, capture_output=True, text=True)
    assert (done.returncode, "no run_exp.py" in done.stderr) == (2, True)
    copy = place / "slurm_script"  # what Slurm calls its copy of a job's script
    copy.write_bytes(SCRIPT.read_bytes())
    settings = command(place, "sweep.txt") | {"args": ["bash", str(copy), "sweep.txt"]}
    done = subprocess.run(**settings, capture_output=True, text=True)
    assert (done.returncode, "not an array" in done.stderr) == (2, True)


@pytest.mark.parametrize("code", [0, 1, 2, 130, 137])
def test_the_runs_exit_code_is_the_tasks(place, code):
    done = task(place, 5, PROGRAM=f"exit {code}")
    assert done.returncode == code
    assert asked(place) == []


def test_an_unfinished_run_goes_back_to_the_queue(place):
    done = task(place, 5, PROGRAM="exit 75")
    assert done.returncode == 75
    assert asked(place) == [["scontrol", "show", "job", "-o", "17_5"], REQUEUE]
    assert "unfinished (exit code 75); back in the queue" in done.stdout


def test_but_not_when_it_is_cancelled_or_was_there_too_often(place):
    done = task(place, 5, PROGRAM="exit 75", STATE="COMPLETING")
    assert done.returncode == 75
    assert "not put back to the queue (JobState=COMPLETING)" in done.stdout
    done = task(place, 5, PROGRAM="exit 75", SLURM_RESTART_COUNT="3", MAX_REQUEUES="3")
    assert done.returncode == 75
    assert "MAX_REQUEUES=3" in done.stdout
    assert REQUEUE not in asked(place)


def test_a_run_that_another_program_makes_is_looked_at_again_later(place):
    done = task(place, 5, PROGRAM="exit 76", WAIT_SECONDS="30")
    assert done.returncode == 76
    assert asked(place)[1:] == [REQUEUE, ["scontrol", "update", "JobId=17_5", "StartTime=now+30"]]
    assert (
        "another program is making this run; back in the queue, to be looked at again in 30 s" in done.stdout
    )


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("program", ["wait 0", "deaf 0"])
def test_a_signal_reaches_the_program_whether_it_listens_or_not_yet(place, number, program):
    settings = command(place, "sweep.txt", **as_task(5), PROGRAM=program)
    with subprocess.Popen(**settings, stdout=subprocess.PIPE, text=True) as shell:
        deadline = time.monotonic() + 30
        while not (place / ("listens" if "wait" in program else "started")).exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        shell.send_signal(number)
        output, _ = shell.communicate(timeout=10)
    code = 75 if "wait" in program else 128 + signal.SIGUSR1
    assert shell.returncode == code
    assert asked(place)[-1] == REQUEUE
    assert f"unfinished (exit code {code})" in output


def test_several_processes_are_started_by_accelerate(place):
    (place / "scripts").mkdir()
    (place / "scripts" / "launch.py").write_text(PROGRAM)
    options = ["--config_file", "accelerate_config.yaml", "--main_process_port", "0", "--num_processes"]
    assert task(place, 5, SLURM_GPUS_ON_NODE="4").returncode == 0
    assert task(place, 5, SLURM_GPUS_ON_NODE="4", PROCESSES="1").returncode == 0
    assert started(place) == [[*options, "4", "run_exp.py", "seed=3"], ["seed=3"]]


@pytest.mark.parametrize(
    ("codes", "code"), [([75, 75], 75), ([75, 1], 1), ([76], 76), ([-9, 75], 137), ([75, -11], 139)]
)
def test_a_failure_among_processes_is_not_called_unfinished(codes, code):
    assert load_script("launch").common_code(codes) == code


def test_the_launcher_ends_with_the_programs_exit_code(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import os, time\nos._exit(76) if os.environ['RANK'] == '0' else time.sleep(60)\n")
    options = ["--config_file", "accelerate_config.yaml", "--main_process_port", "0"]
    assert run_program(sys.executable, "scripts/launch.py", *options, str(program)).returncode == 76
