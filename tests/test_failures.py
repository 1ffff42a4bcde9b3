"""No memory, and numbers that are none: one line with the remedy, and a record."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, only_run, random_examples
from test_training import adapted_llama, config, fit

from lora_one import training
from lora_one.config import valid_keys
from lora_one.data.batches import Limits, WindowSampler
from lora_one.errors import UserError
from lora_one.out_of_memory import _REMEDIES, explain_out_of_memory, is_out_of_memory
from lora_one.steps import Steps

CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("function", "error", "line"),
    [
        (
            "lora_one.training.weighted_loss",
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand so on"),
            "out of GPU memory in the stage 'training'; lower model.max_tokens_per_device, or use "
            "gradient_checkpointing=true or model.bf16=true or model.quantization=4bit; "
            "the run is kept as failed",
        ),
        (
            "lora_one.training.weighted_loss",
            RuntimeError(CPU),
            "out of memory in the stage 'training'; lower",
        ),
        (
            "run_exp.estimate_gradient",
            MemoryError(),
            "out of memory in the stage 'gradient'; lower init.max_length, or use init.estimator=sketch or",
        ),
        (
            "run_exp.load_model",
            OSError(12, "Cannot allocate memory"),
            "out of memory in the stage 'model'; use model.quantization=4bit or model.bf16=true or "
            "model.device_map=auto;",
        ),
        (
            "run_exp.grade",
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "out of GPU memory in the stage 'test'; lower eval.max_tokens, or use",
        ),
    ],
)
def test_no_memory_is_one_line_and_a_record(cli, tmp_path, monkeypatch, function, error, line):
    monkeypatch.setattr(function, failing(error))
    done = cli("debug=short", "eval.before_training=false")
    assert done.returncode == 1
    (said,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert said.startswith(f"error: {line}")
    assert "Traceback" not in done.stderr
    record = json.loads((only_run(tmp_path / "results") / "record.json").read_text())
    assert (record["status"], f"error: {record['error']}") == ("failed", said)


def test_every_named_setting_is_one():
    named = {key for remedies in _REMEDIES.values() for key in remedies}
    assert named <= set(valid_keys())


def test_what_is_already_so_is_not_advised():
    settings = {"model": {"bf16": True, "per_device_batch_size": 1, "quantization": None}, "seed": 0}
    line = explain_out_of_memory(MemoryError(), "training", settings)
    assert "bf16" not in line
    assert "per_device_batch_size" not in line
    assert "model.quantization=4bit" in line
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit of the address space")
def test_memory_that_is_really_missing(tmp_path):
    """Two gigabytes of address space beside those of the imports, and a batch that needs more."""
    program = """
import resource, run_exp
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2 * 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
run_exp.main()
"""
    arguments = ["debug=short", f"results_dir={tmp_path}", "eval.before_training=false"]
    arguments += ["model.real_batch_size=4096", "model.per_device_batch_size=4096", "dataset.train_size=8192"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "error: out of memory in the stage 'training'; lower model.per_device_batch_size" in done.stderr
    assert "Traceback" not in done.stderr


def poisoned(step: int):
    """A loss that is no number from a step on."""
    loss, calls = training.weighted_loss, []

    def call(model, inputs):
        calls.append(1)
        return loss(model, inputs) * (float("nan") if len(calls) >= step else 1.0)

    return call


def test_a_loss_that_is_no_number_names_step_examples_and_checkpoint(tmp_path, monkeypatch):
    settings = config(save_steps=4, per_device_batch_size=8, eval_epochs=2.0)
    monkeypatch.setattr(training, "weighted_loss", poisoned(10))
    with pytest.raises(UserError) as caught:
        fit(tmp_path, settings)
    sampler = WindowSampler(
        random_examples(44), real_batch_size=8, limits=Limits(max_examples=8), reduction="sample", seed=0
    )
    sampler.set_epoch(1)  # of six steps each; the tenth is its fourth
    rows = ", ".join(str(row) for row in list(sampler.windows())[3])
    assert str(caught.value).startswith(
        "step 10: the training loss is nan; lower model.learning_rate, use model.bf16=false, or check the "
        f"data (examples {rows} of the encoded training split); "
    )
    assert f"the last good checkpoint is {tmp_path}/checkpoints/checkpoint-8;" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gradient_that_is_no_number_is_not_kept(tmp_path, monkeypatch):
    """The loss of its step is a number, and a checkpoint after it would hold none."""

    def spoil(self, args, state, control, model=None, **_):
        if state.global_step == 3:
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("inf"))

    norm = training._WindowTrainer._clip_grad_norm

    def clip(self, model):
        spoil(self, None, self.state, None, model)
        return norm(self, model)

    monkeypatch.setattr(training._WindowTrainer, "_clip_grad_norm", clip)
    with pytest.raises(
        UserError, match=r"step 4: the gradient norm is (inf|nan); .* data \(examples"
    ) as caught:
        fit(tmp_path, config(save_steps=2))
    assert "the last good checkpoint is" in str(caught.value)
    assert re.search(r"checkpoint-2;", str(caught.value))


def test_before_the_first_checkpoint_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "weighted_loss", poisoned(2))
    with pytest.raises(UserError, match="the last good checkpoint is none yet; the run is kept as failed"):
        fit(tmp_path, config(per_device_batch_size=8), adapted_llama())


def test_steps_know_their_examples_and_tokens():
    examples = random_examples(44)
    sampler = WindowSampler(
        examples,
        real_batch_size=8,
        limits=Limits(max_examples=2),
        reduction="sample",
        seed=3,
        rank=1,
        world_size=2,
    )
    steps = Steps(sampler)
    first_epoch = sorted(row for step in range(6) for row in steps.examples(step))
    assert first_epoch == list(range(44))
    assert steps.examples(6) != steps.examples(0)
    assert steps.tokens(0, 6) == steps.tokens(6, 12) == sum(len(example.ids) for example in examples)
    assert sampler.epoch == 0
