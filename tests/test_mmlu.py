"""MMLU: prompts, files, dropped shots, the shared beginning, resuming, and the figures."""

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ALONE, EMBEDDED, SHARED, on_two_processes
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from eval import command, eval_mmlu
from eval.benchmarks.mmlu import examine, mmlu, prompt
from eval.benchmarks.mmlu_data import LETTERS, Exam, Item, limited, read_exams
from eval.benchmarks.mmlu_subjects import CATEGORIES, SUBJECTS
from eval.engine.questions import encode
from eval.engine.scoring import choose, score
from eval.subject import Request, Subject
from eval.tasks import TASKS
from lora_one.errors import UserError
from lora_one.processes import start_processes


def item(number: int, answer: str = "B") -> Item:
    return Item(f"What is {number} + {number}?", tuple(f"{number * k}, or so" for k in range(1, 5)), answer)


def exam(subject: str = "anatomy", n: int = 9, examples: int = 5) -> Exam:
    questions = tuple(
        replace(item(i, LETTERS[i % 4]), question=f"What is {i}?" + " So" * (i % 5)) for i in range(n)
    )
    return Exam(subject, tuple(item(100 + i, LETTERS[i % 4]) for i in range(examples)), questions)


def llama(tokenizer, positions: int = 512, **asked) -> Subject:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=positions,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return Subject(model, tokenizer, ALONE, **asked)


def write_folder(folder: Path, exams: list[Exam]) -> Path:
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True)
    for one in exams:
        for split, items in (("dev", one.examples), ("test", one.questions)):
            with (folder / split / f"{one.subject}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([i.question, *i.options, i.answer] for i in items)
    return folder


def test_the_form_of_a_prompt():
    shot = Item("Which is red?", ("sky", "grass", "blood", "snow"), "C")
    asked = Item("Which, if any,\nis wet?", ("sand", "water", "fire", "air"), "B")
    assert prompt("high_school_us_history", [shot], asked) == (
        "The following are multiple choice questions (with answers) about high school us history.\n\n"
        "Which is red?\nA. sky\nB. grass\nC. blood\nD. snow\nAnswer: C\n\n"
        "Which, if any,\nis wet?\nA. sand\nB. water\nC. fire\nD. air\nAnswer:"
    )


def test_subjects_and_categories():
    assert len(SUBJECTS) == 57
    assert Counter(CATEGORIES.values()) == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/mmlu")
def test_the_real_folder_is_read_whole():
    exams = read_exams(SHARED / "data/mmlu")
    assert [one.subject for one in exams] == list(SUBJECTS)
    assert sum(len(one.questions) for one in exams) == 14_042
    assert {len(one.examples) for one in exams} == {5}
    by_category = Counter()
    for one in exams:
        by_category[CATEGORIES[one.subject]] += len(one.questions)
    # As the benchmark's own program has it; others count anatomy (135) as STEM.
    assert by_category == {"humanities": 4705, "social sciences": 3077, "STEM": 3018, "other": 3242}


def expected(subject: Subject, one: Exam, shots: int) -> torch.Tensor:
    """One prompt at a time, all of it; a prompt that does not fit loses its first examples."""
    rows, tokenizer = [], subject.tokenizer
    for question in one.questions:
        for kept in range(shots, -1, -1):
            text = prompt(one.subject, one.examples[shots - kept : shots], question)
            ids = [tokenizer(f"{text} {letter}")["input_ids"] for letter in LETTERS]
            assert len({tuple(row[:-1]) for row in ids}) == 1
            if len(ids[0]) - 1 <= subject.model.config.max_position_embeddings or kept == 0:
                break
        context = ids[0][:-1][-subject.model.config.max_position_embeddings :]
        with torch.no_grad():
            logits = subject.model(input_ids=torch.tensor([context])).logits[0, -1]
        rows.append(logits[[row[-1] for row in ids]])
    return torch.stack(rows)


def logits(result) -> torch.Tensor:
    return torch.tensor([sample["logits"] for sample in result.samples])


@pytest.mark.parametrize("shots", [0, 2, 5])
@pytest.mark.parametrize("shares", [True, False])
def test_logits_are_those_of_one_prompt_at_a_time(shots, shares, tokenizer):
    subject, one = llama(tokenizer, max_tokens=900), exam()
    result = examine(subject, Request(), [one], shots, shares_prefix=shares)
    torch.testing.assert_close(logits(result), expected(subject, one, shots), atol=1e-5, rtol=0)
    assert not any(result.counts.values())
    rights = [
        LETTERS[row.argmax()] == question.answer
        for row, question in zip(expected(subject, one, shots), one.questions, strict=True)
    ]
    assert [sample["right"] for sample in result.samples] == rights
    assert result.figure.value == sum(rights) / len(rights)
    assert result.decoding.startswith(f"{shots}-shot")


def test_prompts_that_do_not_fit_lose_their_first_examples(tokenizer):
    one = exam(n=10)
    lengths = [
        len(tokenizer(prompt("anatomy", one.examples[5 - kept :], one.questions[0]))["input_ids"])
        for kept in range(6)
    ]
    subject = llama(tokenizer, lengths[3] + 1)
    result = examine(subject, Request(), [one])
    torch.testing.assert_close(logits(result), expected(subject, one, 5), atol=1e-5, rtol=0)
    shots = [sample["shots"] for sample in result.samples]
    assert set(shots) == {2, 3}
    assert result.counts == {
        "prompts with fewer shots": 10,
        "shots dropped": sum(5 - n for n in shots),
        "questions cut": 0,
    }


def test_a_question_that_does_not_fit_alone_is_cut_and_counted(tokenizer):
    one = exam(n=6)
    plain = [len(tokenizer(prompt("anatomy", [], question))["input_ids"]) for question in one.questions]
    limit = sorted(plain)[2]
    subject = llama(tokenizer, limit)
    result = examine(subject, Request(), [one])
    assert result.counts["questions cut"] == sum(length > limit for length in plain) > 0
    torch.testing.assert_close(logits(result), expected(subject, one, 5), atol=1e-5, rtol=0)


def test_an_encoder_with_a_decoder(tokenizer):
    torch.manual_seed(0)
    ids = {"pad_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": 1}
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, **ids
    )
    subject = Subject(T5ForConditionalGeneration(config), tokenizer, ALONE)
    result = examine(subject, Request(), [exam(n=4)], 1)
    assert result.figure.n == 4
    assert not any(result.counts.values())


