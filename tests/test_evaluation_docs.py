"""Every command of docs/evaluation.md runs, on the embedded model and on a few rows of each benchmark's form.

What the page leaves to the Hub gets local files here; the judge, the published ``lm_eval`` command and the
benchmark have tests of their own.
"""

import csv
import importlib
import json
import re
import shlex
import sys

import pytest
from conftest import EMBEDDED, ROOT, run_program, save_small_t5
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from eval.benchmarks.mmlu_subjects import SUBJECTS
from eval.command import run_program as run_main
from lora_one.data.tiny import problems

PAGE = (ROOT / "docs/evaluation.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
ELSEWHERE = ("eval/judge_mt_bench.py", "lm_eval --model", "scripts/bench_eval.py", "--include_path")
OWN = [line for line in COMMANDS if not any(word in line for word in ELSEWHERE)]
# A few items, briefly; and data where the page means the Hub's.
BRIEF = {
    "eval_gsm8k": ("--limit=2", "--max_new_tokens=8"),
    "commonsense_evaluate": ("--limit=2",),
    "eval_humaneval": ("--limit=1", "--max_new_tokens=8"),
    "eval_mmlu": ("--limit=3",),
    "eval_glue": ("--limit=2",),
    "eval_mt_bench": ("--limit=1", "--max_new_tokens=4"),
    "eval_harness": ("--limit=1",),
}
DATA = {
    "eval_gsm8k": "test.jsonl",
    "eval_humaneval": "humaneval.jsonl",
    "eval_mmlu": "mmlu",
    "eval_harness": "test.jsonl",
}
FUNCTION = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_table(path, rows, **settings):
    with path.open("w", newline="") as file:
        csv.writer(file, **settings).writerows(rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What ``path/to/`` stands for."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("base", "merged", "model"):
        (folder / name).symlink_to(EMBEDDED)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    save_small_t5(folder / "t5-base", tokenizer)
    for name, auto, task in (
        ("base", AutoModelForCausalLM, TaskType.CAUSAL_LM),
        ("t5-base", AutoModelForSeq2SeqLM, TaskType.SEQ_2_SEQ_LM),
    ):
        model = auto.from_pretrained(folder / name)
        config = LoraConfig(r=2, target_modules="all-linear", task_type=task, init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder / f"adapter-{name}")
    jsonl(folder / "test.jsonl", problems("test", 2))
    jsonl(folder / "train.jsonl", problems("train", 64))
    jsonl(folder / "humaneval.jsonl", [FUNCTION])
    jsonl(
        folder / "question.jsonl",
        [{"question_id": 81, "category": "math", "turns": ["1 + 1?", "And 2 + 2?"]}],
    )
    for index, word in enumerate(
        ("true", "solution1", "answer1", "ending1", "option1", "answer2", "answer3", "answer4")
    ):
        name = (
            "boolq",
            "piqa",
            "social_i_qa",
            "hellaswag",
            "winogrande",
            "ARC-Challenge",
            "ARC-Easy",
            "openbookqa",
        )[index]
        (folder / "dataset" / name).mkdir(parents=True)
        row = {
            "instruction": "Which?",
            "input": "",
            "output": f"the correct answer is {word}",
            "answer": word,
        }
        (folder / "dataset" / name / "test.json").write_text(json.dumps([row, row]))
    for split, n in (("dev", 5), ("test", 1)):
        (folder / "mmlu" / split).mkdir(parents=True)
        for subject in SUBJECTS:
            write_table(folder / "mmlu" / split / f"{subject}_{split}.csv", [["Which?", *"wxyz", "B"]] * n)
    lines = [
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "1\t1\t2\tA dog.\tOne dog.",
        "0\t3\t4\tA dog.\tA cat.",
    ]
    (folder / "dev.tsv").write_text("\n".join(lines) + "\n")
    jsonl(folder / "sst2.jsonl", [{"sentence": "good", "label": 1}, {"sentence": "bad", "label": 0}])
    return folder


def here(line: str, place) -> list[str]:
    """The command's words with this test's files."""
    kind = "t5-base" if "t5-base" in line else "base"
    line = line.replace("path/to/adapter", f"path/to/adapter-{kind}").replace("path/to/", f"{place}/")
    line = re.sub(r"(?<=[ =])dataset(?=$| )", f"{place}/dataset", line)
    return shlex.split(line, comments=True)


def run_here(program: str, arguments: list[str], monkeypatch) -> int:
    monkeypatch.setenv("WANDB_MODE", "offline")
    module = importlib.import_module(f"eval.{program}")
    with pytest.raises(SystemExit) as exited:
        run_main(module.main, arguments)
    return exited.value.code


@pytest.mark.parametrize("line", [line for line in OWN if line.startswith("python eval/")])
def test_programs_run(line, place, tmp_path, monkeypatch, capfd):
    _, script, *arguments = here(line, place)
    program = script.removeprefix("eval/").removesuffix(".py")
    if program == "evaluate_functional_correctness":
        jsonl(tmp_path / "samples.jsonl", [{"task_id": "HumanEval/0", "completion": "    return x + x\n"}])
        arguments = [f"--sample_file={tmp_path}/samples.jsonl", "--k=1", f"--data={place}/humaneval.jsonl"]
        code = run_here(program, [*arguments, "--unsafe_execution"], monkeypatch)
    else:
        arguments = [a for a in arguments if not re.match(r"--(limit|bf16)", a)]
        if program in DATA and not any(a.startswith("--data") for a in arguments):
            arguments.append(f"--data={place}/{DATA[program]}")
        if "--task=sst2" in arguments:
            arguments.append(f"--data={place}/sst2.jsonl")
        arguments += [f"--output_dir={tmp_path}", *BRIEF[program]]
        arguments += ["--decoding=greedy"] * (program == "commonsense_evaluate")
        arguments += ["--unsafe_execution"] * ("--execute" in arguments)
        code = run_here(program, arguments, monkeypatch)
    out, err = capfd.readouterr()
    if "--backend=vllm" in arguments:
        assert (code, "--backend vllm: " in err) == (2, True)
        return
    assert code == 0, err
    assert "| figure | value |" in out or "pass@1" in out


@pytest.mark.parametrize("line", [line for line in OWN if line.startswith("python run_exp.py")])
def test_runs_with_benchmarks(line, place, cli, tmp_path):
    arguments = [a.replace("dataset=commonsense_reasoning", "dataset=tiny") for a in here(line, place)[2:]]
    done = cli(*arguments, "debug=short", "model.max_steps=1", "eval.limit=1", "eval.task=null")
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "results").rglob("record.json")
    assert len(json.loads(record.read_text())["metrics"]) == 2  # the validation loss, and the benchmark


def test_several_processes(place, tmp_path):
    line = next(line for line in OWN if line.startswith("accelerate launch"))
    words = here(line, place)[2:]
    words += [f"--data={place}/test.jsonl", "--max_new_tokens=4", f"--output_dir={tmp_path}"]
    done = run_program(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("exact_match") == 1


def test_every_command_is_one_of_these():
    known = [line for line in OWN if re.match(r"python (eval/|run_exp.py)|accelerate launch", line)]
    assert known == OWN
    assert len(COMMANDS) - len(OWN) == 4
