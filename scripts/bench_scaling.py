"""What two processes of one launch do, beside two that know nothing of each other, in one run.

    python scripts/bench_scaling.py                                          # embedded model and problems
    python scripts/bench_scaling.py --model FOLDER --data gsm8k/train.jsonl  # question, answer a line

Measured in tokens a second, each process on a core of its own with one thread (on GPUs: on one of its own):

    one          a process alone, on half of the examples
    unconnected  two such processes at the same time, each on its half: the sum of their rates
    launch       two processes of one launch (gloo, or nccl on GPUs) on all examples

of the gradient estimate, whole; of training with LoRA on all linear layers, from the first optimiser step's
end to the last one's, with 32 examples a step, of which a process of the launch has its share; of the same
with 32 a process, so that each does as much between two exchanges as one alone in a step; and of generation,
whole. Starting processes, loading the model and a first round of everything are left out. Each round takes
every way once, each round beginning with another; shown are medians of the rates, and of the ratios in the
same round. "launch / unconnected" is what communication, waiting for each other and work that all processes
do cost; 1 would be no cost. "working" is the processor time of the launch's processes by the clock's: what is
missing from 1 they waited, for each other mostly. Tokens are those of the examples, and of the answers;
padding is left out.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.engine.generation import Decoding, generate
from eval.subject import Request, Subject
from lora_one import training
from lora_one.config import ExperimentConfig, ModelConfig, WandbConfig
from lora_one.data.encoding import Encoded, encode_split
from lora_one.data.specs import Example
from lora_one.data.tiny import problems
from lora_one.errors import UserError
from lora_one.gradients import estimate_gradient
from lora_one.models import EMBEDDED_MODEL, linear_layers, load_tokenizer, model_source, read_weights
from lora_one.processes import Processes, end_processes, start_processes
from lora_one.tables import markdown_table
from lora_one.tracking import Tracker

REAL_BATCH, RANK = 32, 8
WAYS = ("one", "unconnected", "launch")


@dataclass(frozen=True)
class Case:
    """What a process works on: its launch's examples, which its processes share."""

    model: Any
    tokenizer: Any
    examples: Sequence[Encoded]
    prompts: Sequence[str]
    processes: Processes
    new_tokens: int


@dataclass(frozen=True)
class Took:
    """Tokens that the processes of a launch worked through together, and what one of them took for it.

    Attributes:
        n_tokens: Of all.
        seconds: By the clock.
        busy_seconds: Of this process's processor time.
    """

    n_tokens: int
    seconds: float
    busy_seconds: float


class Stopwatch(TrainerCallback):
    """The times of the steps' ends, and of others that are asked for."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def look(self) -> None:
        """Takes the time."""
        self.times.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes the time."""
        self.look()

    def took(self, n_tokens: int) -> Took:
        """From the first time to the last."""
        (begin, begin_busy), *_, (end, end_busy) = self.times
        return Took(n_tokens, end - begin, end_busy - begin_busy)


# ---- the work: each on a whole launch's examples


