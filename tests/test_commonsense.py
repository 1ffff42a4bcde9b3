"""The commonsense sets: words read from answers, files, the mean of several sets, and the program."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ALONE, EMBEDDED, ROOT, SHARED, run_program

from eval.benchmarks.commonsense import (
    ALL,
    PUBLISHED,
    SETS,
    grade_sets,
    grade_words,
    normalised_word,
    paper_word,
    read_sets,
)
from eval.engine.generation import Generated
from eval.subject import Request, Subject
from eval.tasks import TASKS, check_benchmarks
from lora_one.data.specs import Example
from lora_one.errors import UserError

# Set, generated text, word to paper, word to normalised.
WORDS = [
    ("boolq", "the correct answer is true", "true", "true"),
    ("boolq", " the correct answer is False.", "", "false"),
    ("boolq", "that is untrue, so false", "true", "false"),
    ("boolq", "TRUE", "", "true"),
    ("boolq", "false, not true", "false", "false"),
    ("boolq", "falsehoods", "false", None),
    ("boolq", "yes", "", None),
    ("boolq", "", "", None),
    ("boolq", "I do not know\n\n### Response:\ntrue", "", None),
    ("boolq", "no\n\n### Instruction:\nIs it true?", "true", None),
    ("piqa", "the correct answer is solution2", "solution2", "solution2"),
    ("piqa", "Solution2 is better than solution1", "solution1", "solution2"),
    ("piqa", "solution 1", "", None),
    ("social_i_qa", "the correct answer is answer3</s>", "answer3", "answer3"),
    ("ARC-Easy", "answer12 or answer4", "answer1", "answer4"),
    ("ARC-Challenge", "answer5", "answer5", "answer5"),
    ("ARC-Challenge", "answer6", "", None),
    ("openbookqa", "the correct answer isanswer2", "answer2", None),
    ("hellaswag", "(ending4)", "ending4", "ending4"),
    ("hellaswag", "ending5", "", None),
    ("winogrande", "option2.", "option2", "option2"),
    ("winogrande", "answer2", "", None),
]


@pytest.mark.parametrize(("name", "text", "paper", "normalised"), WORDS)
def test_words(name, text, paper, normalised):
    assert paper_word(text, SETS[name]) == paper
    assert normalised_word(text, SETS[name]) == normalised


def write_sets(folder: Path, names=tuple(SETS), n: int = 4) -> Path:
    """``{name}/test.json`` with the set's words as answers in turn."""
    for name in names:
        words = SETS[name]
        rows = [
            {"instruction": f"{name} {i}?", "input": "", "output": "", "answer": words[i % len(words)]}
            for i in range(n)
        ]
        (folder / name).mkdir(parents=True)
        (folder / name / "test.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/commonsense")
def test_real_sets_have_their_rows_and_both_rules_read_every_reference():
    sets = read_sets(ALL, SHARED / "data/commonsense")
    assert {name: len(examples) for name, examples in sets.items()} == {
        "boolq": 3270,
        "piqa": 1838,
        "social_i_qa": 1954,
        "hellaswag": 10042,
        "winogrande": 1267,
        "ARC-Challenge": 1172,
        "ARC-Easy": 2376,
        "openbookqa": 500,
    }
    for name, examples in sets.items():
        for example in examples:
            assert paper_word(example.target, SETS[name]) == example.answer
            assert normalised_word(example.target, SETS[name]) == example.answer
        assert examples[0].prompt.startswith(
            "Below is an instruction that describes a task. Write a response"
        )
        assert examples[0].prompt.endswith("\n\n### Response:\n")


