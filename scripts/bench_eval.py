"""Generated tokens a second, side by side in one run, on the same prompts and the same model.

    python scripts/bench_eval.py                                              # fine-tunes the embedded model
    python scripts/bench_eval.py --model results/RUN/merged --data gsm8k/test.jsonl --limit 64

Compared, all greedy, with at most 512 new tokens:

    published    transformers' generate, one prompt at a time, as the published program does; with
                 --every N on each N-th prompt only, which does not change its rate
    plain        transformers' generate in left-padded batches of 32, in the file's order
    ours         eval/engine/generation.py, as all benchmarks here use it

All three have to give the same texts, or the program ends with an error: run it in float32. Each round
runs every method once, from text to text, each round beginning with another; shown are medians of the
rates, and of the ratios to the other methods in the same round, by the clock and by processor time, which
other programs on the machine disturb less. Tokens are those of the answers, what is computed in vain left
out. The model should be fine-tuned to end its answers: without --model, the embedded one is, for
--train-steps steps on its own generated problems.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.engine.decoding import until_end
from eval.engine.generation import Decoding, generate
from eval.subject import Request, Subject
from lora_one import training
from lora_one.config import ExperimentConfig, ModelConfig, WandbConfig
from lora_one.data.encoding import encode_split
from lora_one.data.loading import held_out_examples
from lora_one.data.specs import Example
from lora_one.data.tiny import problems
from lora_one.errors import UserError
from lora_one.models import EMBEDDED_MODEL, load_tokenizer, model_source, read_weights
from lora_one.processes import start_processes
from lora_one.tables import markdown_table
from lora_one.tracking import Tracker

NEW_TOKENS, PLAIN_ROWS = 512, 32


@dataclass(frozen=True)
class Case:
    """Who continues what."""

    subject: Subject
    prompts: Sequence[str]
    every: int = 1

    def n_tokens(self, texts: Sequence[str]) -> int:
        """Of answers, without their ends."""
        return sum(map(len, self.subject.tokenizer(list(texts), add_special_tokens=False)["input_ids"]))


@dataclass
class Measured:
    """Tokens a second, round by round."""

    by_clock: list[float] = field(default_factory=list)
    by_processor: list[float] = field(default_factory=list)


Method = Callable[[Case], list[str]]


# ---- the methods: from prompts to answers


def ours(case: Case) -> list[str]:
    """The engine, with the settings of the subject."""
    return generate(case.subject, case.prompts, Decoding(NEW_TOKENS), Request(description="ours"))


def stock(n_rows: int) -> Method:
    """Batches of transformers' generate."""

    def run(case: Case) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(case.prompts), n_rows):
            texts += _stock_batch(case, case.prompts[start : start + n_rows])
        return texts

    return run


@torch.inference_mode()
def _stock_batch(case: Case, prompts: Sequence[str]) -> list[str]:
    model, tokenizer = case.subject.model, case.subject.tokenizer
    tokenizer.padding_side = "left"
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    out = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=settings
    )
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    kept = [until_end(row, [tokenizer.eos_token_id], NEW_TOKENS)[0] for row in rows]
    return [str(text) for text in tokenizer.batch_decode(kept, skip_special_tokens=True)]


def published(case: Case) -> list[str]:
    """One prompt at a time."""
    return stock(1)(replace(case, prompts=case.prompts[:: case.every]))


METHODS: dict[str, Method] = {"published": published, "plain": stock(PLAIN_ROWS), "ours": ours}


# ---- measuring


def measure(case: Case, methods: dict[str, Method], rounds: int) -> dict[str, Measured]:
    """Every method once a round.

    Raises:
        UserError: If two methods answer differently.
    """
    found = {name: Measured() for name in methods}
    expected: dict[str, str] = {}
    for number in range(rounds):
        shift = number % len(methods)
        for name, method in [*methods.items()][shift:] + [*methods.items()][:shift]:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            texts, clock, processor = _timed(method, case)
            asked = case.prompts[:: case.every] if method is published else case.prompts
            answers = dict(zip(asked, texts, strict=True))
            different = sum(expected.setdefault(prompt, text) != text for prompt, text in answers.items())
            if different:
                raise UserError(f"{name}: {different} of {len(texts)} answers differ; is this float32?")
            n_tokens = case.n_tokens(texts)
            found[name].by_clock.append(n_tokens / clock)
            found[name].by_processor.append(n_tokens / processor)
    return found