def estimate(case: Case) -> Took:
    """The gradient estimate that an initialisation asks for."""
    targets = list(linear_layers(case.model))
    case.model.requires_grad_(False)
    init = {"bsz": 8, "iters": len(case.examples) // 8}
    case.processes.wait()
    watch = Stopwatch()
    watch.look()
    found = estimate_gradient(
        case.model,
        targets,
        case.examples,
        _config(init=init),
        ranks=dict.fromkeys(targets, RANK),
        pad_id=case.tokenizer.pad_token_id,
        processes=case.processes,
    )
    watch.look()
    return watch.took(found.n_tokens)


def train(*, grows: bool) -> Callable[[Case], Took]:
    """Training; where the batch grows, with 32 examples a step for each process of a launch."""

    def run(case: Case) -> Took:
        size = REAL_BATCH * (case.processes.world_size if grows else 1)
        config, watch = _config(model={"real_batch_size": size}), Stopwatch()
        torch.manual_seed(0)
        layers = list(linear_layers(case.model))
        adapted = get_peft_model(deepcopy(case.model), LoraConfig(r=RANK, target_modules=layers))
        folder = Path(case.processes.from_main(tempfile.mkdtemp()))
        training.train(
            adapted,
            case.examples,
            case.examples[:1],
            config,
            pad_id=case.tokenizer.pad_token_id,
            processes=case.processes,
            folder=folder,
            tracker=Tracker(WandbConfig(mode="disabled"), "bench", folder, {}),
            probes=watch,
        )
        case.processes.wait()
        if case.processes.is_main:
            shutil.rmtree(folder)
        return watch.took(_tokens_after_first_step(case, config))

    return run


def answer(case: Case) -> Took:
    """Greedy answers, as every benchmark makes them."""
    subject = Subject(case.model, case.tokenizer, case.processes)
    case.processes.wait()
    watch = Stopwatch()
    watch.look()
    texts = generate(subject, case.prompts, Decoding(case.new_tokens), Request(description="answers"))
    watch.look()
    rows = case.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return watch.took(sum(map(len, rows)))


WORK: dict[str, Callable[[Case], Took]] = {
    "gradient estimate": estimate,
    f"training, {REAL_BATCH} examples a step": train(grows=False),
    f"training, {REAL_BATCH} a step and process": train(grows=True),
    "generation": answer,
}


def _config(**sections: dict[str, Any]) -> ExperimentConfig:
    model = {"name": "bench", "learning_rate": 1e-4, "warmup_steps": 0, "epochs": 1, "eval_epochs": 1}
    model |= {"loss_reduction": "token", "save_steps": 10**9, **sections.pop("model", {})}
    return ExperimentConfig.model_validate({"dataset": {"name": "tiny"}, "model": model, **sections})


def _tokens_after_first_step(case: Case, config: ExperimentConfig) -> int:
    """The order of the examples is that of the training."""
    sampler = training.WindowSampler(
        case.examples,
        real_batch_size=config.model.real_batch_size,
        limits=training.Limits(max_examples=1),
        reduction=config.model.loss_reduction,
        seed=config.seed,
    )
    return training.Steps(sampler).tokens(1, len(sampler))


# ---- processes


class Worker:
    """A process that holds a model and works when asked."""

    def __init__(self, arguments: argparse.Namespace, place: dict[str, str], number: int) -> None:
        """Starts it.

        Args:
            arguments: Those of the command line.
            place: The environment of a launch; empty where it is alone.
            number: Which core or GPU, and without a launch which part of the examples, is its own.
        """
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, arguments, place, number), daemon=True).start()
        theirs.close()

    def ask(self, name: str | None) -> None:
        """Begins some work; None ends the process."""
        self.connection.send(name)


def collect(workers: Sequence[Worker]) -> list[Any]:
    """What came of the work of all, who may wait for each other: the first error ends it.

    Raises:
        UserError: Of a process; or if one has died.
    """
    found: dict[Any, Any] = {}
    while len(found) < len(workers):
        for ready in wait([w.connection for w in workers if w.connection not in found]):
            assert isinstance(ready, Connection)
            try:
                found[ready] = ready.recv()
            except (EOFError, ConnectionResetError):
                raise UserError("a process of the benchmark has died; is there memory for all?") from None
            if isinstance(found[ready], UserError):
                raise found[ready]
    return [found[worker.connection] for worker in workers]


def _serve(connection: Connection, arguments: argparse.Namespace, place: dict[str, str], number: int) -> None:
    """The life of a process: loads, says what it holds, and works until the connection ends."""
    os.environ.update(place)
    _take_own_place(number, is_alone=not place)
    quieten()
    try:
        # Progress and news of many trainings at once are for nobody.
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            case = make_case(arguments, None if place else number)
            connection.send((describe(case), case.processes.world_size))
            while (name := connection.recv()) is not None:
                connection.send(WORK[name](case))
            end_processes()
    except UserError as error:
        connection.send(error)
    except EOFError:
        return
    except Exception as error:
        connection.send(UserError(f"{type(error).__name__}: {error}".splitlines()[0]))


def _take_own_place(number: int, is_alone: bool) -> None:
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        if is_alone:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
    elif hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[number]})


