"""The graders of numbers: hand-made hard cases, every real reference answer, and what a result says."""

import json
import time
from fractions import Fraction
from typing import get_args

import pytest
import torch
from conftest import ALONE, SHARED

from eval.benchmarks.graders import last_number, normalised_number, paper_number
from eval.benchmarks.gsm8k import grade_numbers, read_problems
from eval.engine.generation import Generated
from eval.subject import Request, Subject
from eval.tasks import GRADERS, TASKS
from lora_one.config import EvalConfig
from lora_one.data.specs import Example
from lora_one.errors import UserError

# Text, and the number in it as a person reads it; None: states no answer, or an ambiguous one.
NORMALISED = [
    # the format of the task
    ("3 + 4 = 7\n#### 7", "7"),
    ("####7", "7"),
    ("####\t7  ", "7"),
    ("####\n7", "7"),
    ("#### 7.", "7"),
    ("#### 7\nThe answer is: 7", "7"),
    ("so far 9\n#### 4\n#### 5", "4"),
    ("#### 4\n\nQ: What is 2 + 3?\nA: 2 + 3 = 5\n#### 5", "4"),
    ("I do not know.\n\nQ: What is 2 + 3?\nA: #### 5", None),
    ("I do not know.\nQuestion: 2 + 3?\nThe answer is 5", None),
    # separators, signs, decimals
    ("#### 1,600", "1600"),
    ("#### 1,234,567.25", "4938269/4"),
    ("#### 1,00,000", "100000"),
    ("#### 1\u202f600", "1600"),
    ("#### -10", "-10"),
    ("#### - 10", "-10"),
    ("#### −10", "-10"),
    ("#### +10", "10"),
    ("#### minus 10", "-10"),
    ("The temperature: the answer is minus 10 degrees.", "-10"),
    ("#### -1,600.50", "-3201/2"),
    ("#### .5", "1/2"),
    ("#### -.5", "-1/2"),
    ("#### 3.0", "3"),
    ("#### 007", "7"),
    ("#### 0", "0"),
    # currency and units
    ("#### $2.50 each", "5/2"),
    ("#### -$3", "-3"),
    ("#### $-3", "-3"),
    ("#### $ 1,000", "1000"),
    ("#### US$40", "40"),
    ("#### €1,200.00", "1200"),
    ("#### 12€", "12"),
    ("The answer is Rs. 500.", "500"),
    ("The answer is USD 5", "5"),
    ("#### 12 apples", "12"),
    ("#### 12 apples and 3 pears", "12"),
    ("#### 5%", "5"),
    ("#### 12.5 %", "25/2"),
    ("#### 30mph", "30"),
    ("#### $5/hour", "5"),
    ("#### 5 m²", "5"),
    # fractions, powers, scales
    ("#### 3/4", "3/4"),
    ("#### -3/4", "-3/4"),
    ("#### 6 / 8", "3/4"),
    ("#### 1 1/2", "3/2"),
    ("#### -1 1/2 cups", "-3/2"),
    ("#### 1 1/2.", "3/2"),
    ("The answer is 1 1/2, not 2.", "3/2"),
    ("The answer is 1.6e3.", "1600"),
    ("The answer is 2 and 1/2 hours", "5/2"),
    ("#### ½", "1/2"),
    ("#### 2½", "5/2"),
    ("#### 1,000/3", "1000/3"),
    ("#### 5/0", None),
    ("#### 1.6e3", "1600"),
    ("#### 1.5E-1", "3/20"),
    ("#### 1.6 x 10^3", "1600"),
    ("#### 1.6 × 10³", "1600"),
    ("#### 10^2", "100"),
    ("#### 2 million", "2000000"),
    ("#### $1.5 thousand", "1500"),
    ("#### 80k", "80000"),
    ("#### 80 km", "80"),
    # LaTeX and Markdown
    (r"so it is \boxed{18}.", "18"),
    (r"first \boxed{9}, then \boxed{18}", "18"),
    (r"$\boxed{\frac{3}{4}}$", "3/4"),
    (r"\boxed{1\frac{1}{2}}", "3/2"),
    (r"\boxed{\$1{,}600}", "1600"),
    (r"\boxed{1\,600}", "1600"),
    (r"\boxed{-\dfrac{1}{2}}", "-1/2"),
    (r"\boxed{18\text{ apples}}", "18"),
    (r"\boxed{1.6 \times 10^{3}}", "1600"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{}", None),
    ("#### **18**", "18"),
    ("#### $18$", "18"),
    (r"\(x\) is found: the answer is \(18\).", "18"),
    ("**Answer:** 18", "18"),
    # in words
    ("The answer is 18", "18"),
    ("The final answer is: $18.50.", "37/2"),
    ("the answer is **1,600** dollars", "1600"),
    ("The answer is\n\n18", "18"),
    ("The answer is 5. No: the answer is 6.", "6"),
    ("The answer is that she has 5 apples left.", "5"),
    ("The answer is unclear. There are 5 cats.", None),
    ("The answer is 5\n#### 6", "6"),
    ("The answer is ten.", None),
    # equations and what is none
    ("#### 2 + 3 = 5", "5"),
    ("#### 1/3 of 9 = 3", "3"),
    ("The answer is 20% of 50 = 10", "10"),
    ("#### 20% of 50", "20"),
    ("#### 3 of 9 apples", "3"),
    ("#### x = 5", "5"),
    ("#### 80 = 100 - 20", "80"),
    ("#### $5 * 3 = $15", "15"),
    ("#### 12/4 = 3", "3"),
    ("#### (2 + 3) * 4 = 20", "20"),
    (r"\boxed{2x = 10}", "10"),
    # real ends of a small model that went on
    ("#### 10 bran on the total officers, the boys had 100*10=<<100*100", "10"),
    ("#### 120ipop on Monday, he spent 120*4=<<120*4=120>>120 feasts", "120"),
    ("#### 12 on the total, the number of students is 12/8 = <<12/8=", "12"),
    ("#### 5 = five", "5"),
    ("#### x = 5 - 3", None),
    ("#### 100 - 20 = eighty", None),
    ("#### 3 apples + 2 pears = 5 fruits", "5"),
    ("#### 10 (since 5 + 5 = 10, not 11)", "10"),
    ("#### 5 * 3", None),
    ("#### 5**3", None),
    ("#### $5 + $3", None),
    ("#### 5 - 3", None),
    ("#### 5-10", None),
    ("#### 3:30", None),
    ("#### 1/2/2024", None),
    ("#### 10,00", None),
    ("#### 1,2,3", None),
    ("#### 2^100000", None),
    ("#### 1e99", None),
    ("#### 1" + "0" * 5000, None),
    ("#### Step 1: add\nThe answer is 5", "5"),
    ("#### Step 1: add\n#### 5", "5"),
    # no answer
    ("", None),
    ("####", None),
    ("#### none", None),
    ("### 4", None),
    ("18", None),
    ("so she has 18 apples.", None),
]

# The same rule as the published program's, worked out by hand.
PAPER = [
    ("3 + 4 = 7\n#### 7", 7),
    ("####7", 7),
    ("####\n7", 7),
    ("#### 1,600", 1),
    ("#### 2,125", 2),
    ("#### -10", 0),
    ("#### $18", 0),
    ("#### 2.75", 2),
    ("#### .5", 0),
    ("#### 3/4", 3),
    ("#### $2.50 each", 0),
    ("#### 1 1/2", 1),
    ("#### 50%", 50),
    ("#### 2 + 3 = 5", 2),
    ("#### 2 million", 2),
    ("#### 10,00", 10),
    ("#### 5-10", 5),
    ("#### 3:30", 3),
    ("#### 5 * 3", 5),
    (r"\boxed{\frac{3}{4}}", 0),
    ("#### 18 apples", 18),
    ("#### 007", 7),
    ("so far 9\n#### 4\n#### 5", 4),
    ("#### Step 1\n#### 5", 5),
    ("I do not know.\n\nQ: more\nA: #### 5", 5),
    (r"\boxed{18}", 0),
    ("The answer is 18", 0),
    ("### 4", 0),
    ("#### none", 0),
    ("", 0),
    ("#### 1" + "0" * 5000, 0),
]

LAST = [
    ("so she has 18 apples.", "18"),
    ("2 + 3 = <<2+3=5>>5 apples", "5"),
    ("20 - 5", "5"),
    ("it falls from 5 to -5.", "-5"),
    ("#### 6 apples in 3 boxes", "3"),
    ("18", "18"),
    ("it costs $1,600.", "1600"),
    ("at 5 it is 10,00", "5"),
    ("18\n\nQ: What is 2 + 3?\nA: 5", "18"),
    ("x1 and H2O", None),
    ("none", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "number"), NORMALISED)
def test_normalised(text, number):
    assert normalised_number(text) == (None if number is None else Fraction(number))


@pytest.mark.parametrize(("text", "number"), PAPER)
def test_paper(text, number):
    assert paper_number(text) == number


@pytest.mark.parametrize(("text", "number"), LAST)
def test_last_number(text, number):
    assert last_number(text) == (None if number is None else Fraction(number))


@pytest.mark.parametrize("piece", ["9", "1,", "1/", "#### ", "1 ", "-", "\\boxed{", "$", "answer is ", "^2 "])
def test_texts_of_a_model_that_repeats_itself_take_no_time(piece):
    start = time.perf_counter()
    for rule in (normalised_number, paper_number, last_number):
        rule("#### " + piece * 3000)
    assert time.perf_counter() - start < 2


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/gsm8k")
@pytest.mark.parametrize(("split", "n", "misread"), [("test", 1319, 16), ("train", 7473, 82)])
def test_every_real_reference_is_read_and_paper_misreads_those_with_commas_and_signs(split, n, misread):
    lines = (SHARED / f"data/gsm8k/{split}.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == n
    wrong = 0
    for answer in answers:
        plain = answer.rsplit("#### ", 1)[1].strip()
        gold = int(plain.replace(",", ""))
        assert normalised_number(answer) == last_number(answer) == gold
        assert (paper_number(answer) != gold) == (not plain.isdigit())
        wrong += paper_number(answer) != gold
    assert wrong == misread


def graded(tokenizer, monkeypatch, examples, replies):
    monkeypatch.setattr(
        "eval.benchmarks.gsm8k.generate_counted", lambda *_, **__: Generated(replies, {"prompts cut": 1})
    )
    return grade_numbers(Subject(torch.nn.Identity(), tokenizer, ALONE), examples, Request())


def test_a_result_names_its_graders(tokenizer, monkeypatch):
    golds = ["1,600", "-10", "4", "5"]
    examples = [Example(f"Q: {i}\nA: ", "", f"so\n#### {gold}", f"{i}") for i, gold in enumerate(golds)]
    # wrong but the same to paper; silent, which is right to paper; right to all; right to the last alone
    replies = ["#### 1", "no idea", "#### 4", "it is 5"]
    result = graded(tokenizer, monkeypatch, examples, replies)
    assert (result.metric, result.figure) == ("exact_match", result.others["normalised"])
    assert {name: figure.value for name, figure in result.others.items()} == {
        "normalised": 0.25,
        "paper": 0.75,
        "last_number": 0.5,
    }
    assert result.figure.n == 4
    assert result.figure.standard_error == pytest.approx((0.25 * 0.75 / 4) ** 0.5)
    assert result.counts == {"without an answer": 2, "prompts cut": 1}
    rows = [json.loads(line) for line in result.samples_jsonl().splitlines()]
    assert [row["paper"] for row in rows] == [True, True, True, False]
    assert (
        [row["normalised"] for row in rows] == [row["right"] for row in rows] == [False, False, True, False]
    )
    assert [row["answer"] for row in rows] == ["1", None, "4", None]
    assert [row["reference"] for row in rows] == ["1600", "-10", "4", "5"]


def test_problems_are_read_with_another_prompt_and_a_limit(tmp_path):
    file = tmp_path / "test.jsonl"
    rows = [{"question": f"What is {{{i}}}?", "answer": f"#### {i}"} for i in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [problem.prompt for problem in read_problems(file, 2)] == [
        "Q: What is {0}?\nA: ",
        "Q: What is {1}?\nA: ",
    ]
    assert read_problems(file, 1, "{question} =")[0].prompt == "What is {0}? ="


@pytest.mark.parametrize(
    ("text", "prompt", "words"),
    [
        (
            '{"question": "a", "answer": "#### 1"}\n{"question": "b"}',
            "{question}",
            "line 2: no column 'answer'",
        ),
        (
            '{"question": "a", "answer": "#### 1"}\n{"question": "b", "answer": "some"}',
            "{question}",
            "test.jsonl, row 2: no number after '####' in the answer 'some'",
        ),
        ("", "{question}", "test.jsonl: has no rows"),
        ('{"question": "a", "answer": "#### 1"}', "Q: {}", r"--prompt 'Q: \{\}': has no place"),
    ],
)
def test_bad_problems_are_named(tmp_path, text, prompt, words):
    file = tmp_path / "test.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=words) as raised:
        read_problems(file, None, prompt)
    assert "\n" not in str(raised.value)


def test_the_config_knows_every_grader():
    (literal, _) = get_args(EvalConfig.model_fields["task"].annotation)
    assert set(get_args(literal)) == set(GRADERS)
    assert "gsm8k" in TASKS