def _timed(method: Method, case: Case) -> tuple[list[str], float, float]:
    clock, processor = time.perf_counter(), time.process_time()
    texts = method(case)
    if case.subject.processes.device.type == "cuda":
        torch.cuda.synchronize()
    return texts, time.perf_counter() - clock, time.process_time() - processor


def report(found: dict[str, Measured]) -> str:
    """The table."""
    others = [name for name in ("published", "plain") if name in found]
    heads = [f"/ {name}" for name in others]
    rows = [["method", "tokens/s", *heads, "tokens/processor s", *heads]]
    for name, measured in found.items():
        cells = [name]
        for kind in ("by_clock", "by_processor"):
            rates = getattr(measured, kind)
            cells.append(f"{statistics.median(rates):,.0f}")
            for other in others:
                pairs = zip(rates, getattr(found[other], kind), strict=True)
                cells.append(f"{statistics.median(a / b for a, b in pairs):.2f}")
        rows.append(cells)
    return markdown_table(rows)


# ---- the model and the prompts


def make_case(arguments: argparse.Namespace) -> Case:
    """What the arguments name."""
    config = ModelConfig(name=arguments.model or EMBEDDED_MODEL)
    tokenizer = load_tokenizer(config)
    model = read_weights(config, model_source(config.name), torch.float32)
    processes = start_processes()
    model = model.to(processes.device)
    subject = Subject(model, tokenizer, processes, config.name, arguments.max_tokens, arguments.batch_size)
    if arguments.model is None:
        fine_tune(subject, arguments.train_steps)
    if arguments.data is not None:
        prompts = [example.prompt for example in held_out_examples("gsm8k", arguments.data, arguments.limit)]
    else:
        prompts = [_example(row).prompt for row in problems("test", arguments.limit)]
    return Case(subject, prompts, arguments.every)


def fine_tune(subject: Subject, n_steps: int) -> None:
    """Full fine-tuning on the embedded model's own problems, so that it ends its answers."""
    settings = {"name": subject.name, "learning_rate": 1.8e-3, "max_steps": n_steps, "real_batch_size": 16}
    settings |= {"warmup_steps": 10, "loss_reduction": "token", "save_steps": 10**9}
    config = ExperimentConfig.model_validate(
        {"dataset": {"name": "tiny"}, "model": settings, "peft": {"use_peft": False}}
    )
    rows = [_example(row) for row in problems("train", 16 * n_steps)]
    examples = encode_split(rows, subject.tokenizer, joiner="", max_length=512, name="train").examples
    subject.model.requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        training.train(
            subject.model,
            examples,
            examples[:1],
            config,
            pad_id=int(subject.tokenizer.pad_token_id),
            processes=subject.processes,
            folder=Path(folder),
            tracker=Tracker(WandbConfig(mode="disabled"), "bench", Path(folder), {}),
        )
    subject.model.eval()


def _example(row: dict[str, str]) -> Example:
    prompt = f"Q: {row['question']}\nA: "
    return Example(prompt, row["answer"], row["answer"], prompt)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="folder of a model that ends its answers")
    parser.add_argument("--data", type=Path, help="question and answer, instead of generated problems")
    parser.add_argument("--limit", type=int, default=128, help="the first so many problems")
    parser.add_argument("--every", type=int, default=1, help="published: each so many-th prompt only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train-steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, help="most rows of ours")
    parser.add_argument("--max_tokens", type=int, help="most tokens of a batch of ours")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        case = make_case(arguments)
        is_gpu = case.subject.processes.device.type == "cuda"
        where = torch.cuda.get_device_name() if is_gpu else f"{torch.get_num_threads()} CPU threads"
        million = sum(p.numel() for p in case.subject.model.parameters()) / 1e6
        print(f"{case.subject.name}: {million:,.1f} million weights, {len(case.prompts)} prompts, {where}\n")
        found = measure(case, {name: METHODS[name] for name in arguments.methods}, arguments.rounds)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(report(found))


if __name__ == "__main__":
    main()
