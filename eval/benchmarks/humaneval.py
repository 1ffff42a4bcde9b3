"""HumanEval: 164 functions to complete, each with tests (Chen et al. 2021, arXiv:2107.03374)."""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.benchmarks.execution import Trial, run_trials
from eval.benchmarks.programs import completion_of, defines_function
from eval.engine.generation import Decoding, generate
from eval.results import EvalResult, Figure, share
from eval.sandbox.outside import Limits, Outcome, Sandbox, find_sandbox, trial
from eval.subject import Request, Subject
from lora_one.data.rows import HubSource, Row, file_rows, hub_rows
from lora_one.data.specs import ALPACA_PROMPT
from lora_one.errors import UserError, nearest
from lora_one.processes import Processes

_HUB = HubSource("openai/openai_humaneval", "test")
_COLUMNS = ("task_id", "prompt", "entry_point", "test")
_INSTRUCTION = (
    "Complete the following Python code: write the whole function, with its signature, in one code block, "
    "and no tests or examples.\n\n```python\n{}\n```"
)
PUBLISHED_K = (1, 10, 100)


@dataclass(frozen=True)
class Problem:
    """One function to complete.

    Attributes:
        task_id: ``HumanEval/0`` …
        prompt: Imports, helpers, signature, docstring.
        entry_point: The function's name.
        test: Defines ``check(candidate)``.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str

    def trial(self, completion: str) -> Trial:
        """The program and its test."""
        return Trial(self.task_id, self.prompt + completion, f"{self.test}\n\ncheck({self.entry_point})\n")


@dataclass(frozen=True)
class Sampling:
    """How completions are made.

    Attributes:
        n: Samples of each problem.
        prompt: ``alpaca`` asks for the function, ``completion`` gives a base model the bare prompt.
        temperature: None: the papers' for that many samples.
        top_p: Where a temperature is not 0.
        max_new_tokens: Longest answer.
    """

    n: int = 1
    prompt: Literal["alpaca", "completion"] = "alpaca"
    temperature: float | None = None
    top_p: float = 0.95
    max_new_tokens: int = 512

    @property
    def decoding(self) -> Decoding:
        """As the generation wants it."""
        temperature = published_temperature(self.n) if self.temperature is None else self.temperature
        return Decoding(self.max_new_tokens, temperature, self.top_p if temperature else 1.0)

    def describe(self) -> str:
        """For the result."""
        return f"{self.decoding}, {self.prompt} prompt, {self.n} of each problem"


def published_temperature(n: int) -> float:
    """.1, .6 and .8 for pass@1, pass@10 and pass@100: more samples want more variety."""
    return 0.1 if n == 1 else 0.6 if n <= 10 else 0.8


def humaneval(subject: Subject, request: Request, sampling: Sampling = Sampling()) -> EvalResult:
    """Samples and runs them; refuses before it generates where programs cannot be contained."""
    return sample_and_run(subject, request, sampling, containment(subject, Limits()))


def containment(subject: Subject, limits: Limits, *, unsafe: bool = False) -> Sandbox:
    """Where programs will run: in the same way on all processes, as the result names one.

    Raises:
        UserError: If they cannot be contained, and ``unsafe`` does not say that they need not; or if
            what contains them for the main process does not work on this one's machine.
    """
    processes = subject.processes
    sandbox: Sandbox = processes.from_main(find_sandbox(limits, unsafe=unsafe) if processes.is_main else None)
    if not processes.is_main and (reason := trial(sandbox)) is not None:
        raise UserError(
            f"process {processes.rank}: programs cannot be {sandbox} ({reason}) as for the main process; "
            "run on machines that are alike"
        )
    return sandbox


def sample_and_run(
    subject: Subject,
    request: Request,
    sampling: Sampling,
    sandbox: Sandbox,
    workers: int | None = None,
) -> EvalResult:
    """pass@k of completions that are made now; the outcomes stay beside them in the request's folder.

    Args:
        subject: The model.
        request: Its data, limit and seed.
        sampling: How.
        sandbox: Where the programs run.
        workers: Programs side by side on a machine; None: as many as there are cores.
    """
    start = time.perf_counter()
    problems = read_problems(request.data, request.limit)
    samples = draw(subject, problems, request, sampling)
    kept = None if request.folder is None else request.folder / "executed.jsonl"
    ks, how = default_k(sampling.n), sampling.describe()
    return run_samples(problems, samples, sandbox, kept, ks, how, start, workers, subject.processes)


def sample_only(subject: Subject, request: Request, sampling: Sampling) -> EvalResult:
    """Completions without running any: how many are Python that defines the function."""
    start = time.perf_counter()
    problems = read_problems(request.data, request.limit)
    samples = draw(subject, problems, request, sampling)
    right = [
        defines_function(problem.prompt + sample["completion"], problem.entry_point)
        for problem, sample in zip(_repeated(problems, sampling.n), samples, strict=True)
    ]
    seconds = time.perf_counter() - start
    return EvalResult("humaneval", "defined", share(right), sampling.describe(), seconds, tuple(samples))


def draw(
    subject: Subject, problems: Sequence[Problem], request: Request, sampling: Sampling
) -> list[dict[str, Any]]:
    """``n`` samples of each problem, one after the other, in the form of HumanEval's own tools."""
    repeated = _repeated(problems, sampling.n)
    continues = sampling.prompt == "completion"
    prompts = [problem_prompt(problem, sampling.prompt) for problem in repeated]
    texts = generate(subject, prompts, sampling.decoding, request)
    return [
        {
            "task_id": problem.task_id,
            "completion": completion_of(text, problem.prompt, problem.entry_point, continues=continues),
            "generated": text,
        }
        for problem, text in zip(repeated, texts, strict=True)
    ]


