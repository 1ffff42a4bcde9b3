"""GSM8K and datasets of its form: a problem, and a solution that ends with a number."""

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from eval.benchmarks.graders import last_number, normalised_number, paper_number
from eval.engine.generation import Decoding, generate_counted
from eval.results import EvalResult, share
from eval.subject import Request, Subject
from lora_one.data.rows import file_rows, hub_rows
from lora_one.data.specs import MATH_PROMPT, SPECS, Example
from lora_one.errors import UserError

QUESTION = "{question}"
# The one that the papers train on.
PROMPT = MATH_PROMPT.format(QUESTION)


def gsm8k(subject: Subject, request: Request, decoding: Decoding = Decoding()) -> EvalResult:  # noqa: B008 frozen
    """Exact match on GSM8K's 1,319 test problems, with the prompt that the papers train on."""
    return grade_numbers(subject, read_problems(request.data, request.limit), request, decoding)


def read_problems(data: Path | None, limit: int | None = None, prompt: str = PROMPT) -> list[Example]:
    """GSM8K's test problems, from a local file with the columns question and answer, or from the Hub.

    Args:
        data: The file; None: the Hub.
        limit: The first so many.
        prompt: What the model reads, with ``{question}`` where the problem goes.

    Raises:
        UserError: For a prompt without a place for the problem; a file that cannot be read, without rows,
            or with a row that lacks a column or whose answer has no number.
    """
    if QUESTION not in prompt:
        raise UserError(f"--prompt {prompt!r}: has no place for the problem; write {QUESTION} there")
    spec = SPECS["gsm8k"]
    source = spec.sources["test"]
    if data is not None:
        rows = file_rows(data, spec.columns)
    else:
        rows = hub_rows(source, spec.columns, remedy="give --data FILE (in a run eval.data.gsm8k=FILE)")
    problems = []
    for row in islice(rows, limit):
        text = prompt.replace(QUESTION, row["question"])
        problems.append(Example(text, row["answer"], row["answer"], group=text))
    if not problems:
        raise UserError(f"{data}: has no rows; give it at least one problem")
    _references(problems, str(data or source.path))
    return problems


def grade_numbers(
    subject: Subject,
    examples: Sequence[Example],
    request: Request,
    decoding: Decoding = Decoding(),  # noqa: B008 frozen
) -> EvalResult:
    """The share of ``examples`` whose generated number is that of their answer.

    The headline is by ``normalised``; the figures of all three graders stand beside it by name.

    Raises:
        UserError: If an answer of ``examples`` has no number.
    """
    start = time.perf_counter()
    chosen = list(examples[: request.limit])
    references = _references(chosen, "test split")
    made = generate_counted(subject, [example.prompt for example in chosen], decoding, request)
    samples: list[dict[str, Any]] = []
    for example, text, reference in zip(chosen, made.texts, references, strict=True):
        answer = normalised_number(text)
        samples.append(
            {
                "prompt": example.prompt,
                "generated": text,
                "reference": str(reference),
                "answer": None if answer is None else str(answer),
                "right": answer == reference,
                "normalised": answer == reference,
                "paper": paper_number(text) == paper_number(example.answer),
                "last_number": last_number(text) == reference,
            }
        )
    by_grader = {
        name: share([sample[name] for sample in samples]) for name in ("normalised", "paper", "last_number")
    }
    return EvalResult(
        task="gsm8k",
        metric="exact_match",
        figure=by_grader["normalised"],
        decoding=str(decoding),
        seconds=time.perf_counter() - start,
        samples=tuple(samples),
        others=by_grader,
        counts={"without an answer": sum(sample["answer"] is None for sample in samples)} | made.counts,
    )


def check_references(examples: Sequence[Example]) -> None:
    """Raises UserError for an answer that states no number."""
    _references(examples, "test split")


def _references(examples: Sequence[Example], origin: str) -> list[Any]:
    numbers = [normalised_number(example.answer) for example in examples]
    for row, (example, number) in enumerate(zip(examples, numbers, strict=True), start=1):
        if number is None:
            end = " ".join(example.answer.split())[-40:]
            raise UserError(f"{origin}, row {row}: no number after '####' in the answer {end!r}; give one")
    return numbers