def test_a_set_is_found_in_a_folder_of_sets_in_its_own_or_as_a_file(tmp_path):
    folder = write_sets(tmp_path, ("boolq", "piqa"))
    for place in (folder, folder / "piqa", folder / "piqa" / "test.json"):
        (examples,) = read_sets("piqa", place, 2).values()
        assert [example.answer for example in examples] == ["solution1", "solution2"]


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("piqa", None, "piqa/test.json: no such data file"),
        ("boolq", [], "boolq/test.json: has no rows"),
        ("boolq", [{"instruction": "a?"}], "boolq/test.json, row 1: no column 'answer'"),
        (
            "boolq",
            [{"instruction": "a?", "answer": "true"}, {"instruction": "b?", "answer": "yes"}],
            "boolq/test.json, row 2: the answer 'yes' is none of true, false; is this boolq",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, name, rows, words):
    if rows is not None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=words) as raised:
        read_sets(name, tmp_path)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_asked_for_is_said_before_training(tmp_path):
    with pytest.raises(UserError, match=r"^boolq: not on the Hub; give --data .in a run eval\.data\.boolq"):
        check_benchmarks(["boolq"], {})
    with pytest.raises(UserError, match=r"^commonsense: not on the Hub; .*eval\.data\.commonsense"):
        check_benchmarks([ALL], {})
    with pytest.raises(UserError, match=r"no such benchmark: 'bolq' .did you mean 'boolq'"):
        check_benchmarks(["bolq"], {})
    write_sets(tmp_path, ("boolq",))
    check_benchmarks(["boolq"], {"boolq": str(tmp_path)})
    with pytest.raises(UserError, match=r"piqa/test\.json: no such data file"):
        check_benchmarks([ALL], {ALL: str(tmp_path)})
    with pytest.raises(UserError, match="is a file; give the folder that holds boolq, piqa"):
        check_benchmarks([ALL], {ALL: str(tmp_path / "boolq" / "test.json")})
    assert {*SETS, ALL} <= set(TASKS)


def nobody(tokenizer) -> Subject:
    return Subject(torch.nn.Identity(), tokenizer, ALONE)


def test_several_sets_are_averaged_each_the_same(tokenizer, monkeypatch, tmp_path):
    asked = []

    def reply(subject, prompts, decoding, request):
        asked.append((request.folder, decoding))
        is_large = "hellaswag" in prompts[0]
        word = "ending1" if is_large else "TRUE"
        return Generated([f"the correct answer is {word}"] * len(prompts), {})

    monkeypatch.setattr("eval.benchmarks.commonsense.generate_counted", reply)
    sets = {
        "boolq": [Example(f"boolq {i}", "", "true" if i else "false", str(i)) for i in range(4)],
        "hellaswag": [Example(f"hellaswag {i}", "", f"ending{i % 4 + 1}", str(i)) for i in range(16)],
    }
    result = grade_sets(nobody(tokenizer), sets, Request(folder=tmp_path / "answers"))
    assert {name: figure.value for name, figure in result.others.items()} == {
        "boolq": 0.75,
        "hellaswag": 0.25,
        "normalised": 0.5,
        "paper": 0.125,
        "boolq, paper": 0.0,
        "hellaswag, paper": 0.25,
    }
    assert (result.task, result.metric, result.figure.value, result.figure.n) == (
        ALL,
        "mean_accuracy",
        0.5,
        20,
    )
    errors = 0.75 * 0.25 / 4, 0.25 * 0.75 / 16
    assert result.figure.standard_error == pytest.approx(sum(errors) ** 0.5 / 2)
    assert asked == [(tmp_path / "answers" / name, PUBLISHED) for name in sets]
    assert result.decoding == "sampled, temperature 0.1, top_p 0.75, top_k 40, 4 beams"
    rows = [json.loads(line) for line in result.samples_jsonl().splitlines()]
    assert [row["set"] for row in rows] == ["boolq"] * 4 + ["hellaswag"] * 16
    assert rows[1]["normalised"] and not rows[1]["paper"] and rows[1]["answer"] == "true"


def test_a_silent_model_is_wrong_and_counted(tokenizer, monkeypatch):
    made = Generated(["answer2", "I do not know", "option1"], {"answered by greedy beams": 2})
    monkeypatch.setattr("eval.benchmarks.commonsense.generate_counted", lambda *_: made)
    examples = [Example(str(i), "", answer, "") for i, answer in enumerate(("answer2", "false", "option1"))]
    result = grade_words(nobody(tokenizer), examples, Request())
    assert (result.figure.value, result.counts) == (
        2 / 3,
        {"without an answer": 1, "answered by greedy beams": 2},
    )
    with pytest.raises(UserError, match="test split, row 2: the answer '7' is no answer word"):
        grade_words(nobody(tokenizer), [examples[0], Example("", "", "7", "")], Request())


def evaluate(tmp_path, *arguments: str, script: str = "commonsense_evaluate.py"):
    data = ("--data", str(tmp_path / "sets"), "--output_dir", str(tmp_path / "out"))
    return run_program(sys.executable, str(ROOT / "eval" / script), *arguments, *data)


