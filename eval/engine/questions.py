"""Prompts as tokens, and the tokens to choose from after each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from eval.engine.context import without_beginning
from eval.subject import Subject
from lora_one.data.chat import Rendered
from lora_one.data.encoding import encoder_input
from lora_one.errors import UserError

Tokens = tuple[int, ...]
# Tokens of a prompt with a choice after it, and the place of the one that holds the choice's first letter.
_Split = tuple[Tokens, int]
_CHUNK = 500


@dataclass(frozen=True)
class Question:
    """A prompt as the model reads it, and the tokens to choose from.

    Attributes:
        context: Tokens before the choice; for an encoder with a decoder, the encoder's.
        candidates: First token of each choice in which not all are alike.
        begun: What the decoder reads before the choice; empty for one text.
        is_cut: Whether the beginning of the prompt was cut away.
    """

    context: Tokens
    candidates: Tokens
    begun: Tokens = ()
    is_cut: bool = False


def encode(subject: Subject, prompts: Sequence[str], choices: Sequence[str]) -> list[Question]:
    """The prompts as tokens, with the candidates that follow each in context.

    Prompt and choice are tokenised together: whether the space before a word belongs to the word's token, to
    the prompt's last one or is a token of its own is the tokenizer's affair, and the model has learned it so.

    Args:
        subject: Whose tokenizer.
        prompts: Texts, each followed by one of the choices.
        choices: What may follow, with the space before it.

    Raises:
        UserError: If two choices start with the same token.
    """
    if subject.model.config.is_encoder_decoder:
        return _pairs(subject, prompts, choices)
    tokenizer = subject.tokenizer
    questions: list[Question] = []
    for start in range(0, len(prompts), _CHUNK):
        chunk = prompts[start : start + _CHUNK]
        by_choice = [_splits(tokenizer, chunk, choice) for choice in choices]
        for prompt, splits in zip(chunk, zip(*by_choice, strict=True), strict=True):
            context, candidates = _first_difference(splits)
            _check_distinct(candidates, choices, prompt, tokenizer)
            questions.append(Question(context, candidates))
    return questions


def _pairs(subject: Subject, prompts: Sequence[str], choices: Sequence[str]) -> list[Question]:
    """The encoder reads the prompt; the decoder starts with the choice, which has no space before it."""
    tokenizer, start = subject.tokenizer, subject.model.config.decoder_start_token_id
    if start is None:
        raise UserError(f"{subject.name}: its config has no decoder_start_token_id; set it")
    splits = [_splits(tokenizer, [""], choice.strip())[0] for choice in choices]
    before, candidates = _first_difference(splits)
    _check_distinct(candidates, choices, "", tokenizer)
    questions: list[Question] = []
    for first in range(0, len(prompts), _CHUNK):
        rows = tokenizer(list(prompts[first : first + _CHUNK]))["input_ids"]
        questions += [
            Question(tuple(encoder_input(row, tokenizer)), candidates, (start, *before)) for row in rows
        ]
    return questions


def _splits(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], choice: str) -> list[_Split]:
    is_rendered = bool(prompts) and isinstance(prompts[0], Rendered)
    choice = choice.lstrip() if is_rendered else choice  # a chat template says what comes before an answer
    n_spaces = len(choice) - len(choice.lstrip())
    texts = [prompt + choice for prompt in prompts]
    rows = tokenizer(
        texts, add_special_tokens=not is_rendered, return_attention_mask=False, return_token_type_ids=False
    )
    splits: list[_Split] = []
    for index, prompt in enumerate(prompts):
        place = rows.char_to_token(index, len(prompt) + n_spaces)
        if place is None:
            raise UserError(
                f"the choice {choice!r}: the tokenizer leaves out its beginning; give another word"
            )
        splits.append((tuple(rows["input_ids"][index]), place))
    return splits


def _first_difference(splits: Sequence[_Split]) -> tuple[Tokens, Tokens]:
    """The tokens before the choices differ, and the first one of each after them."""
    # One choice may swallow the space before it where another does not.
    n = len(common_beginning([ids[:place] for ids, place in splits]))
    shared = common_beginning([ids for ids, _ in splits])
    if all(len(ids) > len(shared) for ids, _ in splits):
        n = max(n, len(shared))  # all begin alike, as "choice 1" and "choice 2" do
    return splits[0][0][:n], tuple(ids[n] for ids, _ in splits)


def common_beginning(rows: Sequence[Tokens]) -> Tokens:
    """The longest beginning that all rows have."""
    first, last = min(rows), max(rows)  # whatever these two share, those between them in the alphabet do
    for place, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return first[:place]
    return first


def _check_distinct(
    candidates: Sequence[int], choices: Sequence[str], prompt: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    seen: dict[int, str] = {}
    for token, choice in zip(candidates, choices, strict=True):
        if token in seen:
            where = f" after {prompt[-30:]!r}" if prompt else ""
            raise UserError(
                f"{seen[token].strip()!r} and {choice.strip()!r} start with the same token "
                f"{tokenizer.decode([token])!r}{where}, which cannot tell them apart; give other words"
            )
        seen[token] = choice


def within(question: Question, limit: int | None, subject: Subject) -> Question:
    """The question without what does not fit of its beginning; a token that starts every text stays."""
    kept = tuple(without_beginning(question.context, limit, subject.tokenizer.bos_token_id))
    return question if kept == question.context else replace(question, context=kept, is_cut=True)
