"""MMLU: multiple choice by the logits of the four letters, after worked examples (arXiv:2009.03300)."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.benchmarks.mmlu_data import LETTERS, Exam, Item, limited, read_exams
from eval.benchmarks.mmlu_subjects import CATEGORIES
from eval.engine.questions import Question, context_length, encode, within
from eval.engine.scoring import score
from eval.results import EvalResult, Figure, share
from eval.subject import Request, Subject
from lora_one.errors import UserError
from lora_one.files import write_text
from lora_one.progress import progress_bar

_CHOICES = [f" {letter}" for letter in LETTERS]
_SAMPLED = 32


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
        request: Its limit takes the first questions of every subject in turn; in its folder the answers to
            each subject are kept, and found again by the same model and questions.
        exams: From ``read_exams``.
        shots: Worked examples before each question.
        shares_prefix: Read the examples, which the questions of a subject have in common, once.
    """
    start = time.perf_counter()
    chosen = limited(exams, request.limit)
    identity = [subject.name, str(subject.model.dtype), weights_sample(subject.model)]
    answers: dict[str, list[Answer]] = {}
    with progress_bar(
        total=sum(len(exam.questions) for exam in chosen),
        shown=subject.processes.is_main,
        desc=request.description,
        unit="question",
    ) as bar:
        for exam in chosen:
            store = _Store(subject, request.folder, exam, [*identity, shots])
            found = store.read()
            if found is None:
                found = _take(subject, exam, shots, bar.update, shares_prefix)
                store.write(found)
            else:
                bar.update(len(found))
            answers[exam.subject] = found
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


def weights_sample(model: Any) -> str:
    """Digest of some numbers of every parameter: other weights may have the same name."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if parameter.device.type == "meta" or parameter.numel() == 0:
            continue
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED]
        digest.update(some.to(torch.float64).cpu().numpy().tobytes())
    return digest.hexdigest()


class _Store:
    """The answers to one exam in a file, valid for the same questions, examples and model."""

    def __init__(self, subject: Subject, folder: Path | None, exam: Exam, identity: Sequence[Any]) -> None:
        self._processes = subject.processes
        self._path = None if folder is None else folder / f"{exam.subject}.json"
        asked = [prompt(exam.subject, exam.examples, item) for item in exam.questions]
        self._digest = hashlib.sha256(json.dumps([*identity, asked]).encode()).hexdigest()

    def read(self) -> list[Answer] | None:
        """The kept answers, on every process; None where there are none of these."""
        return self._processes.from_main(self._read() if self._processes.is_main else None)

    def _read(self) -> list[Answer] | None:
        if self._path is None or not self._path.is_file():
            return None
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            if stored["digest"] != self._digest:
                return None
            return [Answer(tuple(row["logits"]), row["shots"], row["is_cut"]) for row in stored["answers"]]
        except (ValueError, KeyError, TypeError):  # not written by this program: answered again
            return None

    def write(self, answers: Sequence[Answer]) -> None:
        """Keeps the answers, in one piece.

        Raises:
            UserError: If the folder cannot be written.
        """
        if self._path is None or not self._processes.is_main:
            return
        try:
            rows = [vars(answer) for answer in answers]
            write_text(self._path, json.dumps({"digest": self._digest, "answers": rows}) + "\n")
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written ({error.strerror}); make room") from None


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
