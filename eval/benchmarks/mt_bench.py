"""MT-Bench: conversations of two turns (Zheng et al. 2023, arXiv 2306.05685), answered.

Files are FastChat's: ``question.jsonl`` in, ``model_answer/<model>.jsonl`` out. ``judge.py`` grades them.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download

from eval.engine.generation import Decoding, generate
from eval.results import EvalResult, share
from eval.subject import Request, Subject
from lora_one.data.chat import Rendered
from lora_one.data.rows import file_rows
from lora_one.data.specs import ALPACA_PROMPT
from lora_one.errors import UserError, nearest
from lora_one.hub import offline_hint

Template = Literal["auto", "chat", "alpaca"]
TEMPLATES: tuple[Template, ...] = ("auto", "chat", "alpaca")

# FastChat's, fastchat/llm_judge/common.py.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_SPACE = "lmsys/mt-bench"
_NEXT_TURN = "\n\n### Instruction:"


@dataclass(frozen=True)
class Question:
    """One conversation's side of the user.

    Attributes:
        id: As in the file, a number or a word.
        category: One of ``TEMPERATURES``.
        turns: What the user says, in order.
    """

    id: int | str
    category: str
    turns: tuple[str, ...]


def mt_bench(
    subject: Subject,
    request: Request,
    max_new_tokens: int = 1024,
    template: Template = "auto",
    model_id: str | None = None,
) -> EvalResult:
    """Answers every question, and grades nothing: the figure is the share of turns that got an answer.

    Args:
        subject: The model.
        request: ``data`` is a ``question.jsonl``.
        max_new_tokens: Of each turn.
        template: The tokenizer's chat template, the Alpaca prompts, or ``auto``: the first where it exists.
        model_id: What the answers are called by; default: the subject's name.

    Returns:
        ``samples`` are FastChat's rows of ``model_answer``.

    Raises:
        UserError: For a broken question file, or a chat template that does not exist.
    """
    start = time.perf_counter()
    path = request.data or hub_file("question.jsonl", "--data=question.jsonl (eval.data.mt_bench=…)")
    questions = read_questions(path)[: request.limit]
    is_chat = _uses_chat(subject, template)
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        _answer_turn(turn, questions, answers, is_chat, max_new_tokens, subject, request)
    rows = _fastchat_rows(questions, answers, model_id or subject.name.strip("/").replace("/", "--"))
    return EvalResult(
        task="mt_bench",
        metric="turns_answered",
        figure=share([answer != "" for turns in answers for answer in turns]),
        decoding=f"{'chat template' if is_chat else 'Alpaca prompts'}, temperature by category, "
        f"{max_new_tokens} new tokens; not graded",
        seconds=time.perf_counter() - start,
        samples=tuple(rows),
    )


def hub_file(name: str, remedy: str) -> Path:
    """A file of the benchmark from its authors' Space.

    Raises:
        UserError: If it cannot be had; it names the remedy.
    """
    try:
        return Path(hf_hub_download(_SPACE, f"data/mt_bench/{name}", repo_type="space"))
    except Exception as error:
        raise UserError(f"MT-Bench {name}: {offline_hint(error)}; or give {remedy}") from error


def read_questions(path: Path) -> list[Question]:
    """The questions of a file in FastChat's format.

    Raises:
        UserError: For a broken row, an unknown category, or two questions of one id.
    """
    questions: dict[int | str, Question] = {}
    for row in file_rows(path, ("question_id", "category", "turns")):
        key, category = row_id(row["question_id"]), row["category"]
        if key in questions:
            raise UserError(f"{path}: question {key} is there twice; remove one")
        if category not in TEMPERATURES:
            hint = nearest(category, list(TEMPERATURES))
            raise UserError(f"{path}, question {key}: no category {category!r}{hint}; mend it")
        questions[key] = Question(key, category, read_turns(row["turns"], f"{path}, question {key}"))
    if not questions:
        raise UserError(f"{path}: holds no question; give FastChat's question.jsonl")
    return list(questions.values())


def row_id(text: str) -> int | str:
    """A question's id from a row, whose values are all texts."""
    return int(text) if text.isdecimal() else text


def read_turns(text: str, place: str) -> tuple[str, ...]:
    """The turns of a row.

    Raises:
        UserError: If they are not a list of texts; ``place`` says where.
    """
    try:
        turns = json.loads(text)
    except json.JSONDecodeError:
        turns = text
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise UserError(f"{place}: 'turns' must be a list of texts, it is {str(turns)[:40]!r}")
    return tuple(turns)


def alpaca_conversation(turns: Sequence[str], answers: Sequence[str]) -> str:
    """The Alpaca prompt of the first turn, and after its answer a further instruction for each later one."""
    text = ALPACA_PROMPT.format(turns[0])
    for answer, turn in zip(answers, turns[1:], strict=False):
        text += f"{answer}{_NEXT_TURN}\n{turn}\n\n### Response:\n"
    return text


def _uses_chat(subject: Subject, template: Template) -> bool:
    has_template = bool(getattr(subject.tokenizer, "chat_template", None))
    if template == "chat" and not has_template:
        raise UserError(f"{subject.name}: its tokenizer has no chat template; give --template=alpaca")
    return has_template and template != "alpaca"


def _answer_turn(
    turn: int,
    questions: Sequence[Question],
    answers: list[list[str]],
    is_chat: bool,
    max_new_tokens: int,
    subject: Subject,
    request: Request,
) -> None:
    """Adds the answers to one turn of all questions, a call for each temperature."""
    asked = [index for index, question in enumerate(questions) if len(question.turns) > turn]
    for temperature in sorted({TEMPERATURES[questions[index].category] for index in asked}):
        group = [i for i in asked if TEMPERATURES[questions[i].category] == temperature]
        prompts = [
            _prompt(questions[i].turns[: turn + 1], answers[i], is_chat, subject.tokenizer) for i in group
        ]
        part = _part(request, f"turn{turn + 1}-{temperature:g}")
        texts = generate(subject, prompts, Decoding(max_new_tokens, temperature), part)
        for index, text in zip(group, texts, strict=True):
            # A model of Alpaca prompts may go on with a question of its own.
            cut = text if is_chat else text.split("### Instruction:")[0]
            answers[index].append(cut.strip())


def _part(request: Request, name: str) -> Request:
    """The request of one call: each keeps its answers in a folder of its own."""
    folder = None if request.folder is None else request.folder / name
    return replace(request, folder=folder, description=f"{request.description} {name}")


def _prompt(turns: Sequence[str], answers: Sequence[str], is_chat: bool, tokenizer: Any) -> str:
    if not is_chat:
        return alpaca_conversation(turns, answers)
    messages = []
    for index, turn in enumerate(turns):
        messages.append({"role": "user", "content": turn})
        messages += [{"role": "assistant", "content": answer} for answer in answers[index : index + 1]]
    return Rendered(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _fastchat_rows(
    questions: Sequence[Question], answers: Sequence[Sequence[str]], model_id: str
) -> list[dict[str, Any]]:
    rows = []
    for question, turns in zip(questions, answers, strict=True):
        content = json.dumps([model_id, question.id, turns])
        rows.append(
            {
                "question_id": question.id,
                "answer_id": hashlib.sha256(content.encode()).hexdigest()[:22],
                "model_id": model_id,
                "choices": [{"index": 0, "turns": list(turns)}],
                "tstamp": time.time(),
            }
        )
    return rows
