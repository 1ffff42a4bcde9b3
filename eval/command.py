"""What the programs of this folder share: their flags, loading the model under test, and the report."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig

from eval.engine.vllm_backend import VllmModel
from eval.results import EvalResult, Figure
from eval.subject import Request, Subject
from lora_one.adapters import check_adapter
from lora_one.complaints import complain, explain
from lora_one.config import ModelConfig, WandbConfig
from lora_one.digests import weights_fingerprint
from lora_one.errors import UserError
from lora_one.files import write_text
from lora_one.hub import offline_hint
from lora_one.models import load_tokenizer, model_source, read_weights
from lora_one.out_of_memory import is_out_of_memory
from lora_one.processes import Processes, end_processes, start_processes
from lora_one.quiet import quieten_libraries
from lora_one.records import read_record
from lora_one.tables import markdown_table
from lora_one.tracking import Tracker


def make_parser(
    docstring: str | None, model_flags: Sequence[str] = ("--model_name",)
) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark takes.

    Args:
        docstring: The program's.
        model_flags: How the published program called the model; a name without dashes is a position.
    """
    parser = argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    required: dict[str, Any] = (
        {"required": True, "dest": "model_name"} if model_flags[0].startswith("-") else {}
    )
    parser.add_argument(*model_flags, **required, help="folder of a model, merged or not, or a Hub id")
    parser.add_argument("--adapter", help="folder or Hub id of an adapter for it")
    parser.add_argument("--limit", type=positive, help="the first so many items only")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    parser.add_argument("--data", type=Path, help="local file or folder instead of the Hub")
    parser.add_argument("--batch_size", type=positive, help="most rows of a batch")
    parser.add_argument(
        "--max_tokens", type=positive, help="tokens of a batch; default: what suits the device"
    )
    parser.add_argument(
        "--backend", choices=("transformers", "vllm"), default="transformers", help="what generates"
    )
    parser.add_argument("--bf16", action="store_true", help="weights and arithmetic in bfloat16")
    parser.add_argument("--output_dir", type=Path, default=Path("results/eval"), help="(results/eval)")
    parser.add_argument("--wandb_name", help="also log the figures to Weights & Biases under this name")
    return parser