def start_workers(arguments: argparse.Namespace) -> tuple[list[Worker], list[Worker], str]:
    """The unconnected processes, those of one launch, and what they hold.

    Raises:
        UserError: If model or data cannot be read.
    """
    n = arguments.processes
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    unconnected = [Worker(arguments, {}, number) for number in range(n)]
    told = collect(unconnected)  # bad input ends it before a launch waits
    launch = []
    for number in range(n):
        ranks = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
        place = {name: str(value) for name, value in ranks.items()}
        place |= {"MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}
        launch.append(Worker(arguments, place, number))
    sizes = [size for _, size in collect(launch)]
    assert sizes == [n] * n, sizes
    return unconnected, launch, str(told[0][0])


# ---- measuring


def measure(
    unconnected: Sequence[Worker], launch: Sequence[Worker], names: Sequence[str], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Tokens a second of every work, way and round, and how much of its time the launch works.

    A round before them is not counted.
    """
    members = {"one": unconnected[:1], "unconnected": unconnected, "launch": launch}
    found: dict[str, dict[str, list[float]]] = {
        name: {way: [] for way in (*WAYS, "working")} for name in names
    }
    for number in range(rounds + 1):
        shift = number % len(WAYS)
        for name in names:
            print(f"round {number} of {rounds}: {name}", file=sys.stderr, flush=True)
            for way in WAYS[shift:] + WAYS[:shift]:
                for worker in members[way]:
                    worker.ask(name)
                took = collect(members[way])
                if number:
                    found[name][way].append(rate(took, shared=way == "launch"))
                if number and way == "launch":
                    found[name]["working"].append(working(took))
    return found


def rate(took: Sequence[Took], shared: bool) -> float:
    """Tokens a second of several processes.

    Args:
        took: What each says.
        shared: Whether all speak of the same tokens: then the last to be ready counts.
    """
    if shared:
        return took[0].n_tokens / max(each.seconds for each in took)
    return sum(each.n_tokens / each.seconds for each in took)


def working(took: Sequence[Took]) -> float:
    """How much of the time of a launch its processes work: 1, if none waits."""
    return statistics.mean(each.busy_seconds for each in took) / max(each.seconds for each in took)


def report(found: dict[str, dict[str, list[float]]]) -> str:
    """The table."""
    rows = [["tokens/s", *WAYS, "launch / unconnected", "unconnected / one", "launch / one", "working"]]
    for name, rates in found.items():
        medians = [f"{statistics.median(rates[way]):,.0f}" for way in WAYS]
        pairs = (("launch", "unconnected"), ("unconnected", "one"), ("launch", "one"))
        ratios = [
            statistics.median(a / b for a, b in zip(rates[upper], rates[lower], strict=True))
            for upper, lower in pairs
        ]
        ratios.append(statistics.median(rates["working"]))
        rows.append([name, *medians, *(f"{ratio:.2f}" for ratio in ratios)])
    return markdown_table(rows)


def make_case(arguments: argparse.Namespace, part: int | None) -> Case:
    """Model and examples; those of one of the unconnected processes, or all.

    Raises:
        UserError: If they cannot be read.
    """
    config, n = ModelConfig(name=arguments.model), arguments.processes
    tokenizer = load_tokenizer(config)
    rows = read_rows(arguments)[slice(part, None, n if part is not None else None)]
    processes = start_processes()
    model = read_weights(config, model_source(config.name), torch.float32).to(processes.device)
    model.config.use_cache = False
    examples = encode_split(
        [Example(row["question"], row["answer"], "", "") for row in rows],
        tokenizer,
        joiner="\n",
        max_length=arguments.max_length,
        name="bench",
    ).examples
    share = arguments.prompts * (1 if part is not None else n)
    prompts = [f"Q: {row['question']}\nA: " for row in rows[:share]]
    return Case(model, tokenizer, examples, prompts, processes, arguments.new_tokens)


def read_rows(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """The problems of all processes.

    Raises:
        UserError: If there are too few.
    """
    n = max(REAL_BATCH * arguments.steps, arguments.prompts) * arguments.processes
    if not arguments.data:
        return problems("train", n)
    try:
        lines = Path(arguments.data).read_text(encoding="utf-8").splitlines()[:n]
    except OSError as error:
        raise UserError(f"--data {arguments.data}: {error.strerror}") from None
    if len(lines) < n:
        raise UserError(f"--data {arguments.data}: {len(lines)} rows, {n} are needed; use fewer --steps")
    return [json.loads(line) for line in lines]


def describe(case: Case) -> str:
    """One line on what is measured."""
    million = sum(parameter.numel() for parameter in case.model.parameters()) / 1e6
    mean = statistics.mean(len(example.ids) for example in case.examples)
    where = torch.cuda.get_device_name() if case.processes.device.type == "cuda" else "one core"
    return (
        f"{million:,.1f} million weights, float32; a process: {len(case.examples)} examples of {mean:.0f} "
        f"tokens on average, {len(case.prompts)} answers of at most {case.new_tokens} tokens, {where}"
    )


def quieten() -> None:
    """What libraries say is no figure."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="a folder or a Hub name")
    parser.add_argument("--data", help="JSON lines with question and answer, instead of generated problems")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of 32 examples a process")
    parser.add_argument("--prompts", type=int, default=96, help="a process")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    places = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    if not 2 <= arguments.processes <= places:
        sys.exit(
            f"error: --processes {arguments.processes}: at least 2, and a place for each; here are {places}"
        )
    if arguments.steps < 4:
        sys.exit(f"error: --steps {arguments.steps}: a rate needs some steps; use 4 or more")
    os.environ["OMP_NUM_THREADS"] = "1"
    quieten()
    try:
        unconnected, launch, text = start_workers(arguments)
        print(f"{arguments.model}: {text}\n", flush=True)
        print(report(measure(unconnected, launch, list(WORK), arguments.rounds)))
    except UserError as error:
        sys.exit(f"error: {error}")
    for worker in (*unconnected, *launch):
        worker.ask(None)


if __name__ == "__main__":
    main()
