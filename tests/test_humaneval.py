"""HumanEval: texts become programs, programs are run, passes are counted; bad files are named."""

import gzip
import json
import math
import shutil
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALONE, EMBEDDED, SHARED

from eval import eval_humaneval, evaluate_functional_correctness
from eval.benchmarks import execution
from eval.benchmarks.execution import Trial, run_trials
from eval.benchmarks.humaneval import (
    Problem,
    Sampling,
    check_k,
    estimate_pass,
    humaneval,
    pass_at_k,
    problem_prompt,
    read_problems,
    read_samples,
)
from eval.benchmarks.programs import completion_of, defines_function
from eval.engine.generation import Decoding
from eval.results import EvalResult
from eval.sandbox.outside import Limits, Outcome, Sandbox, find_sandbox
from eval.subject import Request, Subject
from eval.tasks import TASKS
from lora_one.errors import UserError
from lora_one.processes import Processes

REAL = SHARED / "data/humaneval/HumanEval.jsonl.gz"
AMPLE = Limits(cpu_seconds=60.0, wall_seconds=120.0)
HAND_MADE = [
    {
        "task_id": "Own/0",
        "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """ The sum.\n'
        '    >>> total([1, 2])\n    3\n    """\n',
        "entry_point": "total",
        "canonical_solution": "    result = 0\n    for x in xs:\n        result += x\n\n    return result\n",
        "test": "def check(candidate):\n    assert candidate([1, 2, 3]) == 6\n    assert not candidate([])\n",
    },
    {
        "task_id": "Own/1",
        "prompt": 'def double(x):\n    """Helper."""\n    return 2 * x\n\n\ndef text(x):\n'
        "    '''\n    Two lines.\n    '''\n",
        "entry_point": "text",
        "canonical_solution": '    form = """first {}\n```\n    last\n"""\n    # done\n'
        "    return form.format(double(x))\n",
        "test": "def check(candidate):\n    assert candidate(4) == 'first 8\\n```\\n    last\\n'\n",
    },
    {
        "task_id": "Own/2",
        "prompt": 'def smallest(xs):\n    import math\n    """Of none: infinity."""\n',
        "entry_point": "smallest",
        "canonical_solution": "    return min(xs, default=math.inf)",
        "test": "def check(candidate):\n    assert candidate([3, 1]) == 1\n"
        "    assert candidate([]) == float('inf')\n",
    },
]
WRAPPINGS = {
    "body": lambda whole, body, name: body,
    "body without its first indentation": lambda whole, body, name: body.strip(),
    "body whole": lambda whole, body, name: whole,
    "body and more": lambda whole, body, name: (
        body + f"\n\nprint({name}(input()))\n\n\nassert {name}() == 7\n"
    ),
    "fenced": lambda whole, body, name: f"```python\n{whole}\n```",
    "fenced without language": lambda whole, body, name: f"```\n{whole}\n```\n",
    "fenced body": lambda whole, body, name: f"```python\n{body}\n```\n",
    "fence not closed": lambda whole, body, name: f"Sure.\n```python\n{whole}\n",
    "prose around a fence": lambda whole, body, name: (
        f"Sure! From what I see, this is it:\n\n```python\n{whole}\n```\n\nIt is used like this:\n\n"
        f"```python\nprint({name}(input()))\n```\nDone"
    ),
    "prose around": lambda whole, body, name: (
        f"Here is the function you want:\n\n{whole}\n\nfrom this you see that it works.\nDone"
    ),
    "main block": lambda whole, body, name: (
        f"{whole}\n\nif __name__ == '__main__':\n    import doctest\n    doctest.testmod()\n    exit(1)\n"
    ),
    "imports before": lambda whole, body, name: (
        f"import re, sys\nfrom __future__ import annotations\n{whole}"
    ),
    "helper before and after": lambda whole, body, name: (
        f"```python\ndef before(): return 1\n\n{whole}\n\n@staticmethod\ndef after(): return 2\n```"
    ),
    "example before": lambda whole, body, name: f"{whole}\n\nresult = {name}(int(input()))\nprint(result)\n",
}


