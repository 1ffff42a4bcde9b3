"""What runs of one process share: read once, and never changed by one for the next."""

import functools

import pytest
import torch

import run_exp
from lora_one import models
from lora_one.config import ExperimentConfig
from lora_one.memo import Memo
from lora_one.models import EMBEDDED_MODEL


def test_a_memo_holds_the_last_thing_only():
    memo, made = Memo(), []

    def make(name):
        return lambda: made.append(name) or name

    assert [memo.get(key, make(key)) for key in ("a", "a", "b", "a")] == ["a", "a", "b", "a"]
    assert made == ["a", "b", "a"]
    assert [memo.get(None, make("c")), memo.get(None, make("c"))] == ["c", "c"]
    assert made[3:] == ["c", "c"]


@pytest.mark.parametrize(
    ("method", "weights"),
    [("init=gradient", "adapter/adapter_model"), ("peft=full_ft", "merged/model")],  # both change the base
)
def test_a_sweep_reads_data_and_weights_once_and_trains_the_same(cli, tmp_path, monkeypatch, method, weights):
    calls = []
    monkeypatch.setattr(run_exp, "_weights", Memo())
    for module, name in ((run_exp, "prepare_data"), (models, "read_weights")):
        real = getattr(module, name)
        counted = functools.partial(
            lambda real, name, *a, **k: calls.append(name) or real(*a, **k), real, name
        )
        monkeypatch.setattr(module, name, counted)
    short = ("debug=short", "eval.task=null", method)
    assert cli("-m", *short, "seed=0,1", f"results_dir={tmp_path}/sweep").returncode == 0
    assert sorted(calls) == ["prepare_data", "read_weights"]
    assert cli(*short, "seed=1", f"results_dir={tmp_path}/alone").returncode == 0
    assert len(calls) == 4
    (alone,) = tmp_path.glob(f"alone/*/{weights}.safetensors")
    (second,) = tmp_path.glob(f"sweep/*-s1-*/{weights}.safetensors")
    assert alone.read_bytes() == second.read_bytes()


def test_weights_that_take_too_much_of_the_memory_are_not_kept(monkeypatch):
    config = ExperimentConfig.model_validate({"dataset": {"name": "tiny"}, "model": {"name": EMBEDDED_MODEL}})
    tokenizer, memo, reads = models.load_tokenizer(config.model), Memo(), []
    real = models.read_weights
    monkeypatch.setattr(models, "read_weights", lambda *a: reads.append(1) or real(*a))
    monkeypatch.setattr(models, "free_host_bytes", lambda: 1_000)
    for _ in range(2):
        models.load_model(config, tokenizer, torch.device("cpu"), memo)
    assert len(reads) == 2
    monkeypatch.setattr(models, "free_host_bytes", lambda: 10**12)
    first, second = (models.load_model(config, tokenizer, torch.device("cpu"), memo) for _ in range(2))
    assert len(reads) == 3
    assert first.model is not second.model
    first.model.get_input_embeddings().weight.data.zero_()
    assert second.model.get_input_embeddings().weight.any()
