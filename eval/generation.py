"""Greedy generation in length-sorted, padded batches, shared by all processes."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lora_one.data.encoding import encoder_input, without_end
from lora_one.modes import in_mode
from lora_one.processes import Processes
from lora_one.progress import progress_bar


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    processes: Processes,
    description: str = "generate",
) -> list[str]:
    """Greedy continuations of ``prompts``, in their order, on every process.

    Args:
        model: A causal language model, or an encoder with a decoder; with or without adapters.
        tokenizer: Its tokenizer.
        prompts: Texts to continue.
        max_new_tokens: Longest continuation.
        batch_size: Prompts per batch.
        processes: Who shares the prompts.
        description: Title of the progress bar.
    """
    # A prompt that is to be continued has not ended; one for an encoder has.
    as_read = encoder_input if model.config.is_encoder_decoder else without_end
    ids = [as_read(row, tokenizer) for row in tokenizer(prompts)["input_ids"]]
    order = sorted(range(len(prompts)), key=lambda index: len(ids[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = batches[processes.rank :: processes.world_size]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )
    answers: list[tuple[int, str]] = []
    with (
        in_mode(model, training=False),
        torch.inference_mode(),
        progress_bar(mine, shown=processes.is_main, desc=description, unit="batch") as bar,
    ):
        for batch in bar:
            generated = _continue(model, tokenizer, [ids[i] for i in batch], settings, processes)
            answers += zip(batch, generated, strict=True)
    texts = dict(processes.gather(answers))
    return [texts[index] for index in range(len(prompts))]


def _continue(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    settings: GenerationConfig,
    processes: Processes,
) -> list[str]:
    length = max(len(row) for row in rows)
    is_pair = model.config.is_encoder_decoder
    # A decoder's new tokens follow the prompt's last; an encoder counts places from the first.
    input_ids = _padded(rows, tokenizer.pad_token_id, length, left=not is_pair)
    attention = _padded([[1] * len(row) for row in rows], 0, length, left=not is_pair)
    output = model.generate(
        input_ids=input_ids.to(processes.device),
        attention_mask=attention.to(processes.device),
        generation_config=settings,
    )
    return tokenizer.batch_decode(output if is_pair else output[:, length:], skip_special_tokens=True)


def _padded(rows: list[list[int]], value: int, length: int, *, left: bool) -> torch.Tensor:
    filled = [[value] * (length - len(row)) for row in rows]
    return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, filled, strict=True)])
