"""Fine-tunes a causal language model with LoRA-GA or LoRA-One and the Hugging Face Trainer.

    python scripts/lora_ga_finetuning.py --base_model gpt2 --dataset_name wikitext
    python scripts/lora_ga_finetuning.py --base_model path/to/model --dataset_name path/to/texts.txt

The first takes model and texts from the Hugging Face Hub, the second needs no network. Prints the
perplexity on validation texts of the base model, after the adapter's start, after training, and of the
saved adapter on a fresh base model. One process; run_exp.py resumes, sweeps and takes several devices.
"""

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it complains when it is imported

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

from lora_one.errors import UserError
from lora_one.hub import offline_hint
from lora_one.inits import DIRECTIONS
from lora_one.layers import settle
from lora_one.library import get_peft_model, preprocess_loraga
from lora_one.settings import LoraConfig, LoraGAConfig, LoraOneConfig

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
NO_TOKENIZER = "has no tokenizer; save one in the same folder with tokenizer.save_pretrained"


def local_path(flag: str, name: str) -> Path | None:
    """The file or folder, or None for the id of a Hub repository."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in READERS:
        raise UserError(f"{flag} {name}: no such file or folder; mend the path, or give a Hub id")
    return None


def load_base(args: argparse.Namespace, loader: Any, **settings: Any) -> Any:
    """What ``loader`` makes of the base model's folder or Hub id."""
    folder = local_path("--base_model", args.base_model)
    if folder is not None and not (folder / "config.json").is_file():
        raise UserError(f"--base_model {folder}: has no config.json; give the folder of a saved model")
    try:
        return loader.from_pretrained(folder or args.base_model, **settings)
    except Exception as error:
        is_missing = loader is AutoTokenizer and isinstance(error, ValueError)
        reason = NO_TOKENIZER if is_missing else offline_hint(error)
        raise UserError(f"--base_model {args.base_model}: {reason}") from error


def load_tokenizer(args: argparse.Namespace) -> Any:
    """The tokenizer that was saved with the base model."""
    tokenizer = load_base(args, AutoTokenizer)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what GPT-2's makes of no file
        raise UserError(f"--base_model {args.base_model}: {NO_TOKENIZER}")
    return tokenizer


def load_model(args: argparse.Namespace, quantization: str, device: torch.device) -> Any:
    """The base model in 4 bits, or in float32 whatever it was saved in: LoRA-GA shifts its weights."""
    settings: dict[str, Any] = {"dtype": torch.float32, "device_map": {"": device}}
    if quantization == "4bit":
        settings["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = load_base(args, AutoModelForCausalLM, **settings)
    settle(model)  # bitsandbytes would repack 4-bit weights for inference, on some CPUs
    return model


def load_texts(args: argparse.Namespace) -> Any:
    """The splits of the dataset by name."""
    path = local_path("--dataset_name", args.dataset_name)
    try:
        if path is None:
            return datasets.load_dataset(args.dataset_name, args.dataset_config or None)
        if path.is_file():
            return datasets.load_dataset(READERS[path.suffix], data_files=str(path))
        if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(str(path))
        saved = datasets.load_from_disk(str(path))
        return {"train": saved} if isinstance(saved, Dataset) else saved
    except Exception as error:
        reason = f"cannot be read ({error.__cause__ or error})" if path else offline_hint(error)
        kinds = ", ".join(READERS)
        raise UserError(f"--dataset_name {args.dataset_name}: {reason}; or give {kinds} files") from error


def cut(split: Dataset, tokenizer: Any, length: int, where: str) -> Dataset:
    """The texts one after the other, in blocks of ``length`` tokens that are their own labels."""
    if getattr(split.features.get("text"), "dtype", None) not in {"string", "large_string"}:
        has = ", ".join(split.column_names)
        raise UserError(f"{where}: has no text in a column 'text', only {has}; rename the one to train on")
    tokens = [np.empty(0, dtype=np.int64)]
    for rows in split.iter(batch_size=1000):
        texts = [text if text.endswith("\n") else text + "\n" for text in rows["text"] if text]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        tokens.append(np.fromiter(chain.from_iterable(ids), dtype=np.int64))
    joined = np.concatenate(tokens)
    blocks = joined[: len(joined) // length * length].reshape(-1, length)
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks}).with_format("torch")


