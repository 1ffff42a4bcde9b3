"""What is evaluated, and how a benchmark may be asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_one.processes import Processes


@dataclass(frozen=True)
class Subject:
    """A model under test, on this process's device.

    Attributes:
        model: A causal language model, or an encoder with a decoder; with or without adapters.
        tokenizer: Its fast tokenizer, with a padding token.
        processes: Who shares the work.
        name: What results are called by.
        max_tokens: Token budget of a batch, padding and what is to be generated included; None: what
            suits the device.
        batch_size: Most rows of a batch, None for no other limit than the tokens.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    processes: Processes
    name: str = "model"
    max_tokens: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class Request:
    """How one benchmark is asked for.

    Attributes:
        data: Local file or folder in the benchmark's own format; None: the Hub.
        limit: The first so many items only.
        seed: Of everything random: sampling, few-shot order.
        folder: Where answers are kept as they are made, so that a killed evaluation goes on; None: nowhere.
        description: Title of the progress bar.
        labels: The words to choose from, where the dataset says; none: those of its test split.
        joiner: Put between a prompt and a label, as in training.
    """

    data: Path | None = None
    limit: int | None = None
    seed: int = 0
    folder: Path | None = None
    description: str = "evaluate"
    labels: tuple[str, ...] = ()
    joiner: str = " "