AFTER_THE_PROMPT = ("body", "body and more", "body whole", "main block", "fenced")


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    """Contained where that is possible; the programs of this file are harmless."""
    return find_sandbox(AMPLE, unsafe=True)


@pytest.fixture
def own_file(tmp_path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in HAND_MADE))
    return path


def run_all(sandbox: Sandbox, cases: list[tuple[str, str, str]], *, failing: bool = False) -> Outcome:
    """All in one process, because there are thousands; the error's text names those that go wrong."""
    test = textwrap.dedent(f"""
        import contextlib, io
        wrong = []
        for name, program, test in {cases!r}:
            scope = {{"__name__": "solution"}}
            try:
                exec(program, scope)
                exec(test, scope)
                ending = None
            except BaseException as error:
                ending = error
            if not (isinstance(ending, AssertionError) if {failing} else ending is None):
                wrong.append((name, repr(ending)))
        assert not wrong, wrong
    """)
    return sandbox.run("", test)


def cases_of(rows: list[dict[str, str]], *, continues: bool) -> dict[str, tuple[str, str, str]]:
    """Every different program of every wrapping."""
    programs = {}
    for row in rows:
        prompt, name, body = row["prompt"], row["entry_point"], row["canonical_solution"]
        for wrapping, wrap in WRAPPINGS.items():
            if continues and wrapping not in AFTER_THE_PROMPT:
                continue
            text = wrap(prompt + body, body, name)
            program = prompt + completion_of(text, prompt, name, continues=continues)
            test = f"{row['test']}\n\ncheck({name})\n"
            programs.setdefault(program, (f"{row['task_id']}, {wrapping}", program, test))
    return programs


@pytest.mark.parametrize("continues", [False, True])
def test_right_answers_stay_right_in_every_wrapping(sandbox, continues):
    plain = [row for row in HAND_MADE if "```" not in row["canonical_solution"]]
    assert run_all(sandbox, list(cases_of(plain, continues=continues).values())).detail == ""


@pytest.mark.parametrize("continues", [False, True])
def test_backticks_in_a_string_are_no_fence(continues):
    """Inside of a fence they cannot be told from its end."""
    (odd,) = [row for row in HAND_MADE if "```" in row["canonical_solution"]]
    for text in (odd["canonical_solution"], odd["prompt"] + odd["canonical_solution"]):
        completion = completion_of(text, odd["prompt"], odd["entry_point"], continues=continues)
        assert odd["canonical_solution"] in completion


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data/humaneval")
def test_real_solutions_stay_right_in_every_wrapping(sandbox):
    rows = [json.loads(line) for line in gzip.decompress(REAL.read_bytes()).splitlines()]
    assert len(rows) == 164
    cases = cases_of(rows, continues=False) | cases_of(rows, continues=True)
    assert len(cases) >= 2 * 164
    assert run_all(sandbox, list(cases.values())).state == "passed"


def test_wrong_answers_stay_wrong(sandbox):
    wrong = "    result = 1\n    for x in xs:\n        result += x\n    return result\n"
    row = HAND_MADE[0] | {"canonical_solution": wrong}
    cases = list((cases_of([row], continues=False) | cases_of([row], continues=True)).values())
    assert len(cases) >= 4
    assert run_all(sandbox, cases, failing=True).detail == ""


PROMPT = 'def f(x):\n    """Twice."""\n'


