"""One engine behind every benchmark that reads what a model writes."""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from eval.engine.answers import AnswerStore, digest_of, weights_digest
from eval.engine.batch_limits import batch_limits
from eval.engine.context import context_length, without_beginning
from eval.engine.continuous import ContinuousBatch
from eval.engine.decoding import Decoding, before_stop, end_tokens, until_end
from eval.engine.row_batch import Decoder, Prompt
from eval.engine.row_cache import n_cache_layers
from eval.engine.vllm_backend import VllmModel
from eval.engine.whole_batches import WholeBatches
from eval.subject import Request, Subject
from lora_one.data.encoding import prompt_ids, stop_ids
from lora_one.modes import in_mode
from lora_one.progress import progress_bar

__all__ = ["Decoding", "Generated", "generate", "generate_counted"]

CUT, UNFINISHED, GREEDY_BEAMS = "prompts cut", "answers without an end", "answered by greedy beams"


@dataclass(frozen=True)
class Generated:
    """Continuations and what is to be known about them.

    Attributes:
        texts: In the order of the prompts.
        counts: How many prompts were cut to fit the model's context, how many answers came to no end
            within the tokens allowed, and how many were made by greedy beams where sampled ones failed.
    """

    texts: list[str]
    counts: dict[str, int]


@dataclass(frozen=True)
class _Answer:
    """One continuation; ``notes`` are keys of ``Generated.counts``."""

    text: str
    n_tokens: int
    notes: tuple[str, ...]

    @classmethod
    def stored(cls, value: dict[str, Any]) -> "_Answer":
        return cls(value["text"], value["n_tokens"], tuple(value["notes"]))


def generate(subject: Subject, prompts: Sequence[str], decoding: Decoding, request: Request) -> list[str]:
    """Continuations of ``prompts``, in their order, on every process.

    Args:
        subject: The model and who shares the work.
        prompts: Texts to continue.
        decoding: How.
        request: Its seed, and its folder, where answers are kept as they are made.
    """
    return generate_counted(subject, prompts, decoding, request).texts


def generate_counted(
    subject: Subject, prompts: Sequence[str], decoding: Decoding, request: Request
) -> Generated:
    """As ``generate``, with the counts that a result may want to show."""
    if not prompts:
        return Generated([], {})
    encoded = encode_prompts(subject, prompts, decoding)
    if not isinstance(subject.model, VllmModel):
        decoding = _within_context(subject.model, decoding)
    processes = subject.processes
    ends = _ends(subject, prompts)
    settings = _settings(subject, encoded, decoding, request, ends)
    with AnswerStore(request.folder, settings, processes) as store:
        known = {index: _Answer.stored(value) for index, value in store.known.items()}
        if known:
            processes.say(
                f"note: {request.description}: {len(known):,} of {len(prompts):,} answers were there"
            )
        made: list[tuple[int, _Answer]] = []
        with _ready(subject.model):
            for index, answer in _shown(subject, encoded, known, decoding, request, ends):
                store.add(index, dataclasses.asdict(answer))
                made.append((index, answer))
        answers = known | dict(processes.gather(made))
    counts = Counter(note for answer in answers.values() for note in answer.notes)
    for note in (CUT, GREEDY_BEAMS):
        if counts[note]:
            processes.say(f"note: {request.description}: {counts[note]:,} of {len(prompts):,} {note}")
    return Generated([answers[index].text for index in range(len(prompts))], dict(counts))


