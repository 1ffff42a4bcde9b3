"""Graders on hard cases, and batched generation against one prompt at a time."""

import json
from decimal import Decimal

import pytest
import torch
from conftest import ALONE, EMBEDDED, SHARED
from transformers import AutoModelForCausalLM

from eval.generation import Decoding, generate
from eval.graders import gsm8k_answer
from eval.gsm8k import grade_numbers
from eval.subject import Request, Subject
from lora_one.data.specs import Example
from lora_one.data.tiny import problems
from lora_one.errors import UserError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 1,600", "1600"),
        ("#### -10", "-10"),
        ("#### $2.50 each", "2.5"),
        ("#### -$3", "-3"),
        ("#### .5", "0.5"),
        ("####7", "7"),
        ("#### 12 apples", "12"),
        ("#### 3.0", "3"),
        ("#### 1,234,567.25", "1234567.25"),
        ("so far 9\n#### 4\n#### 5", "4"),
        ("#### 7.", "7"),
    ],
)
def test_answers(text, number):
    assert gsm8k_answer(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "the answer is 4", "####", "#### none", "####\n4", "### 4"])
def test_no_answer_is_no_answer(text):
    assert gsm8k_answer(text) is None


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/gsm8k")
def test_every_real_gold_answer_is_read():
    rows = [json.loads(line) for line in (SHARED / "data/gsm8k/test.jsonl").open()]
    assert len(rows) == 1319
    for row in rows:
        plain = row["answer"].rsplit("####", 1)[1].strip().replace(",", "")
        assert gsm8k_answer(row["answer"]) == Decimal(plain)


def test_batches_generate_what_single_prompts_do(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    prompts = [f"Q: {row['question']}\nA: " for row in problems("test", 12)]
    prompts += ["Tom has", "A"]
    batched, alone = (
        generate(Subject(model, tokenizer, ALONE, batch_size=size), prompts, Decoding(24), Request())
        for size in (5, 1)
    )
    assert batched == alone
    assert len(set(batched)) > 5


def test_result_counts_right_wrong_and_silent(tokenizer, monkeypatch):
    examples = [Example(f"Q: {i}\nA: ", "", f"#### {i}", f"{i}") for i in range(4)]
    replies = ["#### 0", "#### 7", "I do not know", "#### 3.0"]
    monkeypatch.setattr("eval.gsm8k.generate", lambda *_, **__: replies)
    result = grade_numbers(Subject(torch.nn.Identity(), tokenizer, ALONE), examples, Request())
    assert (result.figure.value, result.figure.n, result.counts["without an answer"]) == (0.5, 4, 1)
    assert result.figure.standard_error == pytest.approx(0.25)
    assert [json.loads(line)["right"] for line in result.samples_jsonl().splitlines()] == [
        True,
        False,
        False,
        True,
    ]
    assert "samples" not in result.summary()


def test_a_reference_without_a_number_is_refused(tokenizer):
    examples = [Example("Q: 1\nA: ", "", "no number here", "g")]
    with pytest.raises(UserError, match="no number after '####' in the answer to 'Q: 1"):
        grade_numbers(Subject(torch.nn.Identity(), tokenizer, ALONE), examples, Request())