@pytest.mark.parametrize(
    ("text", "completion"),
    [
        ("    return 2 * x\n", "    return 2 * x\n"),
        ("\n    return 2 * x", "    return 2 * x\n"),
        ("return 2 * x", "    return 2 * x\n"),
        ("  y = x\n  return 2 * y", "      y = x\n      return 2 * y\n"),
        ("y = x\n    return 2 * y", "    y = x\n    return 2 * y\n"),
        ("\ty = x\n\treturn 2 * y", "    y = x\n    return 2 * y\n"),
        (
            "    if x:\n        return 2 * x\n    return 0\n\nThat is it.",
            "    if x:\n        return 2 * x\n    return 0\n",
        ),
        (
            "for y in [x]:\n        return 2 * y\n    return 0",
            "    for y in [x]:\n        return 2 * y\n    return 0\n",
        ),
        (
            "for y in [x]:\n    return 2 * y\nreturn 0",
            "    for y in [x]:\n        return 2 * y\n    return 0\n",
        ),
        ('    s = """a\nb"""\n    return s', '    s = """a\nb"""\n    return s\n'),
        (
            "    return g(x)\n\ndef g(x):\n    return 2 * x\n",
            "    return g(x)\n\ndef g(x):\n    return 2 * x\n",
        ),
        ("    return 2 * x\n\ndef f(x):\n    return 0\n", "    return 2 * x\n"),
        ("    return 2 * x\n```\nThis works.", "    return 2 * x\n"),
        ("I cannot do that.", "I cannot do that."),
        ("", ""),
        ("    # nothing", "    # nothing"),
    ],
)
def test_what_follows_a_bare_prompt(text, completion):
    found = completion_of(text, PROMPT, "f", continues=True)
    if completion.strip().startswith("y = x\n      return"):
        assert defines_function(PROMPT + found, "f")
    else:
        assert found == completion


@pytest.mark.parametrize(
    "after",
    [
        "Z = 0",
        "Y = 0\nZ = Y\nW = add(1, 'no')",
        "Y, Z = 1, -1\nZ += Y",
        "Z: int = 0\nadd.cache = {}\nassert add.cache",
        "def cached(f):\n    return lambda *xs: f(*xs)\nadd = cached(add)\nZ = 0\nresult = add(input())",
    ],
)
def test_what_a_function_needs_may_stand_after_it(after):
    body = "    result = a + b + Z\n    return result\n"
    prompt = "def add(a, b):\n    'The sum.'\n"
    for text in (f"{prompt}{body}\n{after}\n", f"So:\n```python\n{prompt}{body}\n{after}\n```\nDone."):
        names: dict[str, Any] = {}
        exec(prompt + completion_of(text, prompt, "add"), names)
        assert names["add"](1, 2) == 3
        assert hasattr(names["add"], "cache") == ("cache =" in after)
    continued = completion_of(f"{body}\n{after}\n", prompt, "add", continues=True)
    names = {}
    exec(prompt + continued, names)
    assert names["add"](1, 2) == 3


def test_the_last_version_counts_also_in_blocks_of_their_own():
    first, last = "def f(x):\n    return x\n", "def f(x):\n    return 2 * x\n"
    stub, call = "def f(x):\n    ...\n", "print(f(2))\n"
    for order in ([first, last], [first, last, call], [first, last, stub]):
        text = "\n\nor\n\n".join(f"```python\n{code}```" for code in order)
        assert completion_of(text, PROMPT, "f").strip() == last.strip()
        assert completion_of("\n".join(order[:2]), PROMPT, "f").strip().endswith(last.strip())
    bodies = "```python\n    return 2 * x\n```\n\nCall it:\n\n```python\nprint(f(2))\n```"
    assert completion_of(bodies, PROMPT, "f") == "    return 2 * x\n"


def test_texts_that_are_hard_to_parse_are_left_alone():
    for text in ("(" * 5000, "-" * 30000 + "x", "x" * 100_000, "\0", "\ud800", "    return '\ud800'"):
        assert isinstance(completion_of(text, PROMPT, "f"), str)


def test_the_last_complete_statement_of_a_cut_answer_counts():
    text = "```python\ndef f(x):\n    y = 2 * x\n    return y\n\ndef g(x):\n    return (x +"
    assert completion_of(text, PROMPT, "f").strip() == "def f(x):\n    y = 2 * x\n    return y"


def test_prompts_are_the_published_ones():
    problem = Problem(*(HAND_MADE[0][column] for column in ("task_id", "prompt", "entry_point", "test")))
    assert problem_prompt(problem, "completion") == problem.prompt
    asked = problem_prompt(problem, "alpaca")
    assert asked.startswith("Below is an instruction that describes a task. ")
    assert asked.endswith("\n\n### Response:\n")
    assert "Complete the following Python code" in asked
    assert problem.prompt.strip() in asked


