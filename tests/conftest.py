"""Shared pieces: a Llama of a few thousand parameters, its data, and the program as a function."""

import importlib.util
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read at import: no test may wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# The tests run side by side; more threads than cores are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from lora_one.data.encoding import Encoded
from lora_one.processes import Processes, end_processes

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
EMBEDDED = ROOT / "lora_one" / "assets" / "tiny_llama"
ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))


def small_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A random Llama: hidden 32, two layers, 64 words."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.config.use_cache = False
    return model.eval()


def save_small_t5(folder: Path, tokenizer: Any, **settings: Any) -> Path:
    """Writes a random T5 with the embedded tokenizer: hidden 32, two blocks on each side."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids["decoder_start_token_id"] = tokenizer.pad_token_id
    config = T5Config(vocab_size=len(tokenizer), **(sizes | ids | settings))
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_examples(n: int, seed: int = 0, longest: int = 20) -> list[Encoded]:
    """Examples of random tokens, lengths and prompt lengths."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(n):
        length = int(rng.integers(6, longest))
        ids = rng.integers(3, 64, size=length).astype(np.int32)
        examples.append(Encoded(ids, int(rng.integers(1, length - 2))))
    return examples


def load_script(name: str):
    """A program of ``scripts/`` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture
def cli(monkeypatch, capfd, tmp_path):
    """Runs ``run_exp.py`` in this process; returns its exit code, output and error output."""
    import run_exp

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        place = () if any("results_dir=" in a for a in arguments) else (f"results_dir={tmp_path}/results",)
        monkeypatch.setattr(sys, "argv", ["run_exp.py", *arguments, *place])
        with pytest.raises(SystemExit) as exited:
            run_exp.main()
        out, err = capfd.readouterr()
        code = exited.value.code or 0
        return subprocess.CompletedProcess(arguments, int(code), out, err)

    return call


def run_program(*command: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in the repository's root, in a process of its own."""
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )


# A process that has imported everything once, and computed nothing, gives others by a fork.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["run_exp"])


def run_script(script: str | Path, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """A program of the repository in a process of its own, which need not import the libraries again."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "out", Path(folder) / "err"]
        worker = FORKS.Process(target=_as_script, args=(ROOT / script, arguments, files))
        worker.start()
        worker.join(timeout)
        ended = worker.exitcode
        worker.kill()
        out, err = (file.read_text() if file.exists() else "" for file in files)
    assert ended is not None, f"{script} took more than {timeout} s: {err[-2000:]}"
    return subprocess.CompletedProcess([str(script), *arguments], ended, out, err)


def _as_script(script: Path, arguments: tuple[str, ...], files: list[Path]) -> None:
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def on_two_processes(function: Callable[..., None], *arguments: Any) -> None:
    """Runs a module-level function in two gloo processes, as a launcher would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [
        FORKS.Process(target=_as_rank, args=(rank, port, function, arguments), daemon=True) for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=180)
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert codes == [0, 0]


def _as_rank(rank: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    function(*arguments)
    end_processes()


def only_run(results: Path) -> Path:
    """The single run folder below ``results``."""
    (record,) = results.rglob("record.json")
    return record.parent