def load_blocks(args: argparse.Namespace, tokenizer: Any, length: int) -> tuple[Dataset, Dataset]:
    """Blocks to train on, in random order, and to validate on: without such a split, 5 % of them."""
    where, texts = f"--dataset_name {args.dataset_name}", load_texts(args)
    if "train" not in texts:
        raise UserError(f"{where}: has no split 'train', only {', '.join(texts)}; rename one")
    train = cut(texts["train"], tokenizer, length, where).shuffle(seed=args.seed)
    if "validation" in texts:
        validation = cut(texts["validation"], tokenizer, length, where)
    else:
        n = math.ceil(len(train) / 20)
        train, validation = train.select(range(n, len(train))), train.select(range(n))
    needed = args.grad_estimate_iters * args.grad_estimate_batch_size
    if len(train) < needed or len(validation) == 0:
        raise UserError(
            f"{where}: {len(train)} training and {len(validation)} validation blocks of {length} tokens, too "
            f"few for {needed} and 1; give more text, or lower --grad_estimate_iters or --max_length"
        )
    print(f"data: {len(train)} training and {len(validation)} validation blocks of {length} tokens")
    return train, validation


def adapter_config(args: argparse.Namespace, model: Any) -> LoraConfig:
    """The adapter, which is to start from the gradient."""
    start: dict[str, Any] = {"scale": args.scale, "stable_gamma": args.stable_gamma}
    if args.direction == "LoRA-One":
        start = {"init_lora_weights": "lora_one", "lora_one_config": LoraOneConfig(**start)}
    else:
        config = LoraGAConfig(direction=args.direction, seed=args.seed, **start)
        start = {"init_lora_weights": "lora_ga", "lora_ga_config": config}
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
    return LoraConfig(
        r=args.r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.target_modules or (list(known) if known else "all-linear"),
        task_type="CAUSAL_LM",
        **start,
    )


def gradient_step(model: Any, train: Dataset, args: argparse.Namespace) -> Callable[[], None]:
    """What ``preprocess_loraga`` calls: forward and backward passes on a sample of the shuffled blocks."""
    sample: Any = train.select(range(args.grad_estimate_iters * args.grad_estimate_batch_size))

    def train_step() -> None:
        for batch in tqdm(DataLoader(sample, args.grad_estimate_batch_size), desc="gradient"):
            outputs = model(**{name: ids.to(model.device) for name, ids in batch.items()})
            outputs.loss.backward()
        print(f"gradient: estimated on {len(sample)} training blocks")

    return train_step


@torch.no_grad()
def report(stage: str, model: Any, blocks: Any, batch_size: int) -> None:
    """Prints the perplexity, which is the exponential of the mean loss of a token."""
    model.eval()
    total = 0.0
    for batch in DataLoader(blocks, batch_size):
        ids = batch["input_ids"].to(model.device)
        total += model(input_ids=ids, labels=ids).loss.item() * len(ids)
    value = torch.tensor(total / len(blocks), dtype=torch.float64).exp().item()
    print(f"perplexity {stage + ':':22}{value:.4f}", flush=True)


