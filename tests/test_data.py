"""Rows, splits, tokens and batches."""

import json
from itertools import chain

import numpy as np
import pytest
import torch
from conftest import random_examples, small_llama
from tokenizers.processors import TemplateProcessing

from lora_one.config import DatasetConfig
from lora_one.data.batches import IGNORED, WindowLoader, WindowSampler, collate, whole_window, window_weights
from lora_one.data.encoding import encode_split
from lora_one.data.loading import load_splits
from lora_one.data.specs import SPECS, Example
from lora_one.errors import UserError
from lora_one.losses import weighted_loss


def no_limit(texts: list[str]) -> list[int]:
    return [0] * len(texts)


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def gsm8k_rows(n: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"}
        for i in range(start, start + n)
    ]


def sampler(
    examples, rank=0, world_size=1, per_device=2, real=8, seed=0, reduction="sample"
) -> WindowSampler:
    return WindowSampler(
        examples,
        real_batch_size=real,
        per_device_batch_size=per_device,
        reduction=reduction,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )


def test_local_files_give_disjoint_splits(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", gsm8k_rows(100))
    splits = load_splits(DatasetConfig(name="gsm8k", train_file=file, validation_size=10), no_limit)
    prompts = [{example.prompt for example in part} for part in (splits.train, splits.validation)]
    assert [len(part) for part in prompts] == [90, 10]
    assert not prompts[0] & prompts[1]
    assert splits.test == ()


def test_training_rows_that_are_in_another_split_are_left_out(tmp_path):
    config = DatasetConfig(
        name="gsm8k",
        train_file=write_jsonl(tmp_path / "train.jsonl", gsm8k_rows(50)),
        validation_file=write_jsonl(tmp_path / "validation.jsonl", gsm8k_rows(5)),
        test_file=write_jsonl(tmp_path / "test.jsonl", gsm8k_rows(5, start=45)),
    )
    splits = load_splits(config, no_limit)
    assert len(splits.train) == 40
    assert splits.n_overlapping == 10


def test_rewritings_of_one_question_never_lie_in_two_splits(tmp_path):
    rows = [
        {
            "query": f"q{i}.{j}",
            "response": "r",
            "type": "GSM_Rephrased",
            "original_question": f"What is {i} + 1?",
        }
        for i in range(30)
        for j in range(4)
    ]
    config = DatasetConfig(
        name="meta_math",
        train_file=write_jsonl(tmp_path / "train.jsonl", rows),
        test_file=write_jsonl(tmp_path / "test.jsonl", gsm8k_rows(6)),
        validation_size=8,
    )
    splits = load_splits(config, no_limit)
    groups = [{example.group for example in part} for part in (splits.train, splits.validation, splits.test)]
    assert len(splits.validation) == 8
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert len(splits.train) + len(splits.validation) + splits.n_overlapping == 120


def test_order_is_shuffled_once_and_the_same_for_everyone(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", gsm8k_rows(100))
    config = DatasetConfig(name="gsm8k", train_file=file, validation_size=10)
    first, second = load_splits(config, no_limit), load_splits(config, no_limit)
    assert first == second
    in_file_order = [f"Q: What is {i} + 1?\nA: " for i in range(10)]
    assert [example.prompt for example in first.validation] != in_file_order


def test_the_fingerprint_follows_the_content(tmp_path):
    rows = gsm8k_rows(30)
    config = DatasetConfig(name="gsm8k", train_file=write_jsonl(tmp_path / "rows.jsonl", rows))
    before = load_splits(config, no_limit).fingerprint
    rows[7]["answer"] = "#### 9"
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert load_splits(config, no_limit).fingerprint != before


def test_token_limit_of_the_dataset(tmp_path):
    rows = [{"query": f"q{i}", "response": "r", "type": "GSM_Rephrased"} for i in range(40)]
    rows += [{"query": f"m{i}", "response": "r", "type": "MATH_Rephrased"} for i in range(40)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DatasetConfig(name="meta_math", train_file=file, validation_size=5, train_size=12)
    splits = load_splits(config, lambda texts: [600 if "Q: q1" in text else 10 for text in texts])
    assert len(splits.train) == 12
    assert not any("Q: q1" in example.prompt for example in splits.train)
    assert all(example.prompt.startswith("Q: q") for example in splits.train)


def test_meta_math_target_ends_before_the_answer_line():
    row = {"query": "q", "response": "1 + 1 = 2\n#### 2\nThe answer is: 2", "type": "GSM_AnsAug"}
    example = SPECS["meta_math"].to_example({**row, "original_question": "first"})
    assert example == Example("Q: q\nA: ", "1 + 1 = 2\n#### 2", row["response"], group="Q: first\nA: ")
    assert SPECS["meta_math"].to_example(row).group == example.prompt


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("rows.jsonl", '{"question": "a", "answer": "b"}\n{broken\n', "rows.jsonl, line 2: not valid JSON"),
        ("rows.jsonl", '{"question": "a"}\n', "line 1: no column 'answer'; it has: question"),
        ("rows.jsonl", "[1, 2]\n", "line 1: is a list"),
        ("rows.jsonl", '{"question": "a", "answer": null}\n', "line 1: column 'answer' is null"),
        ("rows.jsonl", "", "split is empty"),
        ("rows.json", '{"question": "a"}', "holds a dict"),
        ("rows.json", '[{"question": "a",\n "answer" "b"}]', "rows.json, line 2: not valid JSON"),
        ("rows.txt", "x", "cannot read .txt"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        load_splits(DatasetConfig(name="gsm8k", train_file=str(tmp_path / name)), no_limit)


def test_missing_file_and_unknown_dataset(tmp_path):
    with pytest.raises(UserError, match="no such data file"):
        load_splits(DatasetConfig(name="gsm8k", train_file=str(tmp_path / "none.jsonl")), no_limit)
    with pytest.raises(UserError, match="is a folder"):
        load_splits(DatasetConfig(name="gsm8k", train_file=str(tmp_path)), no_limit)
    with pytest.raises(UserError, match="did you mean 'gsm8k'"):
        load_splits(DatasetConfig(name="gsmk8"), no_limit)


def test_prompt_is_masked_exactly(tokenizer):
    example = Example("Q: 1 + 1?\nA: ", "2\n#### 2", "2", "g")
    (encoded,) = encode_split([example], tokenizer, joiner="", max_length=64, name="x").examples
    assert tokenizer.decode(encoded.ids[: encoded.n_prompt]) == example.prompt
    assert tokenizer.decode(encoded.ids[encoded.n_prompt :]) == example.target + tokenizer.eos_token


def test_a_tokenizer_that_ends_texts_itself(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    example = Example("Q: 1 + 1?\nA: ", "2\n#### 2", "2", "g")
    assert tokenizer(example.prompt)["input_ids"][-1] == tokenizer.eos_token_id
    (encoded,) = encode_split([example], tokenizer, joiner="", max_length=64, name="x").examples
    assert tokenizer.decode(encoded.ids[: encoded.n_prompt]) == example.prompt
    assert tokenizer.decode(encoded.ids[encoded.n_prompt :]) == example.target + tokenizer.eos_token


def test_a_token_across_the_boundary_is_learned(tokenizer):
    # Without a separator, 'ha' + 'ppy' may merge; no character of the target may go unlearned.
    example = Example("The answ", "er is 4", "4", "g")
    (encoded,) = encode_split([example], tokenizer, joiner="", max_length=64, name="x").examples
    learned = tokenizer.decode(encoded.ids[encoded.n_prompt :])
    assert learned.endswith("er is 4" + tokenizer.eos_token)


def test_truncation_is_counted_and_never_leaves_an_example_without_target(tokenizer):
    examples = [Example("Q: " + "apple " * n + "\nA: ", "4", "4", "g") for n in (1, 30)]
    encoded = encode_split(examples, tokenizer, joiner="", max_length=20, name="train")
    assert (len(encoded.examples), encoded.n_truncated, encoded.n_without_target) == (1, 1, 1)
    with pytest.raises(UserError, match="train split: no example has a target token within 20"):
        encode_split(examples[1:], tokenizer, joiner="", max_length=20, name="train")


def test_collate_pads_right_and_masks_prompt_and_padding():
    examples = random_examples(2)
    batch = collate([(examples[0], 0.5), (examples[1], 0.25), (None, 0.0)], pad_id=1)
    for row, example in enumerate(examples):
        n = len(example.ids)
        assert batch["input_ids"][row, :n].tolist() == example.ids.tolist()
        assert (batch["input_ids"][row, n:] == 1).all()
        assert batch["attention_mask"][row].sum() == n
        assert (batch["labels"][row, : example.n_prompt] == IGNORED).all()
        assert (batch["labels"][row, n:] == IGNORED).all()
        assert (batch["labels"][row] != IGNORED).sum() == example.n_target
    assert (batch["labels"][2] == IGNORED).all()
    assert batch["weights"].tolist() == [0.5, 0.25, 0.0]


@pytest.mark.parametrize(("world_size", "per_device"), [(1, 8), (1, 2), (2, 1), (2, 4), (4, 2)])
def test_every_window_is_dealt_out_exactly_once(world_size, per_device):
    examples = random_examples(37)
    expected = [sorted(window) for window in sampler(examples).windows()]
    ranks = [list(sampler(examples, rank, world_size, per_device)) for rank in range(world_size)]
    steps = 8 // (world_size * per_device)
    assert {len(batches) for batches in ranks} == {5 * steps}
    for window, indices in enumerate(expected):
        batches = chain.from_iterable(rank[window * steps : (window + 1) * steps] for rank in ranks)
        slots = list(chain.from_iterable(batches))
        assert sorted(index for index, _ in slots if index >= 0) == indices
        weights = dict(zip(indices, window_weights(examples, indices, "sample"), strict=True))
        assert all(weight == weights[index] for index, weight in slots if index >= 0)


def test_order_depends_on_seed_and_epoch_alone():
    examples = random_examples(20)
    one, again, other = sampler(examples), sampler(examples), sampler(examples, seed=1)
    assert list(one) == list(again)
    assert list(one) != list(other)
    one.epoch = 1
    assert list(one) != list(again)
    assert sorted(i for window in one.windows() for i in window) == list(range(20))


def test_the_loader_does_not_touch_the_global_random_state():
    before = torch.get_rng_state()
    batches = list(WindowLoader(sampler(random_examples(9)), pad_id=0))
    assert len(batches) == 8
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_losses_of_micro_batches_add_up(reduction):
    model, examples = small_llama(), random_examples(11)
    totals = []
    for batch_size in (1, 4, 11):
        batches = whole_window(examples, range(11), batch_size=batch_size, reduction=reduction, pad_id=0)
        losses = [
            weighted_loss(model, collate([(examples[i], weight) for i, weight in slots], 0)).item()
            for slots in batches
        ]
        totals.append(sum(losses))
    np.testing.assert_allclose(totals, totals[0], rtol=1e-6)
