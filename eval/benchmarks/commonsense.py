"""The eight commonsense sets of LLM-Adapters: the answer is one of a few words.

Source: Hu et al. 2023, "LLM-Adapters" (arXiv 2304.01933): its sets, words and rule for reading them.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import sqrt
from pathlib import Path
from typing import Any

from eval.engine.generation import Decoding, generate_counted
from eval.results import EvalResult, Figure, share
from eval.subject import Request, Subject
from lora_one.data.rows import file_rows
from lora_one.data.specs import SPECS, Example
from lora_one.errors import UserError

ALL = "commonsense"
# Greedy beams, where sampling among them fails: the published fix for models with sharp likelihoods.
PUBLISHED = Decoding(max_new_tokens=32, temperature=0.1, top_p=0.75, top_k=40, num_beams=4)
GREEDY = Decoding(max_new_tokens=32)

_TRUTH = ("true", "false")
_SOLUTIONS = ("solution1", "solution2")
_ANSWERS = ("answer1", "answer2", "answer3", "answer4", "answer5")
_ENDINGS = ("ending1", "ending2", "ending3", "ending4")
_OPTIONS = ("option1", "option2")
_FAMILIES = (_TRUTH, _SOLUTIONS, _ANSWERS, _ENDINGS, _OPTIONS)

_SOURCE = "the folder dataset/ of github.com/AGI-Edgerunners/LLM-Adapters"

SETS: dict[str, tuple[str, ...]] = {
    "boolq": _TRUTH,
    "piqa": _SOLUTIONS,
    "social_i_qa": _ANSWERS,
    "hellaswag": _ENDINGS,
    "winogrande": _OPTIONS,
    "ARC-Challenge": _ANSWERS,
    "ARC-Easy": _ANSWERS,
    "openbookqa": _ANSWERS,
}


def paper_word(text: str, words: Sequence[str]) -> str:
    """The first of ``words`` in a generated text, be it part of another word; '' where there is none.

    What the model writes after a section of its own making (``### Response:``) is not seen.
    """
    found = re.search("|".join(words), text.split("### Response:")[0])
    return found[0] if found else ""


def normalised_word(text: str, words: Sequence[str]) -> str | None:
    """The first of ``words`` in a generated text, as a whole word in any case; None where there is none.

    The answer ends where the model begins another section (``###``).
    """
    found = re.search(rf"\b(?:{'|'.join(words)})\b", text.split("###")[0], re.IGNORECASE)
    return found[0].lower() if found else None


def read_set(name: str, data: Path, limit: int | None = None) -> list[Example]:
    """The questions of one set, with the prompts of ``dataset=commonsense_reasoning``.

    Args:
        name: One of ``SETS``.
        data: A folder with ``{name}/test.json`` or with ``test.json``, or such a file.
        limit: The first so many.

    Raises:
        UserError: For a file that cannot be read, has no rows, or has a row
            without an answer or with another answer than the set's words.
    """
    path = _file_of(name, data)
    examples = []
    for number, row in enumerate(
        islice(file_rows(path, ("instruction", "answer"), ("input", "output")), limit), start=1
    ):
        example = SPECS["commonsense_reasoning"].to_example({"input": "", "output": "", **row})
        assert example is not None
        if example.answer not in SETS[name]:
            words = ", ".join(SETS[name])
            raise UserError(
                f"{path}, row {number}: the answer {example.answer!r} is none of {words}; is this {name}?"
            )
        examples.append(example)
    if not examples:
        raise UserError(f"{path}: has no rows; give it at least one question")
    return examples


def _file_of(name: str, data: Path) -> Path:
    if not data.is_dir():
        return data
    own = data / name / "test.json"
    alone = data / "test.json"
    return alone if alone.is_file() and not own.exists() else own


def read_sets(name: str, data: Path | None, limit: int | None = None) -> dict[str, list[Example]]:
    """The questions of one set, or of all eight where ``name`` is ``commonsense``; by set.

    Raises:
        UserError: Without ``data``, and as ``read_set``.
    """
    if data is None:
        raise UserError(f"{name}: not on the Hub; give --data (in a run eval.data.{name}) {_SOURCE}")
    if not data.exists():
        raise UserError(f"{data}: no such file or folder; give {_SOURCE}")
    if name != ALL:
        return {name: read_set(name, data, limit)}
    if data.is_file():
        raise UserError(f"{data}: is a file; give the folder that holds {', '.join(SETS)}")
    return {each: read_set(each, data, limit) for each in SETS}


def grade_sets(
    subject: Subject,
    sets: Mapping[str, Sequence[Example]],
    request: Request,
    decoding: Decoding = PUBLISHED,
) -> EvalResult:
    """The accuracy on one set, or the mean over several: each set counts the same, as published."""
    results = {
        name: grade_words(subject, examples, _part(request, name, len(sets)), decoding, name)
        for name, examples in sets.items()
    }
    if len(results) == 1:
        return next(iter(results.values()))
    others = {name: result.figure for name, result in results.items()}
    others |= {
        grader: _mean([result.others[grader] for result in results.values()])
        for grader in ("normalised", "paper")
    }
    others |= {f"{name}, paper": result.others["paper"] for name, result in results.items()}
    return EvalResult(
        task=ALL,
        metric="mean_accuracy",
        figure=others["normalised"],
        decoding=next(iter(results.values())).decoding,
        seconds=sum(result.seconds for result in results.values()),
        samples=tuple(
            {"set": name, **sample} for name, result in results.items() for sample in result.samples
        ),
        others=others,
        counts=_summed([result.counts for result in results.values()]),
    )


def grade_words(
    subject: Subject,
    examples: Sequence[Example],
    request: Request,
    decoding: Decoding = PUBLISHED,
    task: str = ALL,
) -> EvalResult:
    """The share of ``examples`` whose generated answer word is theirs; no word is no answer, so wrong.

    Raises:
        UserError: If an answer of ``examples`` is no word of any set.
    """
    start = time.perf_counter()
    chosen = list(examples[: request.limit])
    words = [_words_beside(example.answer, row) for row, example in enumerate(chosen, start=1)]
    made = generate_counted(subject, [example.prompt for example in chosen], decoding, request)
    samples: list[dict[str, Any]] = []
    for example, text, choice in zip(chosen, made.texts, words, strict=True):
        answer = normalised_word(text, choice)
        samples.append(
            {
                "prompt": example.prompt,
                "generated": text,
                "reference": example.answer,
                "answer": answer,
                "right": answer == example.answer,
                "normalised": answer == example.answer,
                "paper": paper_word(text, choice) == example.answer,
            }
        )
    by_grader = {name: share([sample[name] for sample in samples]) for name in ("normalised", "paper")}
    return EvalResult(
        task=task,
        metric="accuracy",
        figure=by_grader["normalised"],
        decoding=str(decoding),
        seconds=time.perf_counter() - start,
        samples=tuple(samples),
        others=by_grader,
        counts={"without an answer": sum(sample["answer"] is None for sample in samples)} | made.counts,
    )


def commonsense(subject: Subject, request: Request, name: str = ALL) -> EvalResult:
    """One set, or all eight, decoded as published."""
    return grade_sets(subject, read_sets(name, request.data, request.limit), request)


def check_words(examples: Sequence[Example]) -> None:
    """Raises UserError for an answer that is no word of any set."""
    for row, example in enumerate(examples, start=1):
        _words_beside(example.answer, row)


def _words_beside(answer: str, row: int) -> tuple[str, ...]:
    """The words among which a reference was chosen."""
    for family in _FAMILIES:
        if answer in family:
            return family
    raise UserError(
        f"test split, row {row}: the answer {answer!r} is no answer word; give one of "
        f"{', '.join(word for family in _FAMILIES for word in family)}"
    )


def _part(request: Request, name: str, n_sets: int) -> Request:
    """The request of one set of several: its own folder, so that each goes on where it was."""
    if n_sets == 1:
        return request
    folder = None if request.folder is None else request.folder / name
    return replace(request, folder=folder, description=f"{request.description}: {name}")


def _mean(figures: Sequence[Figure]) -> Figure:
    """The unweighted mean of independent figures."""
    n_sets = len(figures)
    error = sqrt(sum(figure.standard_error**2 for figure in figures)) / n_sets
    return Figure(
        sum(figure.value for figure in figures) / n_sets, error, sum(figure.n for figure in figures)
    )


def _summed(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    names = dict.fromkeys(what for each in counts for what in each)
    return {what: sum(each.get(what, 0) for each in counts) for what in names}
