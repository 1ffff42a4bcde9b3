"""MMLU's questions, from the original folder of CSV files or from the Hub."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eval.benchmarks.mmlu_subjects import SUBJECTS
from lora_one.data.rows import HubSource, hub_rows
from lora_one.errors import UserError, nearest

LETTERS = "ABCD"
_HUB = "cais/mmlu"


@dataclass(frozen=True)
class Item:
    """A question with four options, and the letter of the right one."""

    question: str
    options: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Exam:
    """A subject: worked examples (its dev split) and questions (its test split)."""

    subject: str
    examples: tuple[Item, ...]
    questions: tuple[Item, ...]


def read_exams(data: Path | None, subjects: Sequence[str] = SUBJECTS, shots: int = 5) -> list[Exam]:
    """The exams of ``subjects``, from a folder with ``dev`` and ``test``, or from the Hub.

    Args:
        data: The folder; None: the Hub.
        subjects: Which.
        shots: Worked examples that each must have.

    Raises:
        UserError: For an unknown subject, or a folder, file or row that is missing or broken, with its place.
    """
    for subject in subjects:
        if subject not in SUBJECTS:
            raise UserError(f"no such MMLU subject: {subject!r}{nearest(subject, list(SUBJECTS))}")
    exams = _from_hub(subjects) if data is None else _from_folder(data, subjects)
    for exam in exams:
        where = f"{_HUB if data is None else data}: {exam.subject}"
        if not exam.questions:
            raise UserError(f"{where} has no test questions; give the whole data set")
        if len(exam.examples) < shots:
            raise UserError(f"{where} has {len(exam.examples)} dev rows, and --shots={shots} needs more")
    return exams


def limited(exams: Sequence[Exam], limit: int | None) -> list[Exam]:
    """The first questions of every subject, one of each in turn until there are ``limit``."""
    if limit is None:
        return list(exams)
    turns = sorted((turn, place) for place, exam in enumerate(exams) for turn in range(len(exam.questions)))
    taken = [0] * len(exams)
    for _, place in turns[:limit]:
        taken[place] += 1
    return [
        replace(exam, questions=exam.questions[:n]) for exam, n in zip(exams, taken, strict=True) if n > 0
    ]


def _from_folder(folder: Path, subjects: Sequence[str]) -> list[Exam]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one with MMLU's dev/ and test/")
    for split in ("dev", "test"):
        if not (folder / split).is_dir():
            raise UserError(f"{folder}: has no folder {split}/; give the one with MMLU's dev/ and test/")
    return [
        Exam(
            subject,
            _csv_items(folder / "dev" / f"{subject}_dev.csv"),
            _csv_items(folder / "test" / f"{subject}_test.csv"),
        )
        for subject in subjects
    ]


def _csv_items(path: Path) -> tuple[Item, ...]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the whole data set, or leave the subject out")
    items: list[Item] = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file, strict=True), start=1):
                place = f"{path}, row {number}"
                if len(row) != 6:
                    raise UserError(
                        f"{place}: {len(row)} fields; expected the question, four options and the answer"
                    )
                items.append(_item(row[0], row[1:5], row[5].strip(), place))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); convert it") from None
    except csv.Error as error:
        raise UserError(f"{path}, row {len(items) + 1}: not valid CSV ({error}); mend it") from None
    return tuple(items)


def _item(question: str, options: Sequence[str], answer: str, place: str) -> Item:
    if len(answer) != 1 or answer not in LETTERS:
        raise UserError(f"{place}: the answer is {answer!r}; expected one of A, B, C, D")
    return Item(question, tuple(options), answer)


def _from_hub(subjects: Sequence[str]) -> list[Exam]:
    # One subject is a small download of its own; more come together.
    config = subjects[0] if len(subjects) == 1 else "all"
    splits = {split: _hub_items(split, config) for split in ("dev", "test")}
    return [
        Exam(subject, *(tuple(splits[split].get(subject, ())) for split in ("dev", "test")))
        for subject in subjects
    ]


def _hub_items(split: str, config: str) -> dict[str, list[Item]]:
    by_subject: dict[str, list[Item]] = {}
    columns = ("question", "subject", "choices", "answer")
    rows = hub_rows(HubSource(_HUB, split, config), columns, remedy="give a folder with --data")
    for number, row in enumerate(rows, start=1):
        place = f"{_HUB} ({config}, {split}), row {number}"
        options, answer = json.loads(row["choices"]), row["answer"]
        if not isinstance(options, list) or len(options) != 4 or answer not in ("0", "1", "2", "3"):
            raise UserError(
                f"{place}: expected four choices and an answer from 0 to 3; use the original data"
            )
        item = _item(row["question"], [str(option) for option in options], LETTERS[int(answer)], place)
        by_subject.setdefault(row["subject"], []).append(item)
    return by_subject