def encode_prompts(subject: Subject, prompts: Sequence[str], decoding: Decoding) -> list[Prompt]:
    """The prompts as the model reads them, cut on the left where they leave too little of its context.

    What is cut keeps as many tokens as leave room for ``max_new_tokens``, but half the context in any case,
    and the token that begins every text.
    """
    tokenizer, config = subject.tokenizer, subject.model.config
    first = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    context = context_length(subject.model)
    own = 0 if config.is_encoder_decoder else decoding.max_new_tokens
    limit = None if context is None else max(context - own, context // 2)
    encoded = []
    for index, row in enumerate(prompt_ids(prompts, tokenizer, for_encoder=config.is_encoder_decoder)):
        whole = row or [next(token for token in first if token is not None)]
        ids = without_beginning(whole, limit, tokenizer.bos_token_id)
        encoded.append(Prompt(index, ids, is_cut=len(ids) < len(whole)))
    return encoded


def _within_context(model: Any, decoding: Decoding) -> Decoding:
    """Learned positions end with the context: at most half of it is generated there."""
    context = context_length(model)
    if context is None or not _has_learned_positions(model, context):
        return decoding
    room = context - 1 if model.config.is_encoder_decoder else context - context // 2
    return dataclasses.replace(decoding, max_new_tokens=min(decoding.max_new_tokens, room))


def _has_learned_positions(model: Any, context: int) -> bool:
    """Whether a table has a row for every place; some have a few more."""
    tokens = model.get_input_embeddings()
    return any(
        isinstance(module, nn.Embedding)
        and module is not tokens
        and context <= module.num_embeddings <= context + 8
        for module in model.modules()
    ) or any(hasattr(module, "embed_positions") for module in model.modules())


def _settings(
    subject: Subject, prompts: Sequence[Prompt], decoding: Decoding, request: Request, ends: Sequence[int]
) -> dict[str, Any]:
    """All that the answers depend on."""
    if request.folder is None:
        return {}
    model = subject.model
    settings = {
        "model": subject.name,
        "weights": model.fingerprint if isinstance(model, VllmModel) else weights_digest(model),
        "prompts": digest_of([prompt.ids for prompt in prompts]),
        "decoding": dataclasses.asdict(decoding),
        "seed": request.seed,
        "ends": list(ends),
    }
    if decoding.is_sampled and decoding.num_beams > 1:
        settings |= {"max_tokens": subject.max_tokens, "batch_size": subject.batch_size}
    return settings


def _ends(subject: Subject, prompts: Sequence[str]) -> list[int]:
    """The tokens that end an answer: also those of the model's own generation config."""
    own = [] if isinstance(subject.model, VllmModel) else end_tokens(subject.model, subject.tokenizer)
    return sorted({*stop_ids(prompts, subject.tokenizer), *own})


def _shown(
    subject: Subject,
    prompts: Sequence[Prompt],
    known: dict[int, _Answer],
    decoding: Decoding,
    request: Request,
    ends: Sequence[int],
) -> Iterator[tuple[int, _Answer]]:
    """This process's answers that are not known, with a progress bar of the main one's."""
    tokenizer, processes = subject.tokenizer, subject.processes
    n_mine, chosen = _chosen_tokens(subject, prompts, known, decoding, request.seed, ends)
    n_tokens, begin = 0, time.perf_counter()
    with progress_bar(shown=processes.is_main, total=n_mine, desc=request.description, unit="prompt") as bar:
        for prompt, ids, is_greedy in chosen:
            kept, has_ended = until_end(ids, ends, decoding.max_new_tokens)
            text = str(tokenizer.decode(kept, skip_special_tokens=True))
            text, is_stopped = before_stop(text, decoding.stop)
            notes = [CUT] * prompt.is_cut + [GREEDY_BEAMS] * is_greedy
            notes += [UNFINISHED] * (not (has_ended or is_stopped))
            n_tokens += len(kept)
            bar.set_postfix({"tokens/s": f"{n_tokens / (time.perf_counter() - begin):,.0f}"}, refresh=False)
            bar.update()
            yield prompt.index, _Answer(text, len(kept), tuple(notes))


def _chosen_tokens(
    subject: Subject,
    prompts: Sequence[Prompt],
    known: dict[int, _Answer],
    decoding: Decoding,
    seed: int,
    ends: Sequence[int],
) -> tuple[int, Iterator[tuple[Prompt, list[int], bool]]]:
    """How many prompts are this process's, and each with its tokens and whether beams had to be greedy."""
    model, processes = subject.model, subject.processes
    unknown = [prompt for prompt in prompts if prompt.index not in known]
    # Prompts of like length are dealt out in turn: their work is alike, as far as anyone can know.
    mine = sorted(unknown, key=lambda prompt: -len(prompt.ids))[processes.rank :: processes.world_size]
    if isinstance(model, VllmModel):
        return len(mine), ((prompt, ids, False) for prompt, ids in model.answer(mine, decoding, seed))
    inner = model.get_base_model() if isinstance(model, PeftModel) else model  # its layers hold the adapter
    n_layers = None if model.config.is_encoder_decoder else n_cache_layers(inner)
    if n_layers is not None and decoding.num_beams == 1:
        decoder = Decoder(inner, n_layers, decoding, seed, processes.device)
        return len(mine), _continuous(decoder, subject, mine, ends)
    whole = WholeBatches(inner, subject.tokenizer, decoding, seed, ends, processes.device)
    padded = model.config.is_encoder_decoder or n_layers is not None
    batches = whole.split(prompts, subject.max_tokens, subject.batch_size, padded=padded)
    # A batch is answered as a whole, or not at all: sampled beams depend on their neighbours.
    waiting = [batch for batch in batches if any(prompt.index not in known for prompt in batch)]
    share = waiting[processes.rank :: processes.world_size]
    return sum(map(len, share)), (answer for batch in share for answer in whole.answer(batch))


def _continuous(
    decoder: Decoder, subject: Subject, prompts: Sequence[Prompt], ends: Sequence[int]
) -> Iterator[tuple[Prompt, list[int], bool]]:
    limits = batch_limits(decoder, subject.max_tokens, subject.batch_size)
    for prompt, ids in ContinuousBatch(decoder, subject.tokenizer, ends, prompts, limits):
        yield prompt, ids, False


@contextmanager
def _ready(model: Any) -> Iterator[None]:
    """Inside, a torch model computes without dropout and without gradients."""
    if isinstance(model, VllmModel):
        yield
        return
    with in_mode(model, training=False), torch.inference_mode():
        yield