def test_the_program_with_the_published_flags(tmp_path):
    write_sets(tmp_path / "sets", n=2)
    flags = ("--base_model", str(EMBEDDED), "--name", "mine", "--batch_size", "1", "--limit", "1")
    done = evaluate(tmp_path, "--dataset", "all", *flags, "--decoding", "greedy")
    assert done.returncode == 0, done.stderr
    first_cells = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert first_cells[3:11] == [*SETS]
    result = json.loads((tmp_path / "out/mine/commonsense/result.json").read_text())
    assert (result["metric"], result["n"], result["decoding"]) == ("mean_accuracy", 8, "greedy")
    samples = (tmp_path / "out/mine/commonsense/samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["set"] for line in samples] == [*SETS]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "boolQ"], "--dataset boolQ: no such set (did you mean 'boolq'?)"),
        (["--dataset", "piqa"], "piqa/test.json: no such data file"),
        (
            ["--dataset", "all", "--data", "/none"],
            "/none: no such file or folder; give the folder dataset/ of",
        ),
    ],
)
def test_the_program_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    import eval.commonsense_evaluate as program
    from eval.command import run_program as run

    write_sets(tmp_path, ("boolq",))
    with pytest.raises(SystemExit) as exited:
        run(program.main, ["--base_model", str(EMBEDDED), "--data", str(tmp_path), *arguments])
    error = capsys.readouterr().err
    assert exited.value.code == 2
    assert words in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_gsm8k_as_a_program_from_inside_its_folder(tmp_path, monkeypatch):
    (tmp_path / "sets").write_text("")
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"question": "What is 1,500 + 100?", "answer": "#### 1,600"}) + "\n")
    monkeypatch.setattr("conftest.ROOT", ROOT / "eval")
    place = ("--data", str(file), "--output_dir", str(tmp_path / "out"), "--max_new_tokens", "8")
    done = run_program(sys.executable, "eval_gsm8k.py", f"--model_name={EMBEDDED}", *place)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "out").glob("*/gsm8k")
    result = json.loads((folder / "result.json").read_text())
    assert (result["metric"], result["n"]) == ("exact_match", 1)
    assert set(result["others"]) == {"normalised", "paper", "last_number"}
    assert json.loads((folder / "samples.jsonl").read_text())["reference"] == "1600"


def test_a_run_grades_its_own_test_file(cli, tmp_path):
    write_sets(tmp_path / "sets", ("boolq", "piqa"), n=8)
    rows = [json.loads((tmp_path / "sets" / name / "test.json").read_text()) for name in ("boolq", "piqa")]
    (tmp_path / "train.json").write_text(
        json.dumps([{**row, "output": f"the correct answer is {row['answer']}"} for row in rows[0]])
    )
    (tmp_path / "test.json").write_text(json.dumps(rows[1]))
    done = cli(
        "dataset=commonsense_reasoning",
        f"dataset.train_file={tmp_path}/train.json",
        f"dataset.test_file={tmp_path}/test.json",
        *("dataset.validation_size=2", "model=tiny", "init=default", "model.max_steps=1"),
        *("eval.limit=3", "eval.max_new_tokens=4", "eval.tasks=[boolq]", f"eval.data.boolq={tmp_path}/sets"),
        *("wandb.mode=disabled", "gradient_checkpointing=false"),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(next((tmp_path / "results").rglob("record.json")).read_text())
    figures = record["metrics"]
    assert (figures["test"]["task"], figures["test"]["n"]) == (ALL, 3)
    assert (figures["boolq"]["task"], figures["boolq"]["metric"], figures["boolq"]["n"]) == (
        "boolq",
        "accuracy",
        3,
    )


@pytest.mark.parametrize(("test_file", "is_written"), [(None, False), ("test.json", True)])
def test_the_plan_knows_whether_there_is_a_test_split(cli, tmp_path, test_file, is_written):
    given = () if test_file is None else (f"dataset.test_file={tmp_path}/{test_file}",)
    done = cli("dataset=commonsense_reasoning", "dry_run=true", *given)
    assert done.returncode == 0, done.stderr
    assert ("test.jsonl" in done.stdout) == is_written
