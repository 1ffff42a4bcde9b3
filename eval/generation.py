"""Greedy generation in length-sorted, padded batches, shared by all processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from eval.subject import Request, Subject
from lora_one.data.encoding import encoder_input, without_end
from lora_one.modes import in_mode
from lora_one.processes import Processes
from lora_one.progress import progress_bar


@dataclass(frozen=True)
class Decoding:
    """How a continuation is chosen.

    Attributes:
        max_new_tokens: Longest continuation.
        temperature: 0 is greedy; otherwise tokens are sampled from ``softmax(logits / temperature)``.
        top_p: Sample from the most probable tokens that together have this probability.
        top_k: Sample from so many most probable tokens; 0: from all.
        num_beams: Beams of a beam search; with a temperature, of a sampling one.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1

    def __str__(self) -> str:
        beams = f", {self.num_beams} beams" if self.num_beams > 1 else ""
        if self.temperature == 0:
            return "greedy" + beams
        limits = f", top_p {self.top_p:g}" * (self.top_p < 1) + f", top_k {self.top_k}" * (self.top_k > 0)
        return f"sampled, temperature {self.temperature:g}{limits}{beams}"


def generate(subject: Subject, prompts: Sequence[str], decoding: Decoding, request: Request) -> list[str]:
    """Continuations of ``prompts``, in their order, on every process.

    Args:
        subject: The model and who shares the work.
        prompts: Texts to continue.
        decoding: How.
        request: Its seed, and its folder, where answers are kept as they are made.
    """
    model, tokenizer, processes = subject.model, subject.tokenizer, subject.processes
    # A prompt that is to be continued has not ended; one for an encoder has.
    as_read = encoder_input if model.config.is_encoder_decoder else without_end
    ids = [as_read(row, tokenizer) for row in tokenizer(list(prompts))["input_ids"]]
    order = sorted(range(len(prompts)), key=lambda index: len(ids[index]))
    size = subject.batch_size or 32
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    mine = batches[processes.rank :: processes.world_size]
    settings = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
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
        progress_bar(mine, shown=processes.is_main, desc=request.description, unit="batch") as bar,
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
