"""``scripts/slurm_array.sh`` and ``docs/cluster-slurm.md`` on a real Slurm node: ``make test-slurm``."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, only_run, run_program
from slurm_node import SlurmNode, missing_programs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(280)]
DOC = (ROOT / "docs" / "cluster-slurm.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", DOC, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
# Long enough to be interrupted, and with random numbers whose state a checkpoint must hold.
LONG = "debug=short model.max_steps=100 model.epochs=100 model.eval_epochs=100 model.save_steps=5 "
LONG += "peft.lora_dropout=0.1 eval.task=null"
ADAPTER = "adapter/adapter_model.safetensors"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}


@pytest.fixture(scope="module")
def node(request):
    if "slurm" not in request.config.option.markexpr or "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("needs a Slurm node of its own: make test-slurm")
    missing = missing_programs()
    if missing:
        pytest.skip(f"Slurm is not installed ({missing[0]} is missing): python tests/slurm_node.py install")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets want a short path
    node = SlurmNode(folder)
    try:
        node.start()
        yield node
    finally:
        node.stop()
        shutil.rmtree(folder, ignore_errors=True)


class Cluster:
    """A user's working folder on the cluster."""

    def __init__(self, node: SlurmNode, folder: Path, used: set[str]) -> None:
        self.node, self.folder, self.used = node, folder, used
        for name in ("run_exp.py", "scripts", "accelerate_config.yaml"):
            (folder / name).symlink_to(ROOT / name)

    def run(self, command: str, **environment: str) -> str:
        """The output of a command that must not fail."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{self.node.environment['PATH']}"
        settings = {"OMP_NUM_THREADS": "1", "WAIT_SECONDS": "5"} | environment
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=clean | self.node.environment | {"PATH": path} | settings,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def doc(self, command: str, array: int = 17, task: int = 3, extra: str = "") -> str:
        """A command of the doc, about another array and task than its ``17_3``."""
        assert command in COMMANDS
        self.used.add(command)
        return self.run(command.replace("17_3", f"{array}_{task}").replace(" 17", f" {array}") + extra)

    def submit(self, *lines: str, options: str = "") -> int:
        """An array of these runs."""
        (self.folder / "sweep.txt").write_text("\n".join(lines) + "\n")
        return number(self.run(f"scripts/slurm_array.sh {options} sweep.txt"))

    def tasks(self, array: int) -> dict[int, dict[str, str]]:
        """What Slurm knows of the array's tasks, by number; those that never started may be missing."""
        found = {}
        for line in self.run(f"scontrol show job -o {array}").splitlines():
            fields = dict(re.findall(r"(\w+)=(\S*)", line))
            if fields.get("ArrayTaskId", "").isdigit():
                found[int(fields["ArrayTaskId"])] = fields
        return found

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 240) -> None:
        """Until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-3000:] for path in self.folder.glob("slurm*/*.log"))
                pytest.fail(f"waited {seconds} s until {what}\n{self.run('squeue')}\n{logs}")
            time.sleep(0.3)

    def wait_for_end(self, array: int, *numbers: int) -> dict[int, dict[str, str]]:
        """Until these tasks are at their end."""

        def ended() -> bool:
            tasks = self.tasks(array)
            return all(n in tasks and tasks[n]["JobState"] in ENDED for n in numbers)

        self.wait(ended, f"tasks {numbers} of array {array} have ended")
        tasks = self.tasks(array)
        for n in numbers:
            fields = tasks[n]
            shown = ", ".join(f"{key} {fields[key]}" for key in ("JobState", "Restarts", "ExitCode"))
            print(f"job {array}_{n} (JobId {fields['JobId']}): {shown}")
        return tasks

    def wait_for_steps(self, results: str, n: int = 6) -> Path:
        """Until the only run there has taken some steps; its folder."""

        def trained() -> bool:
            files = list((self.folder / results).rglob("metrics.jsonl"))
            return bool(files) and files[0].read_text().count("\n") >= n

        self.wait(trained, f"{results} has {n} steps")
        return only_run(self.folder / results)

    def log(self, array: int, task: int) -> str:
        """What a task printed, in all its starts."""
        return (self.folder / "slurm" / f"{array}_{task}.log").read_text()

    def state(self, results: str) -> str:
        """What scripts/status.py says of the only run there."""
        table = self.run(f"python scripts/status.py {results}")
        return table.splitlines()[2].split("|")[2].strip()


def number(output: str) -> int:
    return int(re.search(r"Submitted batch job (\d+)", output)[1])


def record_of(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())


@pytest.fixture(scope="module")
def used():
    """The doc's commands that have been run."""
    return set()