def test_figures_weigh_every_question_the_same(tokenizer, monkeypatch):
    # The model always says B: right in a quarter of one subject and in all of another.
    exams = [exam("anatomy", 8), Exam("sociology", exam().examples, tuple(item(i, "B") for i in range(2)))]
    monkeypatch.setattr(
        "eval.benchmarks.mmlu.score",
        lambda _, questions, advance, **__: torch.tensor([[0.0, 1, 0, 0]] * len(questions)),
    )
    result = examine(llama(tokenizer), Request(), exams)
    assert (result.figure.value, result.figure.n) == (0.4, 10)
    assert {name: (figure.value, figure.n) for name, figure in result.others.items()} == {
        "other": (0.25, 8),
        "social sciences": (1.0, 2),
        "anatomy": (0.25, 8),
        "sociology": (1.0, 2),
    }
    json.dumps(result.summary())
    assert len(result.samples_jsonl().splitlines()) == 10


def test_a_limit_takes_of_every_subject_in_turn():
    exams = [exam("anatomy", 9), exam("sociology", 1), exam("virology", 3)]
    taken = {one.subject: len(one.questions) for one in limited(exams, 7)}
    assert taken == {"anatomy": 3, "sociology": 1, "virology": 3}
    assert [one.subject for one in limited(exams, 2)] == ["anatomy", "sociology"]
    assert limited(exams, 2)[0].questions == exams[0].questions[:1]
    assert limited(exams, None) == exams