def positive(text: str) -> int:
    """A positive whole number, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def run_program(main: Callable[[list[str]], None], arguments: list[str] | None = None) -> None:
    """Runs a program of this folder: bad input is one line and exit code 2, Ctrl-C 130."""
    quieten_libraries()
    code = 0
    try:
        main(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        complain(str(error))
        code = 2
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on from the answers it has")
        code = 130
    except Exception as error:
        remedy = "out of memory; lower --max_tokens or --batch_size; the same command goes on"
        complain(remedy if is_out_of_memory(error) else explain(error, Path.cwd()))
        code = 1
    sys.stdout.flush()
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)  # the others may wait for this one
    end_processes()
    sys.exit(code)


def evaluate_program(
    benchmark: Callable[[Subject, Request], EvalResult], name: str, options: argparse.Namespace
) -> EvalResult:
    """Loads the model, runs the benchmark and reports it.

    Files go to ``--output_dir``/<model>/<name>: ``result.json``, ``samples.jsonl``, and while it
    runs the answers that are there already.
    """
    processes = start_processes()
    subject = load_subject(options, processes)
    folder = output_folder(options, name)
    if processes.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {folder}: cannot write there ({error.strerror})") from None
    processes.wait()
    request = Request(options.data, options.limit, options.seed, folder, name)
    result = benchmark(subject, request)
    if processes.is_main:
        report(result, folder, options)
    return result


def output_folder(options: argparse.Namespace, name: str) -> Path:
    """``--output_dir``/<model>[+<adapter>]/<name>, or, where the program takes one, under its ``--name``."""
    if getattr(options, "name", None):
        return options.output_dir / options.name / name
    parts = [_called(source) for source in (options.model_name, options.adapter) if source]
    return options.output_dir / "+".join(parts) / name


def _called(source: str) -> str:
    path = Path(source)
    if not path.exists():
        return source.replace("/", "--")
    path = path.resolve()
    is_of_run = path.name in ("merged", "adapter") and (path.parent / "record.json").is_file()
    return f"{path.parent.name}-{path.name}" if is_of_run else path.name  # every run has one of that name


def load_subject(options: argparse.Namespace, processes: Processes) -> Subject:
    """The model under test, with its adapter.

    Raises:
        UserError: If one cannot be read, or the adapter was made for another model.
    """
    folder = Path(options.model_name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: is an adapter; give its base model, and this as --adapter")
    source = model_source(options.model_name)
    try:
        is_pair = AutoConfig.from_pretrained(source).is_encoder_decoder
    except Exception as error:
        raise UserError(f"{options.model_name}: {offline_hint(error)}") from error
    config = ModelConfig(
        name=options.model_name, type="ConditionalGeneration" if is_pair else "CausalLM", bf16=options.bf16
    )
    if options.adapter is not None:
        check_adapter(options.adapter, "--adapter", trained_on=False)
        _check_same_base(options.adapter, source)
    tokenizer = load_tokenizer(config)
    if options.backend == "vllm":
        model = _vllm_model(source, config, options, processes)
        return Subject(model, tokenizer, processes, options.model_name)
    model = read_weights(config, source, torch.bfloat16 if options.bf16 else torch.float32)
    if options.adapter is not None:
        model = _with_adapter(model, options.adapter)
    return Subject(
        model.to(processes.device).eval(),
        tokenizer,
        processes,
        options.model_name,
        options.max_tokens,
        options.batch_size,
    )


def _vllm_model(
    source: str, config: ModelConfig, options: argparse.Namespace, processes: Processes
) -> VllmModel:
    if config.is_pair:
        raise UserError(f"--backend vllm: {options.model_name} is an encoder with a decoder; leave it out")
    if processes.world_size > 1:
        raise UserError("--backend vllm: is one process; start without accelerate launch")
    return VllmModel(source, options.adapter, bf16=options.bf16, seed=options.seed)


def _check_same_base(adapter: str, source: str) -> None:
    """An adapter of a run of ours knows the digest of the weights that it was made for."""
    record = read_record(Path(adapter).resolve().parent)
    if record is None or not Path(source).is_dir():
        return
    made_for = record.get("model", {}).get("fingerprint")
    if made_for not in (None, weights_fingerprint(Path(source), None)):
        raise UserError(f"{adapter}: was made for another base model than {source}; give that one")


def _with_adapter(model: Any, adapter: str) -> Any:
    try:
        return PeftModel.from_pretrained(model, adapter)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{adapter}: does not fit the model, it was made for another one ({reason})"
        ) from error


def report(result: EvalResult, folder: Path, options: argparse.Namespace) -> None:
    """Prints the figures as a table, and writes them and every answer to ``folder``."""
    print_figures(result)
    print(f"{result.task}, {result.decoding}, {result.seconds:.1f} s; in {folder}")
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    _put_aside(folder, asked)
    write_text(folder / "samples.jsonl", result.samples_jsonl())
    write_text(folder / "result.json", json.dumps(result.summary() | {"asked": asked}, indent=2) + "\n")
    if options.wandb_name is not None:
        settings = WandbConfig(name=options.wandb_name)
        figures = {result.metric: result.figure} | dict(result.others)
        with Tracker(settings, f"{result.task}-{folder.parent.name}", folder, asked) as tracker:
            tracker.summarise({f"{result.task}/{name}": figure.value for name, figure in figures.items()})


def print_figures(result: EvalResult) -> None:
    """The figures as a table, and below it the counts."""
    rows = [["figure", "value", "n"], _row(result.metric, result.figure)]
    rows += [_row(name, figure) for name, figure in result.others.items()]
    print(markdown_table(rows))
    for what, n in result.counts.items():
        if n > 0:
            print(f"{n:,} {what}")


def _put_aside(folder: Path, asked: dict[str, Any]) -> None:
    """Keeps the result of an evaluation that was asked for otherwise."""
    stored = folder / "result.json"
    if not stored.is_file():
        return
    try:
        is_same = json.loads(stored.read_text(encoding="utf-8"))["asked"] == asked
    except (ValueError, KeyError, TypeError):
        is_same = False  # damaged: kept all the same
    if is_same:
        return
    earlier = next(place for n in count(1) if not (place := folder / f"earlier-{n}").exists())
    earlier.mkdir()
    for name in ("result.json", "samples.jsonl"):
        if (folder / name).is_file():
            (folder / name).rename(earlier / name)
    print(f"an earlier result, asked for otherwise or damaged, is in {earlier}")


def _row(name: str, figure: Figure) -> list[str]:
    return [name, figure.shown(), f"{figure.n:,}"]