@pytest.mark.parametrize(("n", "temperature"), [(1, 0.1), (10, 0.6), (100, 0.8), (200, 0.8)])
def test_published_temperatures(n, temperature):
    assert Sampling(n).decoding == Decoding(512, temperature, 0.95)
    assert Sampling(n, temperature=0.0).decoding == Decoding(512, 0.0, 1.0)


def exact(n: int, c: int, k: int) -> Fraction:
    return 1 - Fraction(math.comb(n - c, k), math.comb(n, k))


def test_pass_at_k_against_exact_combinatorics():
    for n in range(1, 16):
        for c in range(n + 1):
            for k in range(1, n + 1):
                assert estimate_pass(n, c, k) == pytest.approx(float(exact(n, c, k)), rel=1e-12, abs=1e-15)
    for n, c, k in [(200, 1, 100), (200, 3, 10), (1000, 500, 100), (5000, 2, 4000)]:
        assert estimate_pass(n, c, k) == pytest.approx(float(exact(n, c, k)), rel=1e-10)


def test_figures_by_hand():
    samples = [{"task_id": name} for name in "aabb"]
    outcomes = [Outcome(passed, "", "", 0.0) for passed in (True, False, False, False)]
    figures = pass_at_k(samples, outcomes, [1, 2])
    assert (figures["pass@1"].value, figures["pass@1"].n) == (0.25, 2)
    assert figures["pass@1"].standard_error == pytest.approx(0.25 / math.sqrt(2))
    assert figures["pass@2"].value == 0.5
    with pytest.raises(UserError, match="k=3: a has 2 samples; pass@k wants k or more of each"):
        check_k([1, 3], {"a": 2, "b": 5})


def answers(*rights: bool):
    """What a model would say: the hand-made solution where right, in a fence."""

    def generate(subject, prompts, decoding, request):
        texts = []
        for prompt, right in zip(prompts, rights, strict=True):
            row = next(row for row in HAND_MADE if row["prompt"].strip() in prompt)
            body = row["canonical_solution"] if right else "    return None"
            texts.append(
                f"```python\n{row['prompt']}{body}\n```".replace("\n```\n    last", "\n``\n    last")
            )
        return texts

    return generate


def test_the_benchmark_counts_and_keeps_everything(monkeypatch, own_file, tmp_path, sandbox):
    monkeypatch.setattr("eval.benchmarks.humaneval.generate", answers(True, False, True))
    monkeypatch.setattr("eval.benchmarks.humaneval.find_sandbox", lambda limits, unsafe: sandbox)
    subject = Subject(torch.nn.Identity(), None, ALONE)
    result = humaneval(subject, Request(own_file, folder=tmp_path))
    assert (result.metric, result.figure.n) == ("pass@1", 3)
    rows = [json.loads(line) for line in result.samples_jsonl().splitlines()]
    # Own/1 expects three backticks where the answer has two.
    assert [row["passed"] for row in rows] == [True, False, True]
    assert {"task_id", "completion", "generated", "passed", "result"} <= set(rows[0])
    assert result.counts == {"passed": 2, "failed: AssertionError": 1}
    assert "temperature 0.1, top_p 0.95" in result.decoding
    assert str(sandbox) in result.decoding
    # The caller has not written the result yet; the same command needs no program to run again.
    monkeypatch.setattr(Sandbox, "run", None)
    assert humaneval(subject, Request(own_file, folder=tmp_path)).samples == result.samples


