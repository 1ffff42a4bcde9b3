"""The size of micro-batches that is found where none is given."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALONE, on_two_processes, random_examples, small_llama

from lora_one.budget import micro_batch_limits, tokens_that_fit
from lora_one.config import ModelConfig
from lora_one.data.batches import Limits, collate
from lora_one.data.encoding import Encoded
from lora_one.losses import weighted_loss
from lora_one.memory import LivePeak
from lora_one.packing import Packing
from lora_one.processes import start_processes


def test_what_is_found_fits_and_fills_the_memory():
    model, length = small_llama(), 40
    example = Encoded(np.arange(3, 3 + length, dtype=np.int32), 1)

    def peak_bytes(n: int) -> int:
        with LivePeak() as memory:
            weighted_loss(model, collate([(example, 1.0)] * n, 0)).backward()
        model.zero_grad(set_to_none=True)
        return memory.peak

    for free in (4_000_000, 9_000_000):
        tokens = tokens_that_fit(peak_bytes, length, free)
        assert tokens % length == 0
        assert 0.85 * free < peak_bytes(tokens // length) <= 1.02 * free


def test_one_example_is_tried_in_any_case_and_there_is_an_end():
    assert tokens_that_fit(lambda n: 1000 * n, 100, 10) == 100
    assert tokens_that_fit(lambda n: 1000 * n, 100, 10**12) == 16_384
    assert tokens_that_fit(lambda n: 1000, 100, 10**6) == 16_384

    def too_large_for_two(n: int) -> int:
        if n == 2:
            raise torch.OutOfMemoryError
        return 1000

    assert tokens_that_fit(too_large_for_two, 100, 10**12) == 100


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Limits(max_tokens=512 * min(32, torch.get_num_threads()))),
        ({"max_tokens_per_device": 70}, Limits(max_tokens=70)),
        ({"per_device_batch_size": 3}, Limits(max_examples=3)),
    ],
)
def test_what_is_given_is_taken(settings, expected):
    config = ModelConfig.model_validate({"name": "x"} | settings)
    assert micro_batch_limits(None, config, random_examples(3), 0, ALONE) == expected


def test_packed_rows_are_longer():
    config, threads = ModelConfig(name="x"), min(16, torch.get_num_threads())
    limits = micro_batch_limits(None, config, random_examples(3), 0, ALONE, packing=Packing.BY_EXAMPLE)
    assert limits == Limits(max_tokens=1024 * threads, packed=True)


def limits_as_rank(results: str) -> None:
    processes = start_processes()
    torch.set_num_threads(1 + processes.rank)
    limits = micro_batch_limits(None, ModelConfig(name="x"), random_examples(3), 0, processes)
    (Path(results) / str(processes.rank)).write_text(str(limits.max_tokens))


def test_all_processes_take_the_same(tmp_path):
    """Each cuts the same window by itself."""
    on_two_processes(limits_as_rank, str(tmp_path))
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["512", "512"]
