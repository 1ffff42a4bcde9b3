"""``eval.tasks`` of ``run_exp.py``, and the programs of ``eval/`` on what it leaves."""

import json
import shutil
import sys
from argparse import Namespace

import pytest
from conftest import EMBEDDED, only_run, run_program, run_script

from eval import eval_gsm8k
from eval.command import report
from eval.results import EvalResult, share
from lora_one.data.tiny import problems
from lora_one.errors import UserError

N = 6
SHORT = ("debug=short", "eval.before_training=false", "eval.max_new_tokens=16")


@pytest.fixture
def questions(tmp_path):
    """The embedded model's own kind of problems, in GSM8K's columns."""
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in problems("test", N)))
    return path


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


def test_a_benchmark_runs_on_the_adapter_just_trained(cli, tmp_path, questions):
    done = cli(*SHORT, "eval.tasks=[gsm8k]", f"eval.data.gsm8k={questions}")
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path / "results")
    assert record_of(folder)["metrics"]["gsm8k"]["n"] == N
    rows = [json.loads(line) for line in (folder / "gsm8k.jsonl").open()]
    # The test split has the same problems, cut at 16 tokens; a benchmark has its own limit.
    tested = {row["prompt"]: row["generated"] for row in map(json.loads, (folder / "test.jsonl").open())}
    assert all(row["generated"].startswith(tested[row["prompt"]]) for row in rows)
    assert "gsm8k exact_match" in done.stdout
    assert not (folder / "answers").exists()
    assert not (folder / "merged").exists()


def test_a_finished_run_makes_only_the_benchmark_that_it_lacks(cli, tmp_path, questions):
    cli(*SHORT)
    folder = only_run(tmp_path / "results")
    before = record_of(folder)
    done = cli(*SHORT, "eval.tasks=[gsm8k]", f"eval.data.gsm8k={questions}")
    assert done.returncode == 0, done.stderr
    after = record_of(folder)
    assert after["metrics"]["gsm8k"]["n"] == N
    assert after["metrics"]["test"] == before["metrics"]["test"]
    assert after["training"] == before["training"]
    again = cli(*SHORT, "eval.tasks=[gsm8k]", f"eval.data.gsm8k={questions}")
    assert "nothing to do" in again.stdout
    shorter = cli(*SHORT, "eval.tasks=[gsm8k]", f"eval.data.gsm8k={questions}", "eval.limit=2")
    assert shorter.returncode == 0, shorter.stderr
    assert record_of(folder)["metrics"]["gsm8k"]["n"] == 2


def test_a_figure_of_fewer_problems_is_not_taken_for_one_of_all(cli, tmp_path, questions):
    data = f"eval.data.gsm8k={questions}"
    cli(*SHORT, "eval.tasks=[gsm8k]", data, "eval.limit=2")
    cli(*SHORT, data, "eval.limit=null")  # the test split is another one now, the benchmark was not asked for
    cli(*SHORT, "eval.tasks=[gsm8k]", data, "eval.limit=null")
    figures = record_of(only_run(tmp_path / "results"))["metrics"]["gsm8k"]
    assert (figures["n"], figures["limit"], figures["data"]) == (N, None, str(questions))


@pytest.mark.parametrize(
    ("dataset", "row", "words"),
    [
        ("gsm8k", {"question": "a", "answer": "nothing"}, "test split, row 1: no number after '####'"),
        (
            "commonsense_reasoning",
            {"instruction": "a", "input": "", "output": "7", "answer": "7"},
            "test split, row 1: the answer '7' is no answer word",
        ),
    ],
)
def test_a_faulty_test_split_is_found_before_training(cli, tmp_path, dataset, row, words):
    good = {"gsm8k": [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(80)]}.get(
        dataset, [row | {"instruction": f"{i}", "answer": "true"} for i in range(80)]
    )
    for name, rows in (("train", good), ("test", [row])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    files = [f"dataset.{name}_file={tmp_path}/{name}.jsonl" for name in ("train", "test")]
    done = cli(*SHORT, f"dataset={dataset}", "model=tiny", *files)
    assert done.returncode == 2
    assert words in done.stderr
    assert "[model]" not in done.stdout


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("eval.tasks=[gsm8]", "no such benchmark: 'gsm8' (did you mean 'gsm8k'?)"),
        ("eval.data.gsm8=x", "no such benchmark: 'gsm8' (did you mean 'gsm8k'?)"),
        ("eval.data.gsm8k=nowhere.jsonl", "eval.data.gsm8k=nowhere.jsonl: no such file or folder"),
        ("eval.temperature=-1", "eval.temperature=-1"),
    ],
)
def test_a_mistyped_benchmark_is_refused_before_anything_is_loaded(cli, setting, words):
    done = cli(*SHORT, setting)
    assert done.returncode == 2
    assert words in done.stderr
    assert "[data]" not in done.stdout


