"""Tasks of lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.10256836) on a loaded model.

Importing this module takes seconds, so ``eval/tasks.py`` does it only where such a task is asked for.
"""

import functools
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from eval.results import EvalResult, Figure
from eval.subject import Request, Subject
from lora_one.data.rows import file_rows
from lora_one.errors import UserError, nearest
from lora_one.files import write_text
from lora_one.hub import offline_hint
from lora_one.modes import in_mode

_GSM8K_COT = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k-cot.yaml"
# Of these a mean lies between 0 and 1; anything else, such as a perplexity, is shown as it is.
_SHARES = ("acc", "exact_match", "f1", "pass")
_CPU_BATCH = 8
logging.getLogger("lm_eval").setLevel(logging.ERROR)


class SubjectLM(HFLM):
    """A subject as lm-eval sees it: nothing is loaded or merged, and all processes share the items."""

    def __init__(self, subject: Subject):
        on_cpu = subject.processes.device.type == "cpu"
        # Finding the largest batch costs passes at full context, and a CPU gains nothing by it.
        size = subject.batch_size or (_CPU_BATCH if on_cpu else "auto")
        with _left_tied(subject.model):
            super().__init__(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=size)
        self._processes = subject.processes
        self._rank, self._world_size = subject.processes.rank, subject.processes.world_size

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """One tensor of every process, stacked."""
        return torch.stack(self._processes.gather([tensor.cpu()]))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any]:
        """One object of every process."""
        return self._processes.gather([obj])

    def barrier(self) -> None:
        """Returns when every process has come here."""
        self._processes.wait()

    def n_cut(self, samples: Sequence[Mapping[str, Any]]) -> int:
        """How many requests of logged samples lost tokens at their left to the model's context."""
        if self.backend != "causal":
            return 0
        first = samples[0]["filter"] if samples else None
        requests = [request for row in samples if row["filter"] == first for request in row["arguments"]]
        return sum(self._is_cut(*request[:2]) for request in requests if len(request) > 1)

    def _is_cut(self, context: str, rest: Any) -> bool:
        if isinstance(rest, Mapping):
            room = self.max_length - int(rest.get("max_gen_toks", self.max_gen_toks))
            return len(self.tok_encode(context)) > room
        return len(self.tok_encode(context + str(rest))) > self.max_length + 1


@contextmanager
def _left_tied(model: Any) -> Iterator[None]:
    """lm-eval ties what is tied already, and fails on it where PEFT has wrapped the head to train it."""
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights


def harness(
    subject: Subject, request: Request, names: Sequence[str], num_fewshot: int | None = None
) -> EvalResult:
    """The figures of lm-eval's tasks.

    Args:
        subject: The model.
        request: ``data`` is a folder of task files, or for ``gsm8k_cot`` a file of problems.
        names: Tasks, groups or tags; the first one's first metric is the headline.
        num_fewshot: Examples before each question; None: what each task says.

    Returns:
        Each metric with lm-eval's standard error; ``decoding`` has versions and examples.

    Raises:
        UserError: As ``load_tasks``.
    """
    return run_tasks(subject, request, names, load_tasks(names, request.data), num_fewshot)


def check_names(names: Sequence[str], data: Path | None) -> None:
    """Raises UserError for a task that lm-eval does not have; loads no data."""
    _find(names, data)


def load_tasks(names: Sequence[str], data: Path | None) -> list[Any]:
    """lm-eval's tasks with their data.

    Args:
        names: Tasks, groups or tags.
        data: A folder of task files to look in first, or a file of problems for ``gsm8k_cot``.

    Raises:
        UserError: For a name that does not exist, with a near one; or data that cannot be had.
    """
    manager, specs = _find(names, data)
    try:
        loaded = manager.load(specs)
    except Exception as error:
        raise UserError(
            f"lm_eval {', '.join(names)}: {offline_hint(error)}; or give task files of your own "
            "(--include_path), or --data for gsm8k_cot"
        ) from error
    groups = loaded.get("groups", {})
    inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    alone = [task for name, task in loaded["tasks"].items() if name not in inside]
    return [groups[name] for name in names if name in groups] + alone


def run_tasks(
    subject: Subject,
    request: Request,
    names: Sequence[str],
    tasks: Sequence[Any],
    num_fewshot: int | None = None,
) -> EvalResult:
    """As ``harness``, on tasks that are loaded."""
    start = time.perf_counter()
    lm = SubjectLM(subject)
    with in_mode(subject.model, training=False):
        try:
            found = lm_eval.simple_evaluate(
                model=lm,
                tasks=list(tasks),
                task_manager=TaskManager(include_defaults=False),  # another would read every task file again
                num_fewshot=num_fewshot,
                limit=request.limit,
                random_seed=request.seed,
                numpy_random_seed=request.seed,
                torch_random_seed=request.seed,
                fewshot_random_seed=request.seed,
            )
        except AssertionError as error:  # how lm-eval says that a setting cannot be
            raise UserError(f"lm_eval {', '.join(names)}: {' '.join(str(error).split())}") from error
    found = subject.processes.from_main(found)
    samples = found.pop("samples")
    if subject.processes.is_main and request.folder is not None:
        text = json.dumps(found, indent=2, default=handle_non_serializable, ensure_ascii=False)
        write_text(request.folder / "lm_eval.json", text + "\n")
    return _result(names, found, samples, sum(map(lm.n_cut, samples.values())), time.perf_counter() - start)