def problem_prompt(problem: Problem, kind: str) -> str:
    """What the model reads."""
    return (
        problem.prompt
        if kind == "completion"
        else ALPACA_PROMPT.format(_INSTRUCTION.format(problem.prompt.strip()))
    )


def _repeated(problems: Sequence[Problem], n: int) -> list[Problem]:
    return [problem for problem in problems for _ in range(n)]


def read_problems(data: Path | None, limit: int | None) -> list[Problem]:
    """The problems, from a local ``.jsonl`` or ``.jsonl.gz`` file or from the Hub.

    Raises:
        UserError: If they cannot be read, or two are called the same.
    """
    problems: dict[str, Problem] = {}
    for row in _problem_rows(data):
        problem = Problem(**{column: row[column] for column in _COLUMNS})
        if problem.task_id in problems:
            raise UserError(f"{data or _HUB.path}: {problem.task_id} stands there twice; remove one")
        problems[problem.task_id] = problem
    if not problems:
        raise UserError(f"{data or _HUB.path}: holds no problems")
    return list(problems.values())[:limit]


def _problem_rows(data: Path | None) -> Iterator[Row]:
    if data is None:
        yield from hub_rows(_HUB, _COLUMNS, remedy="give --data=HumanEval.jsonl.gz")
    else:
        yield from file_rows(data, _COLUMNS)


