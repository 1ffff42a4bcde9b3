"""Prompts and answers in the form of a chat model: through its tokenizer's own template."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lora_one.data.example import Example, RowError
from lora_one.errors import UserError

_PROBE = "answer"


class Rendered(str):
    """A prompt in its template's form: the special tokens are in the text, so none are to be added."""

    __slots__ = ()


@dataclass(frozen=True)
class TurnEnd:
    """What a template writes after an answer.

    Attributes:
        text: The end of the turn, as text; what follows it is not learned.
        n_after: Characters of white space that follow it.
        token: Its last token.
    """

    text: str
    n_after: int
    token: int


def turn_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """The end of the assistant's turn; the end token of texts, where the template has none of its own.

    Raises:
        UserError: If the tokenizer has no chat template, or it writes no answer.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"dataset.chat=true: the tokenizer of {tokenizer.name_or_path} has no chat template; "
            "choose an instruct model, or use dataset.chat=false"
        )
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
    try:
        whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except TemplateError as error:
        raise UserError(f"dataset.chat=true: the chat template fails ({error})") from None
    _, found, tail = whole.rpartition(_PROBE)
    if not found:
        raise UserError("dataset.chat=true: the chat template leaves out the assistant's turn")
    text = tail.rstrip()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else [tokenizer.eos_token_id]
    return TurnEnd(text or str(tokenizer.eos_token), len(tail) - len(text), ids[-1])


def chat_renderer(tokenizer: PreTrainedTokenizerBase) -> Callable[[Example], Example]:
    """What writes an example in the template's form, up to the end of the assistant's turn.

    Raises:
        UserError: As ``turn_end``.
    """
    end = turn_end(tokenizer)

    def rendered(turns: list[dict[str, str]], **settings: Any) -> str:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **settings))

    def render(example: Example) -> Example:
        given = example.turns or (("user", example.prompt),)
        turns = [{"role": role, "content": text} for role, text in given]
        try:
            prompt = rendered(turns, add_generation_prompt=True)
            whole = rendered([*turns, {"role": "assistant", "content": example.target}])
        except TemplateError as error:
            raise RowError(f"the chat template refuses these turns ({error})") from None
        if not whole.startswith(prompt):
            raise RowError("the chat template does not begin an answer with its own generation prompt")
        target = whole[len(prompt) : len(whole) - end.n_after]
        if not target.endswith(end.text):
            target += end.text
        return Example(Rendered(prompt), target, example.answer, example.group)

    return render