def test_a_killed_evaluation_goes_on(tmp_path, sandbox, monkeypatch):
    trials = [Trial(f"t{i}", f"def f(): return {i % 3}", "assert f() == 1") for i in range(6)]
    kept = tmp_path / "executed.jsonl"
    outcomes = run_trials(trials, sandbox, kept, 2, shown=False)
    assert [outcome.passed for outcome in outcomes] == [i % 3 == 1 for i in range(6)]
    lines = kept.read_text().splitlines()
    assert len(lines) == 6
    kept.write_text("\n".join([*lines[:3], lines[3][:20]]))
    ran = []
    original = Sandbox.run
    monkeypatch.setattr(Sandbox, "run", lambda self, *a: ran.append(a) or original(self, *a))
    again = run_trials(trials, sandbox, kept, 2, shown=False)
    assert [(o.passed, o.state) for o in again] == [(o.passed, o.state) for o in outcomes]
    assert len(ran) == 3
    assert run_trials(trials, sandbox, kept, 2, shown=False) == again
    assert len(ran) == 3
    changed = [replace(trials[0], program="def f(): return 1"), *trials[1:]]
    assert run_trials(changed, sandbox, kept, 2, shown=False)[0].passed


class Pair(Processes):
    """One of two processes, as threads: what they agree on goes through ``box``."""

    def __init__(self, rank: int, meet: threading.Barrier, box: dict[int, Any]) -> None:
        super().__init__(rank, 2, torch.device("cpu"))
        object.__setattr__(self, "talk", (meet, box))

    def gather(self, rows: list[Any]) -> list[Any]:
        meet, box = self.talk
        box[self.rank] = rows
        meet.wait(30)
        both = box[0] + box[1]
        meet.wait(30)
        return both

    def from_main(self, value: Any) -> Any:
        return self.gather([value])[0]


def test_processes_share_the_programs(tmp_path, monkeypatch, sandbox):
    monkeypatch.setattr("eval.benchmarks.humaneval.generate", answers(True, False, True))
    monkeypatch.setattr("eval.benchmarks.humaneval.find_sandbox", lambda limits, unsafe: sandbox)
    data = write_lines(tmp_path / "problems.jsonl", *HAND_MADE)

    def evaluate() -> list[EvalResult]:
        meet, box = threading.Barrier(2), {}
        subjects = [Subject(torch.nn.Identity(), None, Pair(rank, meet, box)) for rank in (0, 1)]
        with ThreadPoolExecutor(2) as pool:
            return list(
                pool.map(lambda subject: humaneval(subject, Request(data, folder=tmp_path)), subjects)
            )

    first, second = evaluate()
    assert [row["passed"] for row in first.samples] == [True, False, True]
    assert first.samples == second.samples
    kept = [(tmp_path / name).read_text().splitlines() for name in ("executed.jsonl", "executed-1.jsonl")]
    assert [len(lines) for lines in kept] == [2, 1]
    # A later launch, of one process or of two, reads what all have kept.
    monkeypatch.setattr(Sandbox, "run", None)
    alone = humaneval(Subject(torch.nn.Identity(), None, ALONE), Request(data, folder=tmp_path))
    assert alone.samples == first.samples


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(execution, "cores", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert [execution._threads(None, 8), execution._threads(4, 8), execution._threads(None, 1)] == [2, 1, 16]


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"task_id": "Own/0", "completion": ""}, "{broken"], r"samples.jsonl, line 2: not valid JSON"),
        ([{"task_id": "Own/0"}], "samples.jsonl, line 1: no column 'completion'"),
        ([{"task_id": "Own/9", "completion": ""}], r"sample 1: no problem is called 'Own/9' \(did you mean"),
        ([{"task_id": "Own/1", "completion": ""}], r"2 of 3 problems have no sample \(Own/0, Own/2\)"),
    ],
)
def test_bad_sample_files_are_named(tmp_path, own_file, lines, words):
    path = write_lines(tmp_path / "samples.jsonl", *lines)
    with pytest.raises(UserError, match=words) as refused:
        read_samples(path, read_problems(own_file, None))
    assert "\n" not in str(refused.value)


