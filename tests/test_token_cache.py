"""Tokens on disk: found again, never of something else, made again where damaged."""

import numpy as np
import pytest
from conftest import EMBEDDED
from transformers import AutoTokenizer

from lora_one.config import ExperimentConfig
from lora_one.data import encoding, prepare
from lora_one.data.encoding import encode_split
from lora_one.data.example import Example
from lora_one.data.prepare import prepare_data
from lora_one.data.token_cache import NO_CACHE, TokenCache

TEXTS = ["one", "two"]


def numbers(start: int = 0):
    return {"lengths": np.arange(start, start + 5, dtype=np.int32), "ids": np.arange(7, dtype=np.int32)}


def never():
    raise AssertionError("made again")


@pytest.fixture
def cache(tmp_path, tokenizer):
    return TokenCache(tmp_path / "tokens", tokenizer)


def entries(tmp_path):
    return sorted(path for path in (tmp_path / "tokens").rglob("*") if path.is_file())


def test_what_was_made_is_found_again(cache, tmp_path, tokenizer):
    cache.get(TEXTS, ["a", 1], numbers)
    again = TokenCache(tmp_path / "tokens", tokenizer).get(TEXTS, ["a", 1], never)
    assert {name: array.tolist() for name, array in again.items()} == {
        name: array.tolist() for name, array in numbers().items()
    }
    assert len(entries(tmp_path)) == 1


def test_another_text_setting_or_tokenizer_is_another_entry(cache, tmp_path, tokenizer):
    cache.get(TEXTS, ["a", 1], numbers)
    others = [
        (["one", "tw", "o"], ["a", 1]),
        (["onetwo", ""], ["a", 1]),
        (TEXTS[::-1], ["a", 1]),
        (TEXTS, ["a", 2]),
    ]
    for number, (texts, settings) in enumerate(others):
        assert cache.get(texts, settings, lambda number=number: numbers(number))["lengths"][0] == number
    other = AutoTokenizer.from_pretrained(EMBEDDED)
    other.add_tokens(["apple"])
    assert TokenCache(tmp_path / "tokens", other).get(TEXTS, ["a", 1], lambda: numbers(9))["lengths"][0] == 9
    other = AutoTokenizer.from_pretrained(EMBEDDED, eos_token="<|other|>")
    assert TokenCache(tmp_path / "tokens", other).get(TEXTS, ["a", 1], lambda: numbers(8))["lengths"][0] == 8
    assert len(entries(tmp_path)) == 7


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "text"])
def test_a_damaged_entry_is_noticed_and_made_again(cache, tmp_path, tokenizer, damage):
    cache.get(TEXTS, [], numbers)
    (path,) = entries(tmp_path)
    content = path.read_bytes()
    spoilt = {"cut": content[:-3], "changed": content[:-1] + b"\x07", "empty": b"", "text": b"nothing"}
    path.write_bytes(spoilt[damage])
    reader = TokenCache(tmp_path / "tokens", tokenizer)
    assert reader.get(TEXTS, [], numbers)["ids"].tolist() == list(range(7))
    assert reader.damaged == [path]
    assert path.read_bytes() == content


def test_others_read_and_do_not_write(tmp_path, tokenizer):
    reader = TokenCache(tmp_path / "tokens", tokenizer, writes=False)
    assert reader.get(TEXTS, [], numbers)["ids"].tolist() == list(range(7))
    assert not (tmp_path / "tokens").exists()


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path, tokenizer):
    (tmp_path / "tokens").write_text("a file")
    cache = TokenCache(tmp_path / "tokens", tokenizer)
    assert cache.get(TEXTS, [], numbers)["ids"].tolist() == list(range(7))


def examples(n: int) -> list[Example]:
    return [Example(f"Q: {i}?\nA: ", "x" * (i % 40), "", f"{i}") for i in range(n)]


@pytest.mark.parametrize("as_pairs", [False, True])
def test_a_split_from_the_cache_is_the_same(cache, tmp_path, tokenizer, monkeypatch, as_pairs):
    monkeypatch.setattr(encoding, "_WORTH_KEEPING", 1)
    settings = {"joiner": " ", "max_length": 24, "name": "train", "as_pairs": as_pairs}
    plain = encode_split(examples(2300), tokenizer, **settings)
    encode_split(examples(2300), tokenizer, **settings, cache=cache)
    assert len(entries(tmp_path)) == 3
    monkeypatch.setattr(encoding, "_packed", lambda made: never())
    found = encode_split(examples(2300), tokenizer, **settings, cache=cache)
    assert (found.n_truncated, found.n_without_target) == (plain.n_truncated, plain.n_without_target)
    assert plain.n_truncated > 0
    for one, other in zip(plain.examples, found.examples, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert (one.n_prompt, one.is_pair) == (other.n_prompt, other.is_pair)


def test_small_splits_are_not_kept(cache, tmp_path, tokenizer):
    encode_split(examples(50), tokenizer, joiner="", max_length=24, name="train", cache=cache)
    assert not (tmp_path / "tokens").exists()
    assert NO_CACHE.get(TEXTS, [], numbers)["ids"].tolist() == list(range(7))


def test_a_run_uses_the_folder_and_tells_of_damage(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "_WORTH_KEEPING", 1)
    monkeypatch.setattr(prepare, "CHUNK", 40)
    tree = {
        "dataset": {"name": "tiny", "train_size": 60, "validation_size": 5, "test_size": 5},
        "model": {"name": "x", "max_length": 64},
        "token_cache_dir": str(tmp_path / "tokens"),
    }
    config = ExperimentConfig.model_validate(tree)
    first = prepare_data(config, tokenizer)
    assert len(entries(tmp_path)) == 2
    entries(tmp_path)[0].write_bytes(b"")
    second = prepare_data(config, tokenizer)
    assert second.summary() == first.summary()
    assert [line for line in second.remarks() if "token cache" in line] == [
        "1 damaged files of the token cache: made again"
    ]