def test_a_killed_evaluation_goes_on(tokenizer, tmp_path, monkeypatch):
    subject = llama(tokenizer, name="mine")
    exams, request = [exam("anatomy"), exam("virology", 4)], Request(folder=tmp_path)
    whole = examine(subject, request, exams)
    (path,) = tmp_path.iterdir()
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 13
    path.write_text("".join(lines[:8]) + lines[8][:20])  # seven of anatomy, and a torn one
    asked: list[int] = []

    def counted(subject, questions, advance, **settings):
        asked.append(len(questions))
        return score(subject, questions, advance, **settings)

    monkeypatch.setattr("eval.benchmarks.mmlu.score", counted)

    def again(subject, exams=exams, **settings) -> int:
        asked.clear()
        examine(subject, request, exams, **settings)
        return sum(asked)

    assert again(subject) == 6
    torch.testing.assert_close(logits(examine(subject, request, exams)), logits(whole), atol=1e-6, rtol=0)
    assert again(subject) == 0
    assert again(replace(subject, name="other")) == 13
    assert again(subject, shots=4) == 13
    assert again(subject, [exam("anatomy", 8), exams[1]]) == 0
    assert again(subject, [exam("anatomy", 11), exams[1]]) == 2
    assert again(subject, exams[1:]) == 0
    with torch.no_grad():  # one word trained on, saved under the same name
        subject.model.get_input_embeddings().weight[77].add_(0.01)
    assert again(subject) == 13


def test_what_is_kept_is_used_for_its_question(tokenizer, tmp_path):
    subject, request = llama(tokenizer), Request(folder=tmp_path)
    examine(subject, request, [exam(n=3)])
    (path,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["answer"]["logits"] = [0, 0, 9, 0]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    backwards = replace(exam(n=3), questions=exam(n=3).questions[::-1])
    found = examine(subject, request, [backwards]).samples
    assert [sample["logits"] == (0, 0, 9, 0) for sample in found] == [False, True, False]


def test_a_folder_that_cannot_be_written_is_named(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write answers there"):
        examine(llama(tokenizer), Request(folder=tmp_path / "file"), [exam(n=2)])


# --- data ---


def test_the_table_has_the_benchmark(tokenizer, tmp_path):
    folder = write_folder(tmp_path / "mmlu", [exam(subject, 1) for subject in SUBJECTS])
    result = TASKS["mmlu"](llama(tokenizer), Request(data=folder, limit=60))
    assert (result.task, result.figure.n) == ("mmlu", 57)
    assert TASKS["mmlu"] is mmlu
    assert list(result.others)[:4] == ["STEM", "humanities", "social sciences", "other"]


def test_a_folder_gives_back_what_was_written(tmp_path):
    odd = Item('He said "no,\nnever"', ("a,b", "", '"', "d"), "D")
    one = Exam("virology", exam().examples, (odd, item(1)))
    assert read_exams(write_folder(tmp_path / "mmlu", [one]), ["virology"]) == [one]


def spoil(folder: Path, text: str) -> None:
    (folder / "test" / "anatomy_test.csv").write_text(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "dev").rename(f / "devel"), r"mmlu: has no folder dev/"),
        (lambda f: (f / "test").rename(f / "tests"), r"mmlu: has no folder test/"),
        (lambda f: (f / "dev/anatomy_dev.csv").unlink(), r"dev.anatomy_dev.csv: no such file"),
        (lambda f: (f / "test/anatomy_test.csv").unlink(), r"test.anatomy_test.csv: no such file"),
        (lambda f: spoil(f, "q,1,2,3,4,A\nq,1,2,3,A\n"), r"anatomy_test.csv, row 2: 5 fields; expected"),
        (lambda f: spoil(f, "q,1,2,3,4,E\n"), r"anatomy_test.csv, row 1: the answer is 'E'"),
        (lambda f: spoil(f, "q,1,2,3,4,AB\n"), r"row 1: the answer is 'AB'"),
        (lambda f: spoil(f, "q,1,2,3,4,\n"), r"row 1: the answer is ''"),
        (lambda f: spoil(f, 'q,1,2,3,4,A\n"q,1,2,3,4,A\n'), r"anatomy_test.csv, row 2: not valid CSV"),
        (lambda f: spoil(f, ""), r"mmlu: anatomy has no test questions"),
        (lambda f: (f / "dev/anatomy_dev.csv").write_text("q,1,2,3,4,A\n"), r"anatomy has 1 dev rows"),
        (
            lambda f: (f / "dev/anatomy_dev.csv").write_bytes(b"q,1,2,3,\xff,A\n"),
            r"anatomy_dev.csv: not UTF-8",
        ),
    ],
)
def test_bad_folders(change, words, tmp_path):
    folder = write_folder(tmp_path / "mmlu", [exam("anatomy")])
    change(folder)
    with pytest.raises(UserError, match=words) as raised:
        read_exams(folder, ["anatomy"])
    assert "\n" not in str(raised.value)