def _find(names: Sequence[str], data: Path | None) -> tuple[TaskManager, list[Any]]:
    """Who loads the tasks, and by what."""
    if data is not None and data.is_file():
        if list(names) != ["gsm8k_cot"]:
            raise UserError(
                f"--data={data}: a file holds problems for gsm8k_cot alone; for {', '.join(names)} give a "
                "folder of task files (--include_path)"
            )
        return TaskManager(include_defaults=False), [_local_gsm8k(data)]
    if data is not None and not data.is_dir():
        raise UserError(f"{data}: no such file or folder; give a folder of lm-eval task files")
    if data is not None:
        own = _manager(data, builtin=False)
        if set(names) <= set(own.all_subtasks):
            return own, list(names)
    manager = _manager(data, builtin=True)
    for name in names:
        if name not in manager.all_tasks:
            place = "" if data is None else f", and none in {data}"
            raise UserError(
                f"lm-eval has no task {name!r}{nearest(name, list(manager.all_tasks))}{place}; "
                "'lm_eval ls tasks' lists them"
            )
    return manager, list(names)


@functools.cache
def _manager(folder: Path | None, *, builtin: bool) -> TaskManager:
    """Reads the headers of all task files; the built-in ones take about ten seconds."""
    return TaskManager(include_path=None if folder is None else str(folder), include_defaults=builtin)


def _local_gsm8k(path: Path) -> dict[str, Any]:
    """lm-eval's own ``gsm8k_cot`` with another file's problems.

    No ``fewshot_split`` is set: beside it lm-eval would drop the eight worked examples without a word.
    """
    rows = list(file_rows(path, ("question", "answer")))
    for row in rows:
        if "####" not in row["answer"]:
            raise UserError(f"{path}: no '####' in the answer to {row['question'][:60]!r}; mend or remove it")
    if not rows:
        raise UserError(f"{path}: holds no problem; give GSM8K's test.jsonl")
    config = yaml.safe_load(_GSM8K_COT.read_text(encoding="utf-8"))
    for key in ("dataset_path", "dataset_name", "tag"):
        config.pop(key)
    return config | {"custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)}}


def _result(
    names: Sequence[str], found: Mapping[str, Any], samples: Mapping[str, Any], n_cut: int, seconds: float
) -> EvalResult:
    figures, n_without = _figures(found)
    first = next((name for name in names if any(task == name for task, _ in figures)), None)
    headline = next(key for key in figures if first is None or key[0] == first)
    several = len({task for task, _ in figures}) > 1
    labels = {key: f"{key[0]} {key[1]}" if several else key[1] for key in figures}
    return EvalResult(
        task="lm_eval " + ",".join(names),
        metric=labels[headline],
        figure=figures[headline],
        decoding=_how(found),
        seconds=seconds,
        samples=tuple(
            {"task": task, **json.loads(json.dumps(row, default=handle_non_serializable))}
            for task, rows in samples.items()
            for row in rows
        ),
        others={labels[key]: figure for key, figure in figures.items() if key != headline},
        counts={"prompts cut at the left to the model's context": n_cut}
        | ({"figures without a standard error, shown as 0": n_without} if n_without else {}),
    )


def _figures(found: Mapping[str, Any]) -> tuple[dict[tuple[str, str], Figure], int]:
    """Every metric by task and name, and how many have no standard error."""
    figures: dict[tuple[str, str], Figure] = {}
    n_without = 0
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            name, _, filter_name = key.partition(",")
            if not filter_name or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{name}_stderr,{filter_name}")
            has_error = isinstance(error, int | float)
            n_without += not has_error
            label = name if filter_name == "none" else key
            n = int(metrics.get("sample_len") or metrics.get("sample_count", {}).get(key) or 0)
            figures[task, label] = Figure(
                float(value), float(error) if has_error else 0.0, n, name.startswith(_SHARES)
            )
    return figures, n_without


def _how(found: Mapping[str, Any]) -> str:
    parts = [
        f"{task} version {found['versions'].get(task)}, {found['n-shot'].get(task, 0)}-shot"
        for task in found["configs"]
    ]
    shown = "; ".join(parts[:5]) + f"; and {len(parts) - 5} more" * (len(parts) > 5)
    return f"lm-eval {version('lm_eval')}: {shown}"
