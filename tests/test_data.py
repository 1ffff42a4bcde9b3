"""Rows, splits, tokens and batches."""

import json

import numpy as np
import pytest
import torch
from conftest import random_examples, small_llama
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM

from lora_one.config import DatasetConfig
from lora_one.data.batches import (
    IGNORED,
    Limits,
    WindowLoader,
    WindowSampler,
    collate,
    collate_slots,
    split_window,
    window_weights,
)
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


PAIRS = Limits(max_examples=2)


def sampler(
    examples, rank=0, world_size=1, limits=PAIRS, real=8, seed=0, reduction="sample"
) -> WindowSampler:
    return WindowSampler(
        examples,
        real_batch_size=real,
        limits=limits,
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


def test_a_validation_file_of_test_rows_is_refused_not_replaced(tmp_path):
    rows = gsm8k_rows(40)
    files = {
        f"{name}_file": write_jsonl(tmp_path / f"{name}.jsonl", part)
        for name, part in (("train", rows[:30]), ("validation", rows[30:35]), ("test", rows[30:]))
    }
    with pytest.raises(UserError, match="every row of the validation split is in the test split too"):
        load_splits(DatasetConfig(name="gsm8k", **files), no_limit)


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
    batch = collate([(examples[0], 0.5), (examples[1], 0.25), (examples[0].blank(), 0.0)], pad_id=1)
    width, expected = batch["input_ids"].shape[1], []
    for row, (example, weight) in enumerate(zip(examples, (0.5, 0.25), strict=True)):
        n, ids = len(example.ids), example.ids.tolist()
        assert batch["input_ids"][row, :n].tolist() == ids
        assert (batch["input_ids"][row, n:] == 1).all()
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (width - n)
        assert (batch["labels"][row, : example.n_prompt] == IGNORED).all()
        assert batch["labels"][row, example.n_prompt : n].tolist() == ids[example.n_prompt :]
        assert (batch["labels"][row, n:] == IGNORED).all()
        # The place before a target token predicts it.
        expected += [(row * width + t - 1, ids[t], weight) for t in range(example.n_prompt, n)]
    assert (batch["labels"][2] == IGNORED).all()
    judged = (batch[name].tolist() for name in ("positions", "targets", "weights"))
    assert list(zip(*judged, strict=True)) == expected


def test_collate_packs_examples_into_one_row():
    examples = random_examples(3)
    slots = [(examples[0], 0.5), (examples[1], 0.25), (examples[2], 0.125)]
    batch, padded = collate(slots, 0, packed=True), collate(slots, 0)
    assert batch["input_ids"][0].tolist() == [i for example in examples for i in example.ids.tolist()]
    assert batch["position_ids"][0].tolist() == [t for example in examples for t in range(len(example.ids))]
    assert "attention_mask" not in batch
    assert torch.equal(batch["targets"], padded["targets"])
    assert torch.equal(batch["weights"], padded["weights"])
    assert torch.equal(
        batch["input_ids"].flatten()[batch["positions"]],
        padded["input_ids"].flatten()[padded["positions"]],
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "limits",
    [
        Limits(max_examples=1),
        Limits(max_examples=3),
        Limits(max_examples=100),
        Limits(max_tokens=1),
        Limits(max_tokens=45),
        Limits(max_tokens=45, packed=True),
        Limits(max_tokens=10_000),
    ],
    ids=str,
)
def test_every_window_is_dealt_out_exactly_once(world_size, limits):
    examples = random_examples(37)
    ranks = [list(sampler(examples, rank, world_size, limits)) for rank in range(world_size)]
    windows = list(sampler(examples).windows())
    assert [len(windows), *map(len, ranks)] == [5] * (world_size + 1)
    for indices, *shares in zip(windows, *ranks, strict=True):
        assert len({len(share) for share in shares}) == 1
        groups = [[index for index, _ in slots if index >= 0] for share in shares for slots in share]
        assert sorted(index for group in groups for index in group) == sorted(indices)
        weights = dict(zip(indices, window_weights(examples, indices, "sample"), strict=True))
        slots = [slot for share in shares for slots in share for slot in slots if slot[0] >= 0]
        assert all(weight == weights[index] for index, weight in slots)
        for lengths in ([len(examples[index].ids) for index in group] for group in groups if group):
            assert len(lengths) <= (limits.max_examples or len(lengths))
            n_tokens = sum(lengths) if limits.packed else len(lengths) * max(lengths)
            assert len(lengths) == 1 or n_tokens <= (limits.max_tokens or n_tokens)


@pytest.mark.parametrize("limits", [Limits(max_tokens=500), Limits(max_examples=2)], ids=str)
def test_the_work_of_a_window_is_dealt_out_evenly(limits):
    examples = random_examples(64, longest=200)
    shares = split_window(examples, range(64), limits=limits, reduction="sample", world_size=4)
    tokens = [
        [len(slots) * max(len(examples[index].ids) for index, _ in slots) for slots in share]
        for share in shares
    ]
    totals = [sum(share) for share in tokens]
    assert max(totals) < 1.04 * min(totals)
    assert all(share == sorted(share, reverse=True) for share in tokens)  # processes of a sharded model meet
    # Neither the limit nor sorting by length costs much: padding stays small.
    assert sum(totals) < 1.15 * sum(len(example.ids) for example in examples)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_packed_rows_and_processes_get_as_many_tokens(world_size):
    examples = random_examples(64, longest=200)
    limits = Limits(max_tokens=1000, packed=True)
    shares = split_window(examples, range(64), limits=limits, reduction="sample", world_size=world_size)
    tokens = [[sum(len(examples[index].ids) for index, _ in slots) for slots in share] for share in shares]
    totals, rows = [sum(share) for share in tokens], [row for share in tokens for row in share]
    assert max(totals) <= 1.01 * min(totals)
    assert max(rows) <= 1.1 * min(rows)
    assert len(rows) <= -(-sum(rows) // 1000) + world_size  # as few as there have to be, and as many for each


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
    assert [len(window) for window in batches] == [4, 1]
    assert torch.equal(torch.get_rng_state(), before)


def reference_loss(model, examples, reduction: str) -> float:
    """Example by example, with the model's whole output and a mask."""
    sums = []
    for example in examples:
        ids = torch.tensor(example.ids[None].astype(np.int64))
        log_probs = model(ids).logits[0].log_softmax(-1).double()
        first = max(1, example.n_prompt)
        sums.append(-sum(log_probs[t - 1, ids[0, t]] for t in range(first, ids.shape[1])).item())
    counts = [example.n_target for example in examples]
    if reduction == "token":
        return sum(sums) / sum(counts)
    return float(np.mean([total / count for total, count in zip(sums, counts, strict=True)]))


def split_loss(model, examples, limits: Limits, reduction: str) -> torch.Tensor:
    window = split_window(examples, range(len(examples)), limits=limits, reduction=reduction, world_size=2)
    batches = [collate_slots(examples, slots, 0, packed=limits.packed) for share in window for slots in share]
    return sum(weighted_loss(model, batch) for batch in batches)


@pytest.mark.parametrize("reduction", ["sample", "token"])
@pytest.mark.parametrize(
    "limits",
    [
        Limits(max_examples=1),
        Limits(max_examples=4),
        Limits(max_tokens=64),
        Limits(max_tokens=64, packed=True),
    ],
    ids=str,
)
def test_losses_of_micro_batches_add_up(reduction, limits):
    model, examples = small_llama(), random_examples(11)
    expected = reference_loss(model, examples, reduction)
    assert split_loss(model, examples, limits, reduction).item() == pytest.approx(expected, rel=1e-6)


CAUSAL = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 8},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {},
    "phi3": {"num_key_value_heads": 2},
}


def small_causal(kind: str, attention: str = "sdpa"):
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
    settings |= {"bos_token_id": 1, "eos_token_id": 2, "attn_implementation": attention}
    config = AutoConfig.for_model(kind, **(settings | CAUSAL[kind]))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, "eager") for kind in CAUSAL]
    + [(kind, "sdpa") for kind in sorted(CAUSAL.keys() - {"bloom", "gemma2"})],
)
def test_no_architecture_needs_the_padding_mask(kind, attention):
    model, examples = small_causal(kind, attention), random_examples(7)
    loss = split_loss(model, examples, Limits(max_examples=4), "sample")
    assert loss.item() == pytest.approx(reference_loss(model, examples, "sample"), rel=1e-5)


def test_a_micro_batch_without_examples_has_no_loss_and_zero_gradients():
    model = small_llama()
    loss = weighted_loss(model, collate_slots(random_examples(2), [(-1, 0.0)], 0))
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