def test_unknown_subjects_and_folders(tmp_path):
    with pytest.raises(UserError, match=r"no such MMLU subject: 'anatomi' \(did you mean 'anatomy'"):
        read_exams(tmp_path, ["anatomi"])
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_exams(tmp_path / "nowhere")


def hub(rows: dict[str, list[dict]], seen: list):
    def load(path, config, split, **_):
        seen.append((path, config, split))
        return datasets.Dataset.from_list(rows[split])

    return load


def hub_row(subject: str, number: int, answer: int = 1) -> dict:
    one = item(number)
    return {"question": one.question, "subject": subject, "choices": list(one.options), "answer": answer}


def test_the_hub_gives_what_a_folder_gives(monkeypatch):
    seen: list = []
    rows = {
        split: [hub_row(s, i) for s in ("virology", "anatomy") for i in range(5)] for split in ("dev", "test")
    }
    monkeypatch.setattr(datasets, "load_dataset", hub(rows, seen))
    found = read_exams(None, ["anatomy", "virology"])
    items = tuple(item(i, "B") for i in range(5))
    assert found == [Exam("anatomy", items, items), Exam("virology", items, items)]
    assert seen == [("cais/mmlu", "all", "dev"), ("cais/mmlu", "all", "test")]
    seen.clear()
    read_exams(None, ["anatomy"])
    assert seen == [("cais/mmlu", "anatomy", "dev"), ("cais/mmlu", "anatomy", "test")]
    with pytest.raises(UserError, match="cais/mmlu: sociology has no test questions"):
        read_exams(None, ["anatomy", "sociology"])
    rows["test"][0]["answer"] = 7
    with pytest.raises(UserError, match=r"cais/mmlu \(all, test\), row 1: expected four choices"):
        read_exams(None, ["anatomy", "virology"])


# --- the program ---


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exited:
        command.run_program(eval_mmlu.main, list(arguments))
    return exited.value.code


def test_the_published_command(tmp_path, capsys):
    folder = write_folder(tmp_path / "mmlu", [exam("anatomy", 3), exam("virology", 2)])
    asked = [f"--data={folder}", f"--output_dir={tmp_path}/out", "--subjects=anatomy,virology", "--shots=1"]
    assert run(str(EMBEDDED), *asked) == 0
    assert "| virology |" in capsys.readouterr().out
    (path,) = (tmp_path / "out").glob("*/mmlu/result.json")
    result = json.loads(path.read_text())
    assert (result["task"], result["n"], result["decoding"][:6]) == ("mmlu", 5, "1-shot")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/mistyped/model"], "error: model.name=/mistyped/model: no such folder"),
        (["mistyped_model"], "error: mistyped_model: "),
        (["results/mistyped/merged"], "error: results/mistyped/merged: "),
        ([str(EMBEDDED), "--subjects=anatomi"], "error: no such MMLU subject: 'anatomi'"),
    ],
)
def test_mistakes_are_one_line(arguments, words, tmp_path, capsys):
    folder = write_folder(tmp_path / "mmlu", [exam("anatomy", 3)])
    assert run("--subjects=anatomy", f"--data={folder}", f"--output_dir={tmp_path}", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(words)


# --- several processes ---


def _same_on_two(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    together = llama(tokenizer)
    apart = replace(together, processes=start_processes())
    texts = [f"These are words that all have in common: {i}" + " and" * (i % 7) for i in range(23)]
    choices = [" A", " B"]
    questions = encode(together, texts, choices)
    alone = score(together, questions, lambda n: None)
    for shares in (False, True):
        done: list[int] = []
        found = score(apart, questions, done.append, shares_prefix=shares)
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
        assert sum(done) == len(texts)
    assert choose(apart, texts[:1], choices, Request()).logits.shape == (1, 2)  # fewer than processes
    exams = [exam("anatomy"), exam("virology", 3)]
    expected = logits(examine(together, Request(), exams))
    for _ in range(2):  # answered, and read again
        found = logits(examine(apart, Request(folder=Path(folder)), exams))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_two_processes_share_the_work(tmp_path):
    on_two_processes(_same_on_two, str(tmp_path))
    lines = [len(path.read_text().splitlines()) for path in sorted(tmp_path.iterdir())]
    assert len(lines) == 2
    assert lines[0] == 14  # the main process's: 12 answers, and a line for each time it was opened
    assert lines[1] <= 2