@pytest.fixture
def cluster(node, tmp_path, used):
    yield Cluster(node, tmp_path, used)
    for line in subprocess.run(
        ["squeue", "--noheader", "--format=%A"],
        env=os.environ | node.environment,
        capture_output=True,
        text=True,
    ).stdout.split():
        node.command("scancel", line)


@pytest.fixture(scope="module")
def whole(node, tmp_path_factory):
    """The adapter of the long run that nothing interrupted."""
    results = tmp_path_factory.mktemp("whole")
    done = run_program(
        sys.executable, "run_exp.py", *LONG.split(), f"results_dir={results}", OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stderr
    return (only_run(results) / ADAPTER).read_bytes()


def assert_went_on(cluster: Cluster, folder: Path, whole: bytes, job: str) -> None:
    record = record_of(folder)
    assert record["status"] == "finished"
    assert record["training"]["resumed_from_step"] > 0
    assert (record["job"], record["hardware"]["host"]) == (job, socket.gethostname())
    assert (folder / ADAPTER).read_bytes() == whole
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert Counter(point["step"] for point in steps if "loss" in point) == Counter(range(1, 101))
    print(f"{job}: went on from step {record['training']['resumed_from_step']}, same bits")


def test_an_array_makes_every_run_once_and_the_gradient_once(cluster):
    example = re.search(r"^```text\n(.*?)^```", DOC, re.DOTALL | re.MULTILINE)[1]
    rates = "".join(f"init.direction=LoRA-GA model.learning_rate={rate}e-3\n" for rate in (1, 2, 4))
    (cluster.folder / "sweep.txt").write_text(example + rates)
    lines = (2, 3, 4, 5, 7, 8, 9, 10)
    command = "scripts/slurm_array.sh --array=%2 --time=30 --cpus-per-task=1 --mem=2G sweep.txt"
    array = number(cluster.doc(command, extra=" debug=short results_dir=results"))
    cluster.wait(lambda: list(cluster.folder.rglob("record.json")), "there is a run")
    assert f"{array}_" in cluster.doc("squeue --me")
    assert "running" in cluster.doc("python scripts/status.py results")
    (cluster.folder / "sweep.txt").write_text("nothing that waiting tasks may read\n")
    tasks = cluster.wait_for_end(array, *lines)
    assert set(tasks) == set(lines)
    assert {(t["JobState"], t["ExitCode"], t["Restarts"]) for t in tasks.values()} == {
        ("COMPLETED", "0:0", "0")
    }
    records = [record_of(path.parent) for path in cluster.folder.rglob("record.json")]
    assert {record["status"] for record in records} == {"finished"}
    assert {record["hardware"]["host"] for record in records} == {socket.gethostname()}
    # Each task its own run, and none another's.
    assert Counter(record["job"] for record in records) == Counter(f"{array}_{line}" for line in lines)
    named = next(record for record in records if record["job"] == f"{array}_4")
    assert named["config"]["wandb"]["name"] == "the third line"
    logs = [cluster.log(array, line) for line in lines]
    assert all(log.count("[training]") == 1 for log in logs)
    # Seed 0 and seed 1 have a sample each; plain LoRA needs none.
    kinds = Counter(word for log in logs for word in re.findall(r"gradient: (computed|read)", log))
    assert kinds == {"computed": 2, "read": 5}
    assert "8 runs: 8 finished" in cluster.run("python scripts/status.py results")


def test_two_arrays_over_one_sweep_make_every_run_once(cluster):
    rates = [f"debug=short model.max_steps=16 results_dir=results model.learning_rate={n}e-3" for n in (1, 2)]
    arrays = [cluster.submit(*rates, options="--array=%1") for _ in range(2)]
    both = [cluster.wait_for_end(array, 1, 2) for array in arrays]
    # A task that found its run taken has come back until it was finished: so it ends after its run.
    assert {t["JobState"] for tasks in both for t in tasks.values()} == {"COMPLETED"}
    logs = {(array, n): cluster.log(array, n) for array in arrays for n in (1, 2)}
    waits = sum(log.count("another program is making this run; back in the queue") for log in logs.values())
    assert waits == sum(int(t["Restarts"]) for tasks in both for t in tasks.values())
    assert waits >= 1  # the first tasks of both start at the same moment
    assert len(list(cluster.folder.rglob("record.json"))) == 2
    for n in (1, 2):
        assert sorted(logs[array, n].count("[training]") for array in arrays) == [0, 1]
        assert sum(logs[array, n].count("this run is finished, nothing to do") for array in arrays) == 1
    text = "".join(logs.values())
    assert (text.count("gradient: computed"), text.count("gradient: read")) == (1, 1)
    print(f"{waits} times a task found its run taken")


def test_a_signalled_task_comes_back_and_a_killed_one_by_hand(cluster, whole):
    command = "sbatch --array=1-$(wc -l < sweep.txt) scripts/slurm_array.sh sweep.txt"
    (cluster.folder / "sweep.txt").write_text("results_dir=killed\nresults_dir=asked\n")
    array = number(cluster.doc(command, extra=f" {LONG}"))
    asked, killed = cluster.wait_for_steps("asked"), cluster.wait_for_steps("killed")
    # The last task's own number is the array's: it must not take the others along.
    assert cluster.tasks(array)[2]["JobId"] == str(array)
    cluster.doc("scancel --signal=USR1 --batch 17_3", array, 2)
    (pid,) = re.findall(r"process (\d+) on", (killed / "run.lock").read_text())
    os.kill(int(pid), signal.SIGKILL)
    task = cluster.wait_for_end(array, 1)[1]
    assert (task["JobState"], task["ExitCode"], task["Restarts"]) == ("FAILED", "137:0", "0")
    assert cluster.state("killed") == "dead"
    cluster.run("ln -s killed results")
    assert "1 dead" in cluster.doc("python scripts/status.py results --state dead,failed,unfinished")
    cluster.doc("scontrol requeue 17_3", array, 1)
    tasks = cluster.wait_for_end(array, 1, 2)
    assert {(t["JobState"], t["ExitCode"], t["Restarts"]) for t in tasks.values()} == {
        ("COMPLETED", "0:0", "1")
    }
    assert_went_on(cluster, asked, whole, f"{array}_2")
    assert_went_on(cluster, killed, whole, f"{array}_1")
    log = (cluster.folder / f"slurm-{array}_2.out").read_text()
    assert "stopped by SIGUSR1 after step" in log
    assert re.search("unfinished .exit code 75.; back in the queue.*start 2: ", log, re.DOTALL)


def test_a_task_at_its_time_limit_comes_back(cluster):
    """Slurm looks at limits twice a minute: these runs are longer than the others, and side by side."""
    longer = LONG.replace("=100", "=1000").replace("save_steps=5", "save_steps=500")
    untouched = cluster.submit(f"{longer} results_dir=untouched")
    limited = cluster.submit(f"{longer} results_dir=limited", options="--time=1 --signal=B:USR1@30")
    task = cluster.wait_for_end(limited, 1)[1]
    assert (task["JobState"], int(task["Restarts"]) >= 1) == ("COMPLETED", True)
    log = cluster.log(limited, 1)
    assert "stopped by SIGUSR1 after step" in log
    assert "DUE TO TIME LIMIT" not in log
    assert cluster.wait_for_end(untouched, 1)[1]["Restarts"] == "0"
    first, second = (only_run(cluster.folder / name) for name in ("untouched", "limited"))
    assert record_of(second)["training"]["resumed_from_step"] > 0
    assert (first / ADAPTER).read_bytes() == (second / ADAPTER).read_bytes()


def test_a_preempted_task_comes_back(cluster, whole):
    array = cluster.submit(f"{LONG} results_dir=results")
    folder = cluster.wait_for_steps("results")
    urgent = number(cluster.run("sbatch -p high --cpus-per-task=2 --output=/dev/null --wrap 'sleep 1'"))
    tasks = cluster.wait_for_end(array, 1)
    assert (tasks[1]["JobState"], tasks[1]["Restarts"]) == ("COMPLETED", "1")
    assert "JobState=COMPLETED" in cluster.run(f"scontrol show job {urgent}")
    assert "stopped by SIGUSR1 after step" in cluster.doc("tail slurm/17_3.log", array, 1) + cluster.log(
        array, 1
    )
    assert_went_on(cluster, folder, whole, f"{array}_1")


def test_a_task_of_a_failed_node_comes_back(cluster, whole):
    array = cluster.submit(f"{LONG} results_dir=results")
    folder = cluster.wait_for_steps("results")
    cluster.node.fail()
    cluster.wait(lambda: cluster.state("results") == "dead", "the run is dead")
    cluster.node.start_slurmd()
    tasks = cluster.wait_for_end(array, 1)
    assert (tasks[1]["JobState"], tasks[1]["Restarts"]) == ("COMPLETED", "1")
    assert "stopped by" not in cluster.log(array, 1)
    assert_went_on(cluster, folder, whole, f"{array}_1")


def test_two_processes_come_back_together(cluster):
    array = cluster.submit(f"{LONG} results_dir=results", options="--gres=gpu:2")
    folder = cluster.wait_for_steps("results")
    cluster.doc("scancel --signal=USR1 --batch 17_3", array, 1)
    tasks = cluster.wait_for_end(array, 1)
    assert (tasks[1]["JobState"], tasks[1]["Restarts"]) == ("COMPLETED", "1")
    log = cluster.log(array, 1)
    assert "unfinished (exit code 75); back in the queue" in log
    assert log.count("scripts/launch.py") == 2
    record = record_of(folder)
    assert record["status"] == "finished"
    assert record["training"]["resumed_from_step"] > 0


def test_a_cancelled_array_stays_cancelled(cluster):
    array = cluster.submit(*(f"{LONG} results_dir=results seed={n}" for n in (1, 2, 3)), options="--array=%1")
    folder = cluster.wait_for_steps("results")
    cluster.doc("scancel 17", array)
    cluster.wait(lambda: not cluster.run("squeue --noheader").strip(), "the queue is empty", 60)
    time.sleep(8)  # requeued, it would be back by now
    assert not cluster.run("squeue --noheader").strip()
    assert cluster.tasks(array)[1]["JobState"] == "CANCELLED"
    assert cluster.tasks(array)[1]["Restarts"] == "0"
    assert only_run(cluster.folder / "results") == folder
    assert cluster.state("results") == "unfinished"
    assert list(folder.glob("checkpoints/checkpoint-*"))
    assert "not put back to the queue (JobState=CO" in cluster.log(array, 1)


def test_a_failed_run_is_a_failed_task(cluster):
    (cluster.folder / "sweep.txt").write_text("seed=first\n")
    array = number(cluster.doc("scripts/slurm_array.sh sweep.txt"))
    beyond = cluster.submit("seed=1", options="--array=9")
    for name, n, words in ((array, 1, "seed"), (beyond, 9, "has 1 lines, none for task 9")):
        fields = cluster.wait_for_end(name, n)[n]
        assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "2:0")
        (line,) = [line for line in cluster.log(name, n).splitlines() if line.startswith("error: ")]
        assert words in line


def test_every_command_of_the_doc_was_run(cluster, used):
    plan = next(command for command in COMMANDS if "dry_run=true" in command)
    assert "LoRA-GA" in cluster.doc(plan)
    rest = set(COMMANDS) - used
    assert rest == {command for command in COMMANDS if command.endswith("# needs GPUs")}
