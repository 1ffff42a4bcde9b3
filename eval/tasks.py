"""The table of benchmarks: what ``eval.tasks`` of a run and the scripts of this folder know by name.

A new benchmark is a module with a function of this type and an entry of ``TASKS``.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from eval.generation import Decoding
from eval.gsm8k import grade_numbers, gsm8k
from eval.humaneval import humaneval
from eval.results import EvalResult
from eval.sandbox.outside import Limits, find_sandbox
from eval.subject import Request, Subject
from lora_one.data.specs import Example
from lora_one.errors import UserError, nearest

Task = Callable[[Subject, Request], EvalResult]
Grader = Callable[[Subject, Sequence[Example], Request, Decoding], EvalResult]

TASKS: dict[str, Task] = {
    "gsm8k": gsm8k,
    "humaneval": humaneval,
}

# ``eval.task``: how answers to a dataset's own test split are graded.
GRADERS: dict[str, Grader] = {
    "gsm8k": grade_numbers,
}


def find_task(name: str) -> Task:
    """The benchmark of that name.

    Raises:
        UserError: If there is none, with the nearest name.
    """
    if name not in TASKS:
        raise UserError(
            f"no such benchmark: {name!r}{nearest(name, list(TASKS))}; there are {', '.join(TASKS)}"
        )
    return TASKS[name]


def check_benchmarks(names: Sequence[str], data: Mapping[str, str]) -> None:
    """Raises UserError for a benchmark that does not exist, lacks its data, or cannot run here."""
    for name in [*names, *data]:
        find_task(name)
    for name, path in data.items():
        if not Path(path).exists():
            raise UserError(f"eval.data.{name}={path}: no such file or folder")
    if "humaneval" in names:
        find_sandbox(Limits())  # refuses now, rather than after hours of training