def fine_tune(args: argparse.Namespace) -> None:
    """From the base model to a saved adapter, which is then loaded as anybody would."""
    arguments = training_arguments(args)
    tokenizer = load_tokenizer(args)
    # The gradient is taken at the full weights; 4-bit ones are loaded when it is known.
    is_known = args.cache_file is not None and args.cache_file.is_file()
    model = load_model(args, args.quantization if is_known else "none", arguments.device)
    length = min(args.max_length, getattr(model.config, "max_position_embeddings", args.max_length))
    train, validation = load_blocks(args, tokenizer, length)
    config = adapter_config(args, model)
    preprocess_loraga(model, config, gradient_step(model, train, args), cache_file=args.cache_file)
    if is_known:
        print(f"gradient: read from {args.cache_file}")
    elif args.quantization != "none":
        del model
        model = load_model(args, args.quantization, arguments.device)
    report("of the base model", model, validation, args.batch_size)
    model = get_peft_model(model, config)
    report("after the start", model, validation, args.batch_size)
    Trainer(model=model, args=arguments, train_dataset=train).train()
    report("after training", model, validation, args.batch_size)
    model.save_pretrained(args.output_dir)
    del model
    model = PeftModel.from_pretrained(load_model(args, args.quantization, arguments.device), args.output_dir)
    report("of the saved adapter", model, validation, args.batch_size)
    print(f"written: {args.output_dir}; peft.PeftModel.from_pretrained puts it on {args.base_model}")


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    """The settings of the Trainer."""
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir}: {error.strerror}; give another folder") from error
    return TrainingArguments(
        args.output_dir,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        num_train_epochs=args.num_epochs,
        max_steps=args.max_steps,
        seed=args.seed,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the command."""

    def error(self, message: str) -> NoReturn:
        """Leaves the printing to ``main``."""
        raise UserError(message)


def parse_args() -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base_model", default="gpt2", help="Hub id or local folder (%(default)s)")
    texts = "Hub id, file of texts, folder of such files, or folder of save_to_disk (%(default)s)"
    add("--dataset_name", default="wikitext", help=texts)
    add("--dataset_config", default="wikitext-2-raw-v1", help="of a Hub dataset, '' for none (%(default)s)")
    add("--output_dir", default="./lora_ga_output", help="gets the adapter (%(default)s)")
    add("--r", type=int, default=8, help="rank; LoRA-GA is saved with twice as much (%(default)s)")
    add("--lora_alpha", type=int, default=16, help="(%(default)s)")
    dropout = "with LoRA-GA, dropout keeps the pretrained function in eval mode only (%(default)s)"
    add("--lora_dropout", type=float, default=0.0, help=dropout)
    add("--direction", choices=DIRECTIONS, default="ArB2r", help="start of the adapter (%(default)s)")
    scales = ["stable", "weight_svd", "gd_scale", "unit"]
    add("--scale", choices=scales, default="stable", help="size of the start (%(default)s)")
    add("--stable_gamma", type=float, help="of --scale stable (16; 128 with --direction LoRA-One)")
    add("--grad_estimate_iters", type=int, default=64, help="batches for the gradient (%(default)s)")
    add("--grad_estimate_batch_size", type=int, default=2, help="blocks in each (%(default)s)")
    add("--num_epochs", type=float, default=3, help="(%(default)s)")
    add("--batch_size", type=int, default=8, help="(%(default)s)")
    add("--learning_rate", type=float, default=3e-5, help="(%(default)s)")
    add("--target_modules", nargs="+", help="names of layers, or all-linear (PEFT's choice for the model)")
    add("--max_length", type=int, default=256, help="tokens in a block (%(default)s, or the model's limit)")
    add("--max_steps", type=int, default=-1, help="of training; -1: as --num_epochs says (%(default)s)")
    add("--cache_file", type=Path, help="the gradient is kept here, and read if it is there")
    add("--seed", type=int, default=42, help="(%(default)s)")
    add("--quantization", choices=["none", "4bit"], default="none", help="of the base (%(default)s)")
    args = parser.parse_args()
    counts = "r lora_alpha grad_estimate_iters grad_estimate_batch_size batch_size max_length"
    for name in [*counts.split(), "num_epochs", "learning_rate"]:
        if not getattr(args, name) > 0:
            raise UserError(f"--{name} {getattr(args, name)}: give a number above 0")
    if not 0 <= args.lora_dropout < 1:
        raise UserError(f"--lora_dropout {args.lora_dropout}: give a number from 0 to below 1")
    if args.cache_file is not None and args.cache_file.is_dir():
        raise UserError(f"--cache_file {args.cache_file}: is a folder; give the name of a file")
    if args.stable_gamma is None:
        args.stable_gamma = 128 if args.direction == "LoRA-One" else 16
    if args.target_modules == ["all-linear"]:
        args.target_modules = "all-linear"
    return args


def main() -> None:
    """The command line."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    # PEFT sets it where GPT-2 needs it, and asks transformers by a name that will go.
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to|.is_gradient_checkpointing. is depre")
    try:
        fine_tune(parse_args())
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
