"""MMLU: multiple choice by the logits of the four letters, after worked examples (arXiv:2009.03300)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eval.benchmarks.mmlu_data import LETTERS, Exam, Item, limited, read_exams
from eval.benchmarks.mmlu_subjects import CATEGORIES
from eval.engine.answers import AnswerStore, digest_of, weights_digest
from eval.engine.context import context_length
from eval.engine.questions import Question, encode, within
from eval.engine.scoring import score
from eval.results import EvalResult, Figure, share
from eval.subject import Request, Subject
from lora_one.progress import progress_bar

_CHOICES = [f" {letter}" for letter in LETTERS]


@dataclass(frozen=True)
class Answer:
    """What the model made of a question.

    Attributes:
        logits: Of the four letters.
        shots: Worked examples before it.
        is_cut: Whether the question lost its beginning.
    """

    logits: tuple[float, ...]
    shots: int
    is_cut: bool

    @classmethod
    def stored(cls, value: dict[str, Any]) -> "Answer":
        """As it was written."""
        return cls(tuple(value["logits"]), value["shots"], value["is_cut"])

    @property
    def letter(self) -> str:
        """The one with the highest logit."""
        return LETTERS[max(range(4), key=self.logits.__getitem__)]


def mmlu(subject: Subject, request: Request) -> EvalResult:
    """Five-shot accuracy on the 14,042 test questions."""
    return examine(subject, request, read_exams(request.data))


def examine(
    subject: Subject, request: Request, exams: Sequence[Exam], shots: int = 5, *, shares_prefix: bool = True
) -> EvalResult:
    """Accuracy overall, which weighs every question the same, by category and by subject.

    Args:
        subject: The model and who shares the work.
        request: Its limit takes the first questions of every subject in turn; in its folder the answers
            are kept subject by subject, and found again by the same model and questions.
        exams: From ``read_exams``.
        shots: Worked examples before each question.
        shares_prefix: Read the examples, which the questions of a subject have in common, once.
    """
    start = time.perf_counter()
    chosen = limited(exams, request.limit)
    settings = {} if request.folder is None else _settings(subject, shots)
    answers: dict[str, list[Answer]] = {}
    with (
        AnswerStore(request.folder, settings, subject.processes) as store,
        progress_bar(
            total=sum(len(exam.questions) for exam in chosen),
            shown=subject.processes.is_main,
            desc=request.description,
            unit="question",
        ) as bar,
    ):
        for exam in chosen:
            keys = _keys(exam, shots)
            known = {key: Answer.stored(store.known[key]) for key in keys if key in store.known}
            left = {key: item for key, item in zip(keys, exam.questions, strict=True) if key not in known}
            bar.update(len(keys) - len(left))
            if left:
                rest = replace(exam, questions=tuple(left.values()))
                made = dict(zip(left, _take(subject, rest, shots, bar.update, shares_prefix), strict=True))
                if subject.processes.is_main:
                    for key, answer in made.items():
                        store.add(key, vars(answer))
                known |= made
            answers[exam.subject] = [known[key] for key in keys]
    return _result(chosen, answers, shots, time.perf_counter() - start)


def prompt(subject: str, examples: Sequence[Item], item: Item) -> str:
    """A question after worked examples, in the form that the benchmark was published with."""
    topic = subject.replace("_", " ")
    parts = [f"The following are multiple choice questions (with answers) about {topic}."]
    parts += [f"{_asked(example)} {example.answer}" for example in examples]
    return "\n\n".join([*parts, _asked(item)])


def _asked(item: Item) -> str:
    options = (f"{letter}. {option}" for letter, option in zip(LETTERS, item.options, strict=True))
    return "\n".join([item.question, *options, "Answer:"])


def _take(
    subject: Subject, exam: Exam, shots: int, advance: Callable[[int], Any], shares_prefix: bool
) -> list[Answer]:
    """The answers to one exam."""
    answers: dict[int, Answer] = {}
    for (n_shots, is_cut), group in _fitted(subject, exam, shots).items():
        # What was cut begins in the middle of its own text.
        logits = score(subject, list(group.values()), advance, shares_prefix=shares_prefix and not is_cut)
        for index, row in zip(group, logits.tolist(), strict=True):
            answers[index] = Answer(tuple(row), n_shots, is_cut)
    return [answers[index] for index in range(len(exam.questions))]


def _fitted(subject: Subject, exam: Exam, shots: int) -> dict[tuple[int, bool], dict[int, Question]]:
    """Questions by number of examples and whether they are cut.

    One that does not fit the model's context loses its first examples, and then its beginning.
    """
    limit = context_length(subject.model)
    groups: dict[tuple[int, bool], dict[int, Question]] = {}
    left = list(range(len(exam.questions)))
    for n_shots in range(shots, -1, -1):
        examples = exam.examples[shots - n_shots : shots]
        texts = [prompt(exam.subject, examples, exam.questions[index]) for index in left]
        encoded = dict(zip(left, encode(subject, texts, _CHOICES), strict=True))
        for index, question in encoded.items():
            fits = limit is None or len(question.context) <= limit
            if fits or n_shots == 0:
                groups.setdefault((n_shots, not fits), {})[index] = within(question, limit, subject)
        left = [index for index in left if not any(index in group for group in groups.values())]
    return groups


def _settings(subject: Subject, shots: int) -> dict[str, Any]:
    """What the answers depend on, apart from the questions."""
    tokenizer = subject.tokenizer
    return {
        "benchmark": "mmlu",
        "model": subject.name,
        "weights": weights_digest(subject.model),
        "tokenizer": digest_of([tokenizer.get_vocab(), tokenizer("A B")["input_ids"]]),
        "shots": shots,
    }


def _keys(exam: Exam, shots: int) -> list[int]:
    """A number for each question, which is the same wherever the question stands."""
    texts = [prompt(exam.subject, exam.examples[:shots], item) for item in exam.questions]
    return [int(digest_of(text), 16) for text in texts]


def _result(
    exams: Sequence[Exam], answers: dict[str, list[Answer]], shots: int, seconds: float
) -> EvalResult:
    samples: tuple[dict[str, Any], ...] = tuple(
        {
            "subject": exam.subject,
            "question": item.question,
            "chosen": answer.letter,
            "reference": item.answer,
            "right": answer.letter == item.answer,
            "shots": answer.shots,
            "logits": answer.logits,
        }
        for exam in exams
        for item, answer in zip(exam.questions, answers[exam.subject], strict=True)
    )
    everything = [answer for found in answers.values() for answer in found]
    return EvalResult(
        task="mmlu",
        metric="accuracy",
        figure=share([sample["right"] for sample in samples]),
        decoding=f"{shots}-shot, argmax over the four letters",
        seconds=seconds,
        samples=samples,
        others=_by_category(samples) | _by_subject(samples),
        counts={
            "prompts with fewer shots": sum(answer.shots < shots for answer in everything),
            "shots dropped": sum(shots - answer.shots for answer in everything),
            "questions cut": sum(answer.is_cut for answer in everything),
        },
    )


def _by_category(samples: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    names = dict.fromkeys(CATEGORIES.values())
    rights: dict[str, list[bool]] = {
        name: [sample["right"] for sample in samples if CATEGORIES[sample["subject"]] == name]
        for name in names
    }
    return {name: share(right) for name, right in rights.items() if right}


def _by_subject(samples: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    rights: dict[str, list[bool]] = {}
    for sample in samples:
        rights.setdefault(sample["subject"], []).append(sample["right"])
    return {subject: share(right) for subject, right in rights.items()}
