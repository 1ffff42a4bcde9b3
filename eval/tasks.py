"""The table of benchmarks: what ``eval.tasks`` of a run and the scripts of this folder know by name.

A new benchmark is a module with a function of this type and an entry of ``TASKS``. ``lm_eval/NAME`` is any
task of lm-evaluation-harness.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from eval.benchmarks.commonsense import ALL, SETS, check_words, commonsense, grade_words, read_sets
from eval.benchmarks.gsm8k import check_references, grade_numbers, gsm8k
from eval.benchmarks.humaneval import humaneval
from eval.benchmarks.labels import check_labels, grade_labels
from eval.benchmarks.mmlu import mmlu
from eval.benchmarks.mt_bench import mt_bench
from eval.engine.generation import Decoding
from eval.results import EvalResult
from eval.sandbox.outside import Limits, find_sandbox
from eval.subject import Request, Subject
from lora_one.data.specs import Example
from lora_one.errors import UserError, nearest

Task = Callable[[Subject, Request], EvalResult]
Grader = Callable[[Subject, Sequence[Example], Request, Decoding], EvalResult]

TASKS: dict[str, Task] = {
    "gsm8k": gsm8k,
    "mmlu": mmlu,
    "mt_bench": mt_bench,  # answers only: eval/judge_mt_bench.py grades them
    **{name: functools.partial(commonsense, name=name) for name in (*SETS, ALL)},
    "humaneval": humaneval,
}

# Benchmarks whose data are always local files, and what reads them: faults are found before training.
LOCAL: dict[str, Callable[[Path | None], object]] = {
    name: functools.partial(read_sets, name) for name in (*SETS, ALL)
}
HARNESS = "lm_eval/"

# ``eval.task``: how answers to a dataset's own test split are graded.
GRADERS: dict[str, Grader] = {
    "gsm8k": grade_numbers,
    "label": grade_labels,
    "commonsense": grade_words,
}

# What of a test split can be found wrong before training.
_CHECKS: dict[str, Callable[[Sequence[Example]], None]] = {
    "gsm8k": check_references,
    "label": check_labels,
    "commonsense": check_words,
}


def check_examples(task: str, examples: Sequence[Example]) -> None:
    """Raises UserError for an answer that the grader ``task`` cannot read."""
    _CHECKS[task](examples)


def find_task(name: str) -> Task:
    """The benchmark of that name.

    Raises:
        UserError: If there is none, with the nearest name.
    """
    if name.startswith(HARNESS):
        return functools.partial(_harness, name=name.removeprefix(HARNESS))
    if name not in TASKS:
        raise UserError(
            f"no such benchmark: {name!r}{nearest(name, list(TASKS))}; there are {', '.join(TASKS)}, "
            f"and {HARNESS}NAME for lm-eval's"
        )
    return TASKS[name]


def _harness(subject: Subject, request: Request, *, name: str) -> EvalResult:
    from eval.benchmarks.harness import harness  # takes seconds

    return harness(subject, request, [name])


def check_benchmarks(names: Sequence[str], data: Mapping[str, str]) -> None:
    """Raises UserError for a benchmark that does not exist, lacks its data, or cannot run here."""
    for name in [*names, *data]:
        find_task(name)
    for name, path in data.items():
        if not Path(path).exists():
            raise UserError(f"eval.data.{name}={path}: no such file or folder")
    for name in names:
        if name in LOCAL:
            LOCAL[name](Path(data[name]) if name in data else None)
        if name.startswith(HARNESS):
            from eval.benchmarks.harness import check_names  # takes seconds

            check_names([name.removeprefix(HARNESS)], Path(data[name]) if name in data else None)
    if "humaneval" in names:
        find_sandbox(Limits())  # refuses now, rather than after hours of training
