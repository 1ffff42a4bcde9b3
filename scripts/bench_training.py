"""Tokens a second of training, side by side in one run, on the same examples and the same model.

    python scripts/bench_training.py                                          # embedded model and problems
    python scripts/bench_training.py --model FOLDER --data gsm8k/train.jsonl  # question, answer a line
    python scripts/bench_training.py --budgets 512 1024 2048                  # sizes of micro-batches
    python scripts/bench_training.py --compile                                # and with compiled blocks

Compared, each over whole optimiser steps of 32 examples with AdamW and LoRA on all linear layers:

    ours         training as in run_exp.py
    padded       the same with model.packing=false
    published    Hugging Face's Trainer and PEFT, 1 example a device, 32 accumulated, as published
    grouped      the same, 32 examples at once, grouped by length
    grouped 8    the same, 8 examples, 4 times accumulated
    limit        no training: forward and backward on dense batches of 8 x 256 tokens, loss at all positions

Tokens are those of the examples, padding left out. Each round runs every method once, whole trainings with
all that they set up, each round beginning with another; shown are medians of the rates, and of the ratios to
the other methods in the same round. "limit" computes the head everywhere and has PEFT's layers.
Memory is the peak of live tensor bytes in one optimiser step of the longest examples, from a run of its own.
With --compile, "ours" and "limit" run also with the model's blocks compiled, and are then compared with each
other. What compiling takes is in a training before the rounds, and told below the table.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_one import training
from lora_one.config import ExperimentConfig, WandbConfig
from lora_one.data.encoding import Encoded, encode_split
from lora_one.data.specs import Example
from lora_one.data.tiny import problems
from lora_one.errors import UserError
from lora_one.fused import compiled_blocks
from lora_one.memory import LivePeak
from lora_one.models import EMBEDDED_MODEL, linear_layers, model_source
from lora_one.processes import Processes, start_processes
from lora_one.tables import markdown_table
from lora_one.tracking import Tracker

REAL_BATCH, DENSE = 32, (8, 256)
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Case:
    """What is trained, and on what."""

    model: Any
    tokenizer: Any
    examples: Sequence[Encoded]
    processes: Processes
    dtype: str

    @property
    def n_tokens(self) -> int:
        """Of all examples."""
        return sum(len(example.ids) for example in self.examples)

    def adapted(self) -> Any:
        """A copy of the model with an adapter on every linear layer."""
        model = copy.deepcopy(self.model)
        torch.manual_seed(0)
        settings = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=list(linear_layers(model)))
        return get_peft_model(model, settings)


@dataclass
class Measured:
    """Tokens a second, round by round, and what was seen before them.

    Attributes:
        rates: Of each round.
        peak_bytes: Live ones; None where compiled code allocates out of sight.
        first_rate: Of the training that compiles, else None.
    """

    rates: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    first_rate: float | None = None


Method = Callable[[Case, Sequence[Encoded]], int]


# ---- the methods: each trains on the examples and returns the number of tokens


def ours(**settings: Any) -> Method:
    """Training here, with settings of ``model``."""

    def run(case: Case, examples: Sequence[Encoded]) -> int:
        model = {
            "name": "bench",
            "real_batch_size": REAL_BATCH,
            "learning_rate": LEARNING_RATE,
            "warmup_steps": 0,
            "loss_reduction": "token",
            "save_steps": 10**9,
            "bf16": case.dtype == "bfloat16",
        }
        config = ExperimentConfig.model_validate({"dataset": {"name": "tiny"}, "model": model | settings})
        with tempfile.TemporaryDirectory() as folder:
            training.train(
                case.adapted(),
                examples,
                examples[:1],
                config,
                pad_id=case.tokenizer.pad_token_id,
                processes=case.processes,
                folder=Path(folder),
                tracker=Tracker(WandbConfig(mode="disabled"), "bench", Path(folder), {}),
            )
        return sum(len(example.ids) for example in examples)

    return run


def plain(per_device: int, *, grouped: bool) -> Method:
    """Hugging Face's Trainer with PEFT."""

    def run(case: Case, examples: Sequence[Encoded]) -> int:
        rows = [
            {
                "input_ids": example.ids.tolist(),
                "attention_mask": [1] * len(example.ids),
                "labels": [-100] * example.n_prompt + example.ids[example.n_prompt :].tolist(),
            }
            for example in examples
        ]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                use_cpu=case.processes.device.type == "cpu",
                per_device_train_batch_size=per_device,
                gradient_accumulation_steps=REAL_BATCH // per_device,
                train_sampling_strategy="group_by_length" if grouped else "random",
                num_train_epochs=1,
                learning_rate=LEARNING_RATE,
                bf16=case.dtype == "bfloat16",
                save_strategy="no",
                disable_tqdm=True,
                report_to=[],
            )
            collator = DataCollatorForSeq2Seq(case.tokenizer, padding="longest")
            trainer = Trainer(case.adapted(), arguments, train_dataset=rows, data_collator=collator)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return sum(len(example.ids) for example in examples)

    return run


