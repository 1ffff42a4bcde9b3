"""Choosing between given words by the logits of their first tokens, in padded batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from eval.engine.context import context_length
from eval.engine.decoding import not_finite
from eval.engine.prefixes import for_rows, read_prefix
from eval.engine.questions import Question, encode, within
from eval.subject import Request, Subject
from lora_one.modes import in_mode
from lora_one.progress import progress_bar

_TOKENS_PER_THREAD = 1_024
_TOKENS_ON_ACCELERATOR = 16_384


@dataclass(frozen=True)
class Scores:
    """What the model makes of each prompt.

    Attributes:
        logits: Of each prompt's candidates, in float32, prompt × choice.
        n_cut: Prompts that lost their beginning to the model's context length.
    """

    logits: Tensor
    n_cut: int

    @property
    def chosen(self) -> list[int]:
        """Index of the choice with the highest logit."""
        return self.logits.argmax(dim=1).tolist()


def choose(subject: Subject, prompts: Sequence[str], choices: Sequence[str], request: Request) -> Scores:
    """For each prompt, the logits of the first tokens of ``choices`` right after it, on every process.

    Args:
        subject: The model and who shares the work.
        prompts: Texts, each followed by one of the choices. One that is longer than the model's context
            loses its beginning.
        choices: What may follow, with the space before it.
        request: Gives the progress bar its title.

    Raises:
        UserError: If two choices start with the same token.
    """
    limit = context_length(subject.model)
    questions = [within(question, limit, subject) for question in encode(subject, prompts, choices)]
    with progress_bar(
        total=len(prompts), shown=subject.processes.is_main, desc=request.description, unit="prompt"
    ) as bar:
        logits = score(subject, questions, bar.update)
    return Scores(logits, sum(question.is_cut for question in questions))


def score(
    subject: Subject,
    questions: Sequence[Question],
    advance: Callable[[int], Any],
    *,
    shares_prefix: bool = False,
) -> Tensor:
    """The candidates' logits of every question, on every process.

    Args:
        subject: The model and who shares the work.
        questions: All with the same number of candidates, none longer than the model's context.
        advance: Told how many more are done.
        shares_prefix: The questions begin with the same tokens, which are then read once where the model's
            cache allows it.

    Returns:
        Question × choice, in float32, on the CPU.

    Raises:
        UserError: If one is not finite: it could not be compared.
    """
    model, processes = subject.model, subject.processes
    # The longest first, so that memory runs out at once or never; dealt out, so that all finish together.
    order = sorted(range(len(questions)), key=lambda index: -len(questions[index].context))
    mine = order[processes.rank :: processes.world_size]
    found: list[tuple[int, list[float]]] = []
    with in_mode(model, training=False), torch.inference_mode():
        prefix = _prefix(subject, [questions[index] for index in mine]) if shares_prefix else None
        for batch in _batches(mine, questions, subject):
            rows = [questions[index] for index in batch]
            logits = _last_logits(subject, rows, prefix)
            candidates = torch.tensor([row.candidates for row in rows], device=logits.device)
            found += zip(batch, logits.gather(1, candidates).float().tolist(), strict=True)
            advance(len(batch))
    by_index = dict(processes.gather(found))
    advance(len(questions) - len(mine))
    logits = torch.tensor([by_index[index] for index in range(len(questions))])
    if not logits.isfinite().all():
        raise not_finite()
    return logits


def _prefix(subject: Subject, questions: Sequence[Question]) -> DynamicCache | None:
    with _head_on(subject.model, torch.zeros(1, dtype=torch.long)):
        return read_prefix(subject.model, questions, subject.processes.device)


def _batches(order: Sequence[int], questions: Sequence[Question], subject: Subject) -> Iterator[list[int]]:
    on_cpu = subject.processes.device.type == "cpu"
    suits = _TOKENS_PER_THREAD * torch.get_num_threads() if on_cpu else _TOKENS_ON_ACCELERATOR
    budget = subject.max_tokens or suits
    start = 0
    while start < len(order):
        size = max(1, budget // len(questions[order[start]].context))
        size = min(size, subject.batch_size or size)
        yield list(order[start : start + size])
        start += size


def _last_logits(subject: Subject, rows: Sequence[Question], prefix: DynamicCache | None) -> Tensor:
    """The logits after the last token of each row."""
    device = subject.processes.device
    n_read = 0 if prefix is None else prefix.get_seq_length()
    texts = [torch.tensor(row.context[n_read:]) for row in rows]
    lengths = torch.tensor([len(text) for text in texts])
    input_ids = torch.nn.utils.rnn.pad_sequence(
        texts, batch_first=True, padding_value=subject.tokenizer.pad_token_id
    ).to(device)
    if subject.model.config.is_encoder_decoder:
        # An encoder looks both ways and has to be told what is padding.
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long().to(device)
        begun = torch.tensor([row.begun for row in rows], device=device)
        output = subject.model(input_ids=input_ids, attention_mask=mask, decoder_input_ids=begun)
        return output.logits[:, -1]
    # Padding on the right is in no token's past: without a mask, positions are what they are alone.
    cache = {"use_cache": False} if prefix is None else {"past_key_values": for_rows(prefix, len(rows))}
    with _head_on(subject.model, lengths - 1):
        logits = subject.model(input_ids=input_ids, **cache).logits
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[torch.arange(len(rows)), lengths - 1]  # a head that is not called as a module


@contextmanager
def _head_on(model: Any, places: Tensor) -> Iterator[None]:
    """Inside, the model computes logits for one place of each row only."""

    def keep(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = arguments
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, places.to(hidden.device)][:, None], *others

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
