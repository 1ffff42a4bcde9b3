"""The estimate of a table's cost, and the launch of what is missing."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict

import pytest
from conftest import ROOT, load_script, run_program
from test_config import parse

from lora_one import reproduction
from lora_one.costs import Machine, Shape, estimate_cost, gpu_bytes, moment_bytes, shape_of
from lora_one.errors import UserError
from lora_one.published import Column, Line, Table, read_tables
from lora_one.records import new_record, run_id
from lora_one.reproduction import describe, plan_table, single_commands, sweep_commands, sweep_file

TABLES = read_tables()
# Llama-2-7B, by hand: 32 blocks of 4 squares of 4096 and 3 matrices of 4096 x 11008.
WEIGHTS, TARGETS, TRAINED = 6_738_415_616, 32 * (4 * 4096**2 + 3 * 4096 * 11008), 19_988_480
TOKEN_BYTES = 2 * (12 * 4096 + 4 * 11008) * 32 + 10 * 32000


@pytest.fixture(scope="module")
def script():
    return load_script("reproduce")


@pytest.fixture(scope="module")
def llama():
    return parse("dataset=meta_math")


def test_the_shape_of_a_llama(llama):
    assert shape_of(llama) == Shape(WEIGHTS, TRAINED, TARGETS, 4096, 11008, 32, 32000)
    assert shape_of(parse("model=t5xl", "dataset=gsm8k")) is None


def test_hours_by_the_closed_form(llama):
    machine = Machine(tflops=100, utilisation=0.5, mean_tokens=200)
    operations = 4 * WEIGHTS * 100_000 * 200 + (4 * WEIGHTS + 2 * TARGETS) * 8 * 200
    cost = estimate_cost(llama, machine)
    assert cost.tokens == 100_000 * 200
    assert cost.hours == pytest.approx(operations / 50e12 / 3600)
    full = estimate_cost(parse("dataset=meta_math", "peft=full_ft"), machine)
    assert full.hours == pytest.approx(6 * WEIGHTS * 100_000 * 200 / 50e12 / 3600)
    short = estimate_cost(parse("dataset=meta_math", "init=default", "model.max_steps=10"), machine)
    assert short.hours == pytest.approx(4 * WEIGHTS * 10 * 32 * 200 / 50e12 / 3600)
    fp32 = estimate_cost(parse("dataset=meta_math", "model.bf16=false"), Machine(100, 10, 0.5, 200))
    assert fp32.hours == pytest.approx(10 * cost.hours)


def test_tokens_are_no_more_than_the_longest_examples(llama):
    assert estimate_cost(llama, Machine(mean_tokens=9999)).tokens == 100_000 * 1024
    pair = parse("dataset=mrpc", "model.epochs=2")
    assert estimate_cost(pair, Machine(mean_tokens=9999)).tokens == 2 * (3668 - 200) * 256


def test_what_is_not_known_offline_stays_unknown():
    unknown = estimate_cost(parse("dataset=gsm8k", "model=t5xl"), Machine())
    assert (unknown.hours, unknown.gpu_bytes) == (None, None)
    no_rows = parse("dataset=meta_math", "dataset.rows=null")
    assert estimate_cost(no_rows, Machine()).hours is None
    assert estimate_cost(no_rows, Machine()).gpu_bytes > 0


def test_memory_by_the_closed_form(llama):
    shape = shape_of(llama)
    assert gpu_bytes(shape, llama) == 2 * WEIGHTS + 16 * TRAINED + 1024 * TOKEN_BYTES
    full = parse("dataset=meta_math", "peft=full_ft")
    assert gpu_bytes(shape_of(full), full) == 16 * WEIGHTS + 1024 * TOKEN_BYTES
    four = parse("dataset=meta_math", "model.quantization=4bit", "gradient_checkpointing=true")
    token = 2 * 4096 * 32 + 2 * (12 * 4096 + 4 * 11008) + 10 * 32000
    assert gpu_bytes(shape, four) == pytest.approx(0.53 * WEIGHTS + 16 * TRAINED + 1024 * token)
    given = parse("dataset=meta_math", "model.max_tokens_per_device=4096")
    assert gpu_bytes(shape, given) - gpu_bytes(shape, llama) == 3072 * TOKEN_BYTES
    moments = {
        name: moment_bytes(shape, parse(f"optimizer={name}").optimizer) for name in ("sgd", "lora_pro")
    }
    assert moments == {"sgd": 0, "lora_pro": 8 * TARGETS}


def test_memory_is_near_what_the_paper_measured(llama):
    (line,) = [line for line in TABLES["cost"].lines if line.method == "LoRA-One"]
    published = line.published["gigabytes"][0].value
    assert estimate_cost(llama, Machine()).gpu_bytes / 1e9 == pytest.approx(published, rel=0.1)


def own_table(*experiments: str, seeds=(0, 1)) -> Table:
    columns = tuple(Column(f"c{i}", "C", "test", True) for i in range(len(experiments)))
    line = Line("m", {column.name: text for column, text in zip(columns, experiments, strict=True)}, {})
    return Table("own", "t", "s", seeds, columns, (line,))


@pytest.fixture
def composing(monkeypatch, llama, tmp_path):
    """Configs that differ in a revision: that files compose is tested in test_experiments.py."""

    def compose(name, overrides=()):
        words = reproduction.command_of(name, overrides)
        model = llama.model.model_copy(update={"revision": " ".join(words)})
        return llama.model_copy(update={"model": model, "results_dir": str(tmp_path / "results")})

    monkeypatch.setattr(reproduction, "compose_experiment", compose)
    return compose


def finish(config, **metrics) -> None:
    record = new_record(config)
    record.status, record.metrics = "finished", metrics
    folder = reproduction.Path(config.results_dir) / run_id(config)
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(asdict(record)))


def test_what_is_finished_is_left_out(composing):
    table = own_table("a/x", "a/y", "a/x dataset=mnli")
    finish(composing("a/x").model_copy(update={"seed": 1}))
    plan = plan_table(table, [], Machine())
    assert [(e.name, e.finished, e.missing) for e in plan] == [
        *(("a/x", (1,), (0,)), ("a/y", (), (0, 1)), ("a/x dataset=mnli", (), (0, 1))),
    ]
    assert sweep_commands(plan) == [
        ["-m", "experiment=a/x,a/y", "seed=0,1"],
        ["-m", "experiment=a/x", "dataset=mnli", "seed=0,1"],
    ]
    assert single_commands(plan)[:2] == [["experiment=a/x", "seed=0"], ["experiment=a/y", "seed=0"]]
    assert "5 runs missing, 1 finished and skipped" in describe(plan, Machine())
    finish(composing("a/x"))
    (first, *_) = plan_table(table, ["seed=1,0"], Machine())
    assert (first.seeds, first.missing) == ((1, 0), ())
    assert len(sweep_commands([first])) == 0


def test_a_finished_run_without_a_benchmark_that_is_asked_for_is_missing(composing, monkeypatch):
    config = composing("a/x")
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"tasks": ["mmlu"]})})
    monkeypatch.setattr(reproduction, "compose_experiment", lambda *_: config)
    finish(config, test={"value": 1.0})
    finish(config.model_copy(update={"seed": 1}), mmlu={"value": 1.0})
    (experiment,) = plan_table(own_table("a/x"), [], Machine())
    assert (experiment.finished, experiment.missing) == ((1,), (0,))


def test_overrides_that_make_two_experiments_one_make_one_run(composing):
    plan = plan_table(own_table("a/x dataset=mnli", "a/x dataset=cola"), ["dataset=sst2"], Machine())
    assert single_commands(plan) == [["experiment=a/x", "dataset=sst2", f"seed={seed}"] for seed in (0, 1)]


def test_a_line_of_the_sweep_file_is_read_back_as_it_was(composing):
    odd = "dataset.prompt=Q: {a} it's"
    plan = plan_table(own_table("a/x", seeds=(3,)), [odd], Machine())
    assert shlex.split(sweep_file(plan)) == ["experiment=a/x", odd, "seed=3"]


@pytest.mark.parametrize("text", ["seed=a", "seed=", "seed=0,1.5", "+seed=-1"])
def test_seeds_that_are_none(composing, text):
    with pytest.raises(UserError, match="give whole numbers with commas"):
        plan_table(own_table("a/x"), [text], Machine())


def test_a_table_of_quotations_has_nothing_to_run():
    with pytest.raises(UserError, match="no experiment in it"):
        plan_table(Table("own", "t", "s", (0,), (), ()), [], Machine())


@pytest.mark.parametrize("name", TABLES)
def test_a_dry_run_prints_the_commands_of_every_run(script, composing, capsys, name):
    assert script.main([name, "--dry-run", "--on=one", "model.epochs=2", "seed=4,5"]) == 0
    out, err = capsys.readouterr()
    n_runs, commands = 0, [shlex.split(line) for line in out.splitlines()]
    for command in commands:
        assert command[:3] == ["python", "run_exp.py", "-m"] and "model.epochs=2" in command
        words = dict(word.split("=", 1) for word in command[3:])
        n_runs += len(words["experiment"].split(",")) * len(words["seed"].split(","))
    assert n_runs == len(TABLES[name].experiments()) * 2
    assert f"{n_runs} runs missing, 0 finished" in err
    assert "312 TFLOP/s" in err and "40% are reached" in err


def test_a_dry_run_of_a_real_table(script, capsys, tmp_path):
    asked = [f"results_dir={tmp_path}", "--on=one", "--mean-tokens=100", "--tflops=400", "seed=7"]
    assert script.main(["mmlu", "--dry-run", *asked]) == 0
    out, err = capsys.readouterr()
    files = "mmlu/lora,mmlu/lora_ga,mmlu/lora_one"
    assert shlex.split(out)[2:] == ["-m", f"experiment={files}", f"results_dir={tmp_path}", "seed=7"]
    hours = 4 * WEIGHTS * (51_760 - 1_000) * 100 / (400e12 * 0.4) / 3600
    assert f"| mmlu/lora |  | 7 | {hours:.2f} | {hours:.1f} | 20.2 |" in err
    assert list(tmp_path.iterdir()) == []


def test_the_shell_script_hands_everything_on(tmp_path):
    done = run_program(
        str(ROOT / "scripts" / "reproduce.sh"), "math", "a=b c", "--dry-run", PYTHON="/bin/echo"
    )
    assert done.stdout == "scripts/reproduce.py math a=b c --dry-run\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["maths"], "no such table: 'maths' (did you mean 'math'?)"),
        ([], "no table; give one of ablation_direction, "),
        (["mmlu", "--on=gpus"], "--on=gpus: there is no GPU here"),
        (["mmlu", "--on=slurm"], "--on=slurm: there is no sbatch here"),
    ],
)
def test_mistakes_get_one_line(script, composing, monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(script, "visible_gpus", list)
    assert script.main(arguments) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1


def test_what_is_at_hand(script, monkeypatch, tmp_path):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [script.place_of("auto", n) for n in (0, 1, 4)] == ["one", "one", "gpus"]
    assert script.place_of("one", 4) == "one"
    for name, code in (("sbatch", 0), ("sinfo", 1)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    assert script.place_of("auto", 1) == "one"  # Slurm's commands without a cluster
    (tmp_path / "sinfo").write_text("#!/bin/sh\nexit 0\n")
    assert script.place_of("auto", 1) == "slurm"
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert script.place_of("auto", 1) == "one"


def test_the_gpus_are_those_that_are_visible(script, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert script.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert script.visible_gpus() == ["4", "6"]


PROGRAM = (
    "import os, sys, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.3); sys.exit(int({}))"
)


def test_each_gpu_takes_the_next_run_and_a_failure_stops_no_other(script, tmp_path, capfd):
    places = [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "6"}]
    commands = [[sys.executable, "-c", PROGRAM.format(code)] for code in ("0", "3", "0", "0")]
    codes = script.Workers(places, tmp_path / "logs").run(commands)
    assert sorted(codes) == [0, 0, 0, 3]
    logs = [path.read_text().splitlines() for path in sorted((tmp_path / "logs").iterdir())]
    assert [log[0].split()[0] for log in logs] == ["-c"] * 4
    assert {log[1] for log in logs[:2]} == {log[1] for log in logs} == {"4", "6"}
    out, err = capfd.readouterr()
    assert "[4/4] on GPU" in out
    killed = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert script.Workers([{}], None).run([killed]) == [137]
    assert err.startswith("error: exit code 3: ") and len(err.splitlines()) == 1


def test_a_signal_reaches_the_runs_and_begins_no_other(script):
    program = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); time.sleep(60)"
    commands = [[sys.executable, "-c", program]] * 2
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    start = time.monotonic()
    assert script.Workers([{}], None).run(commands) == [75, 75]  # the run's, and this program's own
    assert time.monotonic() - start < 30
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_place_runs_sweeps_and_a_failure_counts_most(script, composing, monkeypatch):
    seen = []

    def run(self, commands):
        seen.extend((self.environments, self.logs, command) for command in commands)
        return list(codes)

    codes = [0, 75, 3, 1]
    monkeypatch.setattr(script.Workers, "run", run)
    assert script.main(["mmlu", "--on=one", "seed=0"]) == 3
    files = "mmlu/lora,mmlu/lora_ga,mmlu/lora_one"
    words = [sys.executable, "run_exp.py", "-m", f"experiment={files}", "seed=0"]
    assert seen == [([{}], None, words)]
    codes = [0, 75]
    assert script.main(["mmlu", "--on=one", "seed=0"]) == 75


def test_a_slurm_array_of_what_is_missing(script, composing, monkeypatch, tmp_path, capfd):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "slurm_array.sh", tmp_path / "scripts")
    (tmp_path / "run_exp.py").touch()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\necho "$@" > asked\n')
    sbatch.chmod(0o755)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("PYTHON", raising=False)
    asked = ["mmlu", "--on=slurm", "--sbatch=--gres=gpu:1 --array=%4", "seed=0,1"]
    path = tmp_path / "results" / "tables" / "mmlu.txt"
    assert script.main([*asked, "--dry-run"]) == 0
    *remarks, command = capfd.readouterr().out.splitlines()
    assert remarks[:2] == [f"# {path}", "# experiment=mmlu/lora seed=0"] and len(remarks) == 7
    assert shlex.split(command) == ["scripts/slurm_array.sh", "--gres=gpu:1", "--array=%4", str(path)]
    assert not path.exists()
    assert script.main(asked) == 0
    text = path.read_text()
    assert text.splitlines()[:2] == ["experiment=mmlu/lora seed=0", "experiment=mmlu/lora seed=1"]
    asked = (tmp_path / "asked").read_text().split()
    assert "--gres=gpu:1" in asked and "--array=1-6%4" in asked


PAGE = (ROOT / "docs" / "reproducing.md").read_text()
BLOCKS = re.findall(r"^```sh( gpu)?\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [shlex.split(line) for _, block in BLOCKS for line in block.splitlines()]


def test_the_page_names_every_table():
    rows = re.findall(r"^\| `(\w+)` \|.*?\| (\d+) \|", PAGE, re.MULTILINE)
    assert {name: int(n_runs) for name, n_runs in rows} == {
        table.name: len(table.experiments()) * len(table.seeds) for table in TABLES.values()
    }


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_commands_of_the_page(script, composing, cli, capfd, command):
    """Those that need GPUs as far as their options."""
    if command[0] == "python":
        assert cli(*command[2:]).returncode == 0
        return
    assert command[0] == "scripts/reproduce.sh"
    assert script.main([*command[1:], "--dry-run", "--on=one"]) == 0
    assert capfd.readouterr().out


def test_the_estimate_that_the_page_compares_with_the_paper(llama):
    plain = parse("dataset=meta_math", "init=default")
    assert round(estimate_cost(plain, Machine()).hours, 1) == 1.5
    published = 6 + 20 / 60
    assert estimate_cost(plain, Machine(utilisation=0.095)).hours == pytest.approx(published, rel=0.02)
    assert f"{estimate_cost(plain, Machine()).gpu_bytes / 1e9:.1f}" == "20.2"
    pro = parse("dataset=meta_math", "init=default", "optimizer=lora_pro")
    assert f"{estimate_cost(pro, Machine()).gpu_bytes / 1e9:.1f}" == "71.9"
    assert all(text in PAGE for text in ("1 h 30 and 20.2 GB estimated", "71.9 GB here", "9.5 %"))
