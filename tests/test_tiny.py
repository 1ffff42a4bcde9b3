"""Tests of the generated word problems and of the small model that ships with them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_one.data import tiny

ASSET = Path(tiny.__file__).parents[1] / "assets" / "tiny_llama"
SPLITS = ("train", "validation", "test")
TEXTS = (
    "",
    " ",
    "  two  spaces \n\n and\ttabs ",
    "Zażółć gęślą jaźń, 東京 2024, ٣٤ ½ 🤖👩‍🔬\r\n",
    "x_1 += f(3.14159)  # not a word problem",
    "\x00\x7f\u200b\ufeff e\u0301",
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSET)


def identities(split, steps):
    """Questions without names and things, which leaves the wording and the numbers."""
    words = {name for name, _ in tiny.NAMES}.union(tiny.OBJECTS, tiny.CONTAINERS)
    pattern = re.compile(rf"\b({'|'.join(words)})\b")
    return {pattern.sub("_", row["question"]) for row in tiny.problems(split, 2000, steps=steps)}


@pytest.mark.parametrize("steps", ["multi", "one"])
def test_rows_are_distinct_and_a_prefix_of_longer_lists(steps):
    rows = tiny.problems("train", 3000, seed=5, steps=steps)
    assert len({row["question"] for row in rows}) == 3000
    assert tiny.problems("train", 100, seed=5, steps=steps) == rows[:100]
    assert tiny.problems("train", 100, seed=6, steps=steps) != rows[:100]


def test_generation_does_not_depend_on_the_process():
    code = (
        "import hashlib; from lora_one.data.tiny import problems, pretraining_texts as texts;"
        "rows = [*problems('test', 300), *problems('train', 300, 3, 'one'), *texts(300, 1)];"
        "print(hashlib.sha256(repr(rows).encode()).hexdigest())"
    )
    root = Path(tiny.__file__).parents[2]
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("steps", ["multi", "one"])
def test_splits_share_no_wording_with_the_same_numbers(steps):
    train, validation, test = (identities(split, steps) for split in SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_pretraining_shares_no_template_name_or_thing():
    templates = {text for kind in tiny.MULTI_STEP + tiny.ONE_STEP for text in kind.templates}
    assert not templates & {text for kind in tiny.PRETRAINING_KINDS for text in kind.templates}
    assert not {name for name, _ in tiny.NAMES} & set(tiny.PRETRAINING_NAMES)
    assert not set(tiny.OBJECTS) & set(tiny.PRETRAINING_OBJECTS)
    assert not any("####" in text and "Q:" in text for text in tiny.pretraining_texts(3000))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("steps", "lengths"), [("multi", {2, 3}), ("one", {1})])
def test_answers_are_right(split, steps, lengths):
    for row in tiny.problems(split, 1500, steps=steps):
        known = set(map(int, re.findall(r"\d+", row["question"])))
        *lines, last = row["answer"].split("\n")
        assert len(lines) in lengths
        result = ""
        for line in lines:
            left, sign, right, equals, result = line.split(" ")
            assert equals == "="
            assert {int(left), int(right)} <= known, row
            exact = {"+": int(left) + int(right), "-": int(left) - int(right)}
            exact |= {"*": int(left) * int(right), "/": int(left) / int(right)}
            assert exact[sign] == int(result), row
            known.add(int(result))
        assert last == f"#### {result}"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("dev", 1), "unknown split 'dev'"),
        (("train", 1, 0, "two"), "unknown steps 'two'"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        tiny.problems(*call)


def test_too_many_problems_are_refused(monkeypatch):
    few = tiny.Kind("few", ((2, 3),), ("a + a",), ("Twice {a}?",))
    monkeypatch.setitem(tiny.KINDS, "one", (few,))
    with pytest.raises(ValueError, match="cannot make 9 distinct one-step problems"):
        tiny.problems("train", 9, steps="one")


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_is_lossless(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids


def test_digits_are_single_tokens(tokenizer):
    pieces = [tokenizer.decode([i]) for i in tokenizer("12 + 345 = 357")["input_ids"]]
    assert [piece for piece in pieces if piece.isdigit()] == list("12345357")


def test_special_tokens_are_distinct(tokenizer):
    assert None not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize("target", ["3 * 4 = 12\n#### 12", "The answer is 3.", "####", "é", "(1)"])
def test_prompt_is_a_token_prefix(tokenizer, target):
    for row in tiny.problems("test", 50):
        prompt = f"Q: {row['question']}\nA: "
        ids = tokenizer(prompt)["input_ids"]
        assert tokenizer(prompt + target)["input_ids"][: len(ids)] == ids


def test_problems_are_short(tokenizer):
    rows = tiny.problems("train", 500)
    texts = [f"Q: {row['question']}\nA: {row['answer']}" for row in rows]
    assert max(map(len, tokenizer(texts)["input_ids"])) <= 96


def test_asset_is_small_and_loads(tokenizer):
    assert sum(path.stat().st_size for path in ASSET.iterdir()) <= 8e6
    model = AutoModelForCausalLM.from_pretrained(ASSET)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_pretrained_model_answers_a_problem_of_its_own_kind(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(ASSET)
    question = "Tom had 12 apples. Tom lost 5 apples. How many apples were left?"
    inputs = tokenizer(f"Q: {question}\nA: ", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    reply = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert reply == "The answer is 7."