def test_the_program_says_what_the_run_said(cli, tmp_path, questions):
    """Base and adapter, from inside eval/; and the merged folder, from the root."""
    cli(*SHORT, "eval.tasks=[gsm8k]", f"eval.data.gsm8k={questions}", "model.saving=true")
    folder = only_run(tmp_path / "results")
    flags = [f"--data={questions}", f"--output_dir={tmp_path}/eval"]
    apart = [f"--model_name={EMBEDDED}", f"--adapter={folder}/adapter"]
    generated = [json.loads(line)["generated"] for line in (folder / "gsm8k.jsonl").open()]
    for name, model in (
        (f"tiny_llama+{folder.name}-adapter", apart),
        (f"{folder.name}-merged", [f"--model_name={folder}/merged"]),
    ):
        done = run_program(sys.executable, "eval/eval_gsm8k.py", *model, *flags)
        assert done.returncode == 0, done.stderr
        assert "exact_match" in done.stdout
        place = tmp_path / "eval" / name / "gsm8k"
        rows = [json.loads(line) for line in (place / "samples.jsonl").open()]
        assert [row["generated"] for row in rows] == generated
        assert json.loads((place / "result.json").read_text())["n"] == N


def test_an_adalora_adapter_is_evaluated_though_it_cannot_be_trained_on(cli, tmp_path, questions):
    assert cli(*SHORT, "peft=adalora", "model.max_steps=12", "eval.task=null").returncode == 0
    adapter = only_run(tmp_path / "results") / "adapter"
    flags = (f"--model_name={EMBEDDED}", f"--adapter={adapter}", f"--data={questions}", "--limit=1")
    done = run_script("eval/eval_gsm8k.py", *flags, f"--output_dir={tmp_path}/eval")
    assert done.returncode == 0, done.stderr
    refused = cli(*SHORT, "init=adapter", f"init.adapter={adapter}", "peft=all")
    assert (refused.returncode, "is no LoRA adapter" in refused.stderr) == (2, True)


def test_an_adapter_for_another_model_is_refused(cli, tmp_path, questions):
    cli(*SHORT)
    folder = only_run(tmp_path / "results")
    other = tmp_path / "other"
    shutil.copytree(EMBEDDED, other)
    weights = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\0")
    flags = (f"--model_name={other}", f"--adapter={folder}/adapter", f"--data={questions}")
    done = run_script("eval/eval_gsm8k.py", *flags)
    assert done.returncode == 2
    assert f"{folder}/adapter: was made for another base model than {other}" in done.stderr
    assert "Traceback" not in done.stderr
    (folder / "record.json").write_text("{")
    with pytest.raises(UserError, match=r"record\.json: damaged"):
        eval_gsm8k.main([f"--model_name={EMBEDDED}", *flags[1:]])


@pytest.mark.parametrize("stored", ['{"asked": {"limit": 3}}', "{", "[]"])
def test_an_earlier_result_is_kept(tmp_path, capsys, stored):
    (tmp_path / "result.json").write_text(stored)
    figure = share([1.0, 0.0])
    result = EvalResult("gsm8k", "exact_match", figure, "greedy", 1.0, [])
    report(result, tmp_path, Namespace(limit=2, wandb_name=None))
    assert (tmp_path / "earlier-1" / "result.json").read_text() == stored
    assert json.loads((tmp_path / "result.json").read_text())["asked"]["limit"] == 2
    report(result, tmp_path, Namespace(limit=2, wandb_name=None))
    assert not (tmp_path / "earlier-2").exists()
    assert "earlier-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model_name=nowhere/at/all/x", "--limit=1"], "nowhere/at/all/x: "),
        ([f"--model_name={EMBEDDED}", "--adapter=/nowhere"], "--adapter=/nowhere: "),
        ([f"--model_name={EMBEDDED}", "--data=/nowhere.jsonl"], "/nowhere.jsonl: no such data file"),
        ([f"--model_name={EMBEDDED}", "--limit=0"], "must be at least 1"),
        ([f"--model_name={EMBEDDED}", "--limits=3"], "--limits"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, questions, flags, words):
    flags = [f"--data={questions}", f"--output_dir={tmp_path}", *flags]
    done = run_script("eval/eval_gsm8k.py", *flags)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
