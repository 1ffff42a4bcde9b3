"""Greedy generation in length-sorted, left-padded batches, shared by all processes."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

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
        model: A causal language model, with or without adapters.
        tokenizer: Its tokenizer.
        prompts: Texts to continue.
        max_new_tokens: Longest continuation.
        batch_size: Prompts per batch.
        processes: Who shares the prompts.
        description: Title of the progress bar.
    """
    ids = tokenizer(prompts)["input_ids"]
    # Some tokenizers end every text themselves; a prompt has not ended.
    ids = [row[:-1] if row[-1:] == [tokenizer.eos_token_id] else row for row in ids]
    order = sorted(range(len(prompts)), key=lambda index: len(ids[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = batches[processes.rank :: processes.world_size]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    was_training = model.training
    model.eval()
    answers: list[tuple[int, str]] = []
    with (
        torch.inference_mode(),
        progress_bar(mine, shown=processes.is_main, desc=description, unit="batch") as bar,
    ):
        for batch in bar:
            generated = _continue(model, tokenizer, [ids[i] for i in batch], settings, processes)
            answers += zip(batch, generated, strict=True)
    model.train(was_training)
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
    pad = [tokenizer.pad_token_id]
    input_ids = torch.tensor([pad * (length - len(row)) + row for row in rows])
    attention = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    output = model.generate(
        input_ids=input_ids.to(processes.device),
        attention_mask=attention.to(processes.device),
        generation_config=settings,
    )
    return tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