def limit(*, compiled: bool = False) -> Method:
    """Forward and backward on dense batches of about as many tokens, without an optimiser."""

    def run(case: Case, examples: Sequence[Encoded]) -> int:
        rows, columns = DENSE
        n_batches = max(1, round(sum(len(example.ids) for example in examples) / (rows * columns)))
        model, device = case.adapted().train(), case.processes.device
        generator = torch.Generator().manual_seed(0)
        with compiled_blocks(model) if compiled else nullcontext():
            for _ in range(n_batches):
                ids_BT = torch.randint(case.model.config.vocab_size, DENSE, generator=generator).to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bfloat16"):
                    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
                    loss = cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())
                loss.backward()
        return n_batches * rows * columns

    return run


METHODS: dict[str, Method] = {
    "ours": ours(),
    "padded": ours(packing=False),
    "published": plain(1, grouped=False),
    "grouped": plain(REAL_BATCH, grouped=True),
    "grouped 8": plain(8, grouped=True),
    "limit": limit(),
}
COMPILED: dict[str, Method] = {"ours, compiled": ours(compile=True), "limit, compiled": limit(compiled=True)}


# ---- measuring


def measure(case: Case, methods: dict[str, Method], rounds: int) -> dict[str, Measured]:
    """Every method once a round, after a run of each that compiles it, or a short one for its memory."""
    found = {name: Measured() for name in methods}
    longest = sorted(case.examples, key=lambda example: -len(example.ids))[:REAL_BATCH]
    for name, method in methods.items():
        if name in COMPILED:
            print(f"compiling: {name}", file=sys.stderr, flush=True)
            found[name].first_rate = rate(case, method)
            continue
        with LivePeak() as memory:
            method(case, longest)
        found[name].peak_bytes = memory.peak
    for number in range(rounds):
        shift = number % len(methods)
        for name, method in [*methods.items()][shift:] + [*methods.items()][:shift]:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            found[name].rates.append(rate(case, method))
    return found


def rate(case: Case, method: Method) -> float:
    """Tokens a second of one training, whole."""
    begin = time.perf_counter()
    n_tokens = method(case, case.examples)
    if case.processes.device.type == "cuda":
        torch.cuda.synchronize()
    return n_tokens / (time.perf_counter() - begin)


def report(found: dict[str, Measured]) -> str:
    """The table."""
    others = [name for name in ("limit", "published", "grouped") if name in found]
    rows = [["method", "tokens/s", *(f"/ {name}" for name in others), "peak MB"]]
    for name, measured in found.items():
        beside = ["limit, compiled" if other == "limit" and name in COMPILED else other for other in others]
        ratios = [
            statistics.median(a / b for a, b in zip(measured.rates, found[other].rates, strict=True))
            for other in beside
        ]
        tokens_a_second = f"{statistics.median(measured.rates):,.0f}"
        peak = "" if measured.peak_bytes is None else f"{measured.peak_bytes / 1e6:,.0f}"
        rows.append([name, tokens_a_second, *(f"{ratio:.2f}" for ratio in ratios), peak])
    return markdown_table(rows)


def compiling(found: dict[str, Measured], n_tokens: int) -> list[str]:
    """A line for each compiled method: what it cost to compile."""
    return [
        f"{name}: the first training took {n_tokens / measured.first_rate:.0f} s, which compiled, later ones "
        f"{n_tokens / statistics.median(measured.rates):.0f} s"
        for name, measured in found.items()
        if measured.first_rate is not None
    ]


def make_case(arguments: argparse.Namespace) -> Case:
    """The model and the examples that the arguments name."""
    source = model_source(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, arguments.dtype))
    model.config.use_cache = False
    n = REAL_BATCH * arguments.steps
    if arguments.data:
        lines = Path(arguments.data).read_text(encoding="utf-8").splitlines()[:n]
        rows: list[dict[str, str]] = [json.loads(line) for line in lines]
    else:
        rows = problems("train", n)
    if len(rows) < n:
        sys.exit(f"error: --data {arguments.data}: {len(rows)} rows, --steps {arguments.steps} needs {n}")
    examples = encode_split(
        [Example(row["question"], row["answer"], "", "") for row in rows],
        tokenizer,
        joiner="\n",
        max_length=arguments.max_length,
        name="bench",
    ).examples
    processes = start_processes()
    return Case(model.to(processes.device), tokenizer, examples, processes, arguments.dtype)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="a folder or a Hub name")
    parser.add_argument("--data", help="JSON lines with question and answer, instead of generated problems")
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps a round")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=int, help="also these tokens a micro-batch")
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    try:
        case = make_case(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or arguments.model}: {error.strerror or 'cannot be read'}")
    is_gpu = case.processes.device.type == "cuda"
    where = torch.cuda.get_device_name() if is_gpu else f"{torch.get_num_threads()} CPU threads"
    lengths = [len(example.ids) for example in case.examples]
    print(
        f"{arguments.model}: {sum(p.numel() for p in case.model.parameters()) / 1e6:,.1f} million weights, "
        f"{len(lengths)} examples of {min(lengths)} to {max(lengths)} tokens (mean "
        f"{statistics.mean(lengths):.0f}), {arguments.dtype}, {where}\n"
    )
    methods = {name: METHODS[name] for name in arguments.methods}
    methods |= {f"ours, {n} tokens": ours(max_tokens_per_device=n) for n in arguments.budgets or ()}
    if arguments.compile:
        methods |= {name: method for name, method in COMPILED.items() if name.split(",")[0] in methods}
    found = measure(case, methods, arguments.rounds)
    print("\n".join([report(found), *compiling(found, case.n_tokens)]))


if __name__ == "__main__":
    main()