def test_bad_problem_files_are_named(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(b"no gzip")
    for path, words in [
        (tmp_path / "none.jsonl", "no such data file"),
        (tmp_path / "x.jsonl.gz", "not a whole gzip file"),
        (write_lines(tmp_path / "empty.jsonl"), "holds no problems"),
        (write_lines(tmp_path / "twice.jsonl", HAND_MADE[0], HAND_MADE[0]), "Own/0 stands there twice"),
    ]:
        with pytest.raises(UserError, match=words):
            read_problems(path, None)


def test_compressed_problems_are_read(tmp_path, own_file):
    with own_file.open("rb") as source, gzip.open(tmp_path / "problems.jsonl.gz", "wb") as target:
        shutil.copyfileobj(source, target)
    assert read_problems(tmp_path / "problems.jsonl.gz", 2) == read_problems(own_file, None)[:2]


def test_both_published_programs(tmp_path, own_file, capsys):
    """With the embedded model, which knows no Python: the score is 0, the files are there."""
    where = [f"--data={own_file}", f"--output_dir={tmp_path}", "--limit=2"]
    short = [f"--model_name={EMBEDDED}", "--num_sample=2", "--temperature=0", "--max_new_tokens=8"]
    eval_humaneval.main([*where, *short])
    out = capsys.readouterr().out
    assert "greedy, alpaca prompt, 2 of each problem" in out
    samples = tmp_path / EMBEDDED.name / "humaneval" / "samples.jsonl"
    assert f"--sample_file={samples}" in out
    assert len(samples.read_text().splitlines()) == 4
    evaluate_functional_correctness.main(
        [f"--sample_file={samples}", "--k=1,2", f"--data={own_file}", "--limit=2", "--unsafe_execution"]
    )
    out = capsys.readouterr().out
    assert "| pass@2 | 0.00% ± 0.00% | 2 |" in out
    results = [json.loads(line) for line in Path(f"{samples}_results.jsonl").read_text().splitlines()]
    assert [row["passed"] for row in results] == [False] * 4
    with pytest.raises(UserError, match="k=3: Own/0 has 2 samples"):
        evaluate_functional_correctness.main(
            [f"--sample_file={samples}", "--k=3", f"--data={own_file}", "--limit=2", "--unsafe_execution"]
        )


@pytest.mark.parametrize("flag", ["--temperature=-1", "--top_p=0", "--timeout=0"])
def test_bad_flags_are_named(tmp_path, own_file, flag):
    with pytest.raises(UserError, match=flag.split("=")[0]):
        eval_humaneval.main(
            [f"--model_name={EMBEDDED}", f"--data={own_file}", f"--output_dir={tmp_path}", "--execute", flag]
        )


def test_programs_of_a_file(tmp_path, own_file, capsys, monkeypatch):
    """Reference solutions, and one whose text and error hold half a surrogate pair."""
    samples = [{"task_id": row["task_id"], "completion": row["canonical_solution"]} for row in HAND_MADE]
    odd = {"task_id": "Own/2", "completion": "    raise ValueError(chr(0xD83D))  # \ud83d"}
    file = write_lines(tmp_path / "samples.jsonl", *samples, odd)
    results, kept = Path(f"{file}_results.jsonl"), Path(f"{file}_executed.jsonl")
    command = [f"--sample_file={file}", f"--data={own_file}", "--unsafe_execution"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_functional_correctness, "write_text", lambda path, text: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate_functional_correctness.main(command)
    assert len(kept.read_text().splitlines()) == 4
    evaluate_functional_correctness.main(command)
    assert not kept.exists()
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["result"] for row in rows] == ["passed"] * 3 + ["failed: ValueError"]
    assert (rows[3]["detail"], rows[3]["completion"][-3:]) == ("?", "# ?")
    assert "| pass@1 | 83.33% ± 13.61% | 3 |" in capsys.readouterr().out


def test_a_run_knows_the_benchmark():
    """What a run does with those that it knows is tested with others."""
    assert TASKS["humaneval"] is humaneval


def test_a_run_refuses_before_it_trains(cli, monkeypatch, own_file):
    def refuse(limits, unsafe=False):
        raise UserError("generated programs cannot be contained on this machine (no)")

    monkeypatch.setattr("eval.tasks.find_sandbox", refuse)
    done = cli("debug=short", "eval.tasks=[humaneval]", f"+eval.data.humaneval={own_file}")
    assert (done.returncode, done.stdout.count("training")) == (2, 0)
    assert "cannot be contained" in done.stderr