def read_samples(path: Path, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """A file of samples, each with ``task_id`` and ``completion``.

    Raises:
        UserError: For a broken line, an unknown problem, or a problem without samples.
    """
    known = [problem.task_id for problem in problems]
    samples: list[dict[str, Any]] = []
    for row in file_rows(path, ("task_id", "completion"), ("generated",)):
        if row["task_id"] not in known:
            raise UserError(
                f"{path}, sample {len(samples) + 1}: no problem is called {row['task_id']!r}"
                f"{nearest(row['task_id'], known)}; give the --data that it was made from"
            )
        # As it will be run and written: half a surrogate pair is in no file's encoding.
        samples.append({name: text.encode("utf-8", "replace").decode() for name, text in row.items()})
    missing = [name for name in known if name not in {sample["task_id"] for sample in samples}]
    if missing:
        named = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise UserError(
            f"{path}: {len(missing)} of {len(known)} problems have no sample ({named}); add them, "
            "or give the --limit that the samples were made with"
        )
    return samples


def run_samples(
    problems: Sequence[Problem],
    samples: Sequence[dict[str, Any]],
    sandbox: Sandbox,
    kept: Path | None,
    ks: Sequence[int],
    how: str,
    start: float,
    workers: int | None = None,
    processes: Processes | None = None,
) -> EvalResult:
    """Runs every sample and counts.

    Args:
        problems: Those that the samples answer.
        samples: At least one of each.
        sandbox: Where.
        kept: File for outcomes, so that a killed evaluation goes on. It stays: whoever writes the
            result removes it then, or keeps it for the same command to end at once.
        ks: Which pass@k.
        how: How the samples were made.
        start: When the work began, by ``time.perf_counter``.
        workers: Programs side by side on a machine.
        processes: Who shares the work; None: this one does all.

    Raises:
        UserError: For a k that is larger than a problem's number of samples.
    """
    by_name = {problem.task_id: problem for problem in problems}
    check_k(ks, Counter(sample["task_id"] for sample in samples))
    trials = [by_name[sample["task_id"]].trial(sample["completion"]) for sample in samples]
    shown = processes is None or processes.is_main
    outcomes = run_trials(trials, sandbox, kept, workers, shown=shown, processes=processes)
    figures = pass_at_k(samples, outcomes, ks)
    headline = f"pass@{ks[0]}"
    judged = [
        {**sample, "passed": outcome.passed, "result": outcome.state, "detail": outcome.detail}
        for sample, outcome in zip(samples, outcomes, strict=True)
    ]
    return EvalResult(
        task="humaneval",
        metric=headline,
        figure=figures.pop(headline),
        decoding=f"{how}; {sandbox}",
        seconds=time.perf_counter() - start,
        samples=tuple(judged),
        others=figures,
        counts=dict(Counter(outcome.state for outcome in outcomes).most_common()),
    )


def default_k(n: int) -> list[int]:
    """The published values of k that ``n`` samples of a problem allow."""
    return [k for k in PUBLISHED_K if k <= n]


def check_k(ks: Sequence[int], counts: Mapping[str, int]) -> None:
    """Raises UserError for a k that some problem has too few samples for."""
    name, fewest = min(counts.items(), key=lambda item: item[1])
    for k in ks:
        if k > fewest:
            raise UserError(
                f"k={k}: {name} has {fewest} sample{'s' * (fewest > 1)}; pass@k wants k or more of each"
            )


def pass_at_k(
    samples: Sequence[Mapping[str, Any]], outcomes: Sequence[Outcome], ks: Sequence[int]
) -> dict[str, Figure]:
    """pass@k, each the mean of its estimates for the problems, with the standard error of that mean."""
    passed: dict[str, list[bool]] = {}
    for sample, outcome in zip(samples, outcomes, strict=True):
        passed.setdefault(sample["task_id"], []).append(outcome.passed)
    figures = {}
    for k in ks:
        estimates = [estimate_pass(len(row), sum(row), k) for row in passed.values()]
        n, mean = len(estimates), math.fsum(estimates) / len(estimates)
        spread = math.fsum((estimate - mean) ** 2 for estimate in estimates) / n
        # As of shares: with one sample of each problem the two agree.
        figures[f"pass@{k}"] = Figure(mean, math.sqrt(spread / n), n)
    return figures


def estimate_pass(n: int, c: int, k: int) -> float:
    """The chance that of ``k`` out of ``n`` samples, ``c`` of them right, one is right.

    ``1 − C(n−c, k) / C(n, k)``, unbiased (arXiv:2107.03374, eq. 1), as a product of factors
    below 1, because the binomials overflow.
    """
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))
