"""The benchmark of initialisation measures what it says, on a model of a few thousand parameters."""

import sys

import torch
from conftest import ROOT, load_script, run_program

SMALL = ["--hidden", "128", "--layers", "1", "--batches", "2", "--bsz", "2", "--tokens", "16", "--rank", "2"]
SCRIPT = ROOT / "scripts" / "bench_init.py"


def bench():
    return load_script("bench_init")


def test_every_method_is_measured():
    done = run_program(sys.executable, str(SCRIPT), *SMALL, "--rounds", "1")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    methods = {row[0]: row for row in rows}
    for method in ("floor", "exact", "sketch", "sketch_two_pass", "peft", "published"):
        assert float(methods[method][1]) > 0
    assert float(methods["exact"][-1]) > 0.999
    assert float(methods["sketch_two_pass"][-1]) > 0.99
    assert "sketch / published: " in done.stdout


def test_the_floor_takes_no_weight_gradient():
    module = bench()
    model = module.random_model(128, 1, 4096)
    assert model.config.intermediate_size == 344
    from lora_one.collect import watch_activations

    with watch_activations(model, (), lambda *_: None):
        model(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
