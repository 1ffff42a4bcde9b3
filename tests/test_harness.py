"""lm-eval's tasks on loaded models, and the published command on a merged folder."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ALONE, EMBEDDED, SHARED, on_two_processes, only_run, run_program
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
import lm_eval
from lm_eval.tasks import TaskManager

from eval import eval_harness
from eval.benchmarks import harness
from eval.command import run_program as run_main
from eval.subject import Request, Subject
from eval.tasks import check_benchmarks, find_task
from lora_one.data.tiny import problems
from lora_one.errors import UserError
from lora_one.processes import start_processes

TASK = """
task: numbers
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
metadata:
  version: 2.0
"""
N = 7


def items() -> list[dict]:
    rows = problems("test", N)
    golds = [row["answer"] for row in rows]
    return [
        {"question": row["question"], "choices": [golds[i], golds[(i + 1) % N], "no idea"], "label": 0}
        for i, row in enumerate(rows)
    ]


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task file of one's own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in items()))
    (folder / "numbers.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.fixture
def gsm8k(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    rows = [{"question": "What is 1 + 1?", "answer": "Easy.\n#### 2"}]
    rows += [{"question": "What is 1000 + 1000?", "answer": "#### 2,000"}] * 2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def subject():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    return Subject(AutoModelForCausalLM.from_pretrained(EMBEDDED), tokenizer, ALONE)


@pytest.fixture
def few_builtin(monkeypatch):
    """Reading all built-in task files takes ten seconds; two of their folders will do."""
    folders = [Path(lm_eval.__file__).parent / "tasks" / name for name in ("gsm8k", "arc")]

    def manager(folder, *, builtin):
        own = [] if folder is None else [folder]
        return TaskManager(include_path=[*folders, *own] if builtin else own, include_defaults=False)

    monkeypatch.setattr(harness, "_manager", manager)


@pytest.fixture
def program(capsys):
    """Runs the program in this process; its exit code, output and last error line."""

    def call(*arguments):
        with pytest.raises(SystemExit) as exited:
            run_main(eval_harness.main, [str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return exited.value.code, out, err.strip().splitlines()[-1] if err.strip() else ""

    return call


def likelihood(model, tokenizer, context: str, choice: str) -> float:
    before = tokenizer(context)["input_ids"]
    start = len(before)
    # As lm-eval cuts a pair; this tokenizer has ": " as one token, which therefore loses its space.
    ids = before + tokenizer(f"{context} {choice}")["input_ids"][start:]
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logs[place - 1, ids[place]]) for place in range(start, len(ids)))


def test_a_task_of_ones_own_is_graded_by_likelihood(subject, tasks, tmp_path):
    result = harness.harness(subject, Request(tasks, folder=tmp_path), ["numbers"])
    right = []
    for item, sample in zip(items(), result.samples, strict=True):
        context = f"Q: {item['question']}\nA:"
        ours = [likelihood(subject.model, subject.tokenizer, context, c) for c in item["choices"]]
        theirs = [float(response[0][0]) for response in sample["resps"]]
        assert theirs == pytest.approx(ours, abs=1e-3)
        right.append(ours.index(max(ours)) == 0)
    assert result.figure.value == pytest.approx(sum(right) / N)
    share = result.figure.value
    assert result.figure.standard_error == pytest.approx((share * (1 - share) / (N - 1)) ** 0.5)
    assert (result.metric, result.figure.n) == ("acc", N)
    assert "numbers version 2.0, 0-shot" in result.decoding
    whole = json.loads((tmp_path / "lm_eval.json").read_text())
    assert whole["versions"] == {"numbers": 2.0}
    assert whole["results"]["numbers"]["acc,none"] == share


def test_gsm8k_cot_has_its_eight_worked_examples_and_both_filters(subject, gsm8k, monkeypatch):
    replies = {"1 + 1": " It is 2. The answer is 2.", "1000": " The answer is 2000, or 7."}

    def generate_until(self, requests, **_):
        asked = [request.args[0].rsplit("Q:", 1)[1] for request in requests]
        return [next(reply for key, reply in replies.items() if key in text) for text in asked]

    monkeypatch.setattr(harness.SubjectLM, "generate_until", generate_until)
    result = harness.harness(subject, Request(gsm8k), ["gsm8k_cot"])
    # The gold answer 2,000 is 2000; the last number of that reply is 7.
    assert (result.metric, result.figure.value, result.figure.n) == ("exact_match,strict-match", 1.0, 3)
    assert result.others["exact_match,flexible-extract"].value == pytest.approx(1 / 3)
    assert "gsm8k_cot version 3.0, 8-shot" in result.decoding
    prompt, settings = result.samples[0]["arguments"][0]
    assert prompt.startswith("Q: There are 15 trees in the grove.")
    assert prompt.count("Q:") == prompt.count("\nA:") == 9
    assert prompt.count("The answer is") == 8
    assert prompt.endswith("Q: What is 1 + 1?\nA:")
    assert (settings["do_sample"], "Q:" in settings["until"]) == (False, True)
    two = harness.harness(subject, Request(gsm8k, limit=1), ["gsm8k_cot"], num_fewshot=2)
    assert two.samples[0]["arguments"][0][0].count("Q:") == 3
    assert two.figure.n == 1
    assert two.counts["figures without a standard error, shown as 0"] == 2


def test_prompts_that_the_context_does_not_hold_are_counted(subject, gsm8k, tasks):
    lm = harness.SubjectLM(subject)
    assert lm.max_length == 512
    text = "a b c d " * 70
    assert 256 < len(lm.tok_encode(text)) < 512
    rows = [{"filter": "x", "arguments": [(text, {"max_gen_toks": size})]} for size in (64, 256, 500)]
    assert lm.n_cut(rows) == 2
    assert lm.n_cut([{"filter": "x", "arguments": [(text, " yes"), (text * 2, " yes")]}]) == 1


def test_a_trained_head_keeps_its_own_weights(subject, tasks):
    settings = LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"]
    )
    model = get_peft_model(subject.model, settings).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
        before = model(input_ids=ids).logits
        result = harness.harness(Subject(model, subject.tokenizer, ALONE), Request(tasks), ["numbers"])
        assert torch.equal(model(input_ids=ids).logits, before)
    assert result.figure.n == N


def test_the_program_and_what_it_leaves(program, gsm8k, tmp_path):
    flags = ["--model_name=embedded/tiny_llama", f"--output_dir={tmp_path}/out", "--limit=2"]
    code, out, _ = program("--tasks=gsm8k_cot", f"--data={gsm8k}", *flags)
    assert code == 0
    (record,) = tmp_path.rglob("result.json")
    assert json.loads(record.read_text())["n"] == 2
    assert "| exact_match,flexible-extract |" in out
    assert "2 prompts cut at the left to the model's context" in out
    assert len((record.parent / "samples.jsonl").read_text().splitlines()) == 4  # two filters
    assert "results" in json.loads((record.parent / "lm_eval.json").read_text())


def test_bad_input_is_one_line_before_the_model_is_read(program, gsm8k, tasks, tmp_path, few_builtin):
    lacking = tmp_path / "lacking.jsonl"
    lacking.write_text('{"question": "1?", "answer": "#### 1"}\n{"question": "2?"}\n')
    no_number = tmp_path / "no_number.jsonl"
    no_number.write_text('{"question": "1?", "answer": "one"}\n')
    model = "--model_name=/none"
    cases = [
        (["--tasks=gsm8k_cto"], "no task 'gsm8k_cto' (did you mean 'gsm8k_cot'?)"),
        (
            ["--tasks=nambers", f"--include_path={tasks}"],
            "no task 'nambers' (did you mean 'numbers'?), and none in",
        ),
        (["--tasks=gsm8k_cot", f"--data={lacking}"], "lacking.jsonl, line 2: no column 'answer'"),
        (["--tasks=gsm8k_cot", f"--data={no_number}"], "no '####' in the answer to '1?'"),
        (["--tasks=arc_easy", f"--data={gsm8k}"], "a file holds problems for gsm8k_cot alone"),
        (["--tasks=gsm8k_cot", "--data=/none.jsonl"], "--data=/none.jsonl: no such file"),
        (["--tasks=numbers", f"--include_path={tasks}", f"--data={gsm8k}"], "give one of them"),
        (["--tasks=numbers", "--num_fewshot=-1"], "--num_fewshot=-1: must be at least 0"),
        (["--tasks=,"], "--tasks: names no task"),
        (["--tasks=arc_easy"], "lm_eval arc_easy: the Hugging Face Hub cannot be reached"),
        (["--tasks=gsm8k_cot", f"--data={gsm8k}"], "model.name=/none: no such folder"),
    ]
    for flags, words in cases:
        code, _, error = program(model, *flags)
        assert (code, error.startswith("error: ")) == (2, True), (flags, error)
        assert words in error


def test_more_examples_than_there_are(program, gsm8k, tmp_path):
    flags = ["--model_name=embedded/tiny_llama", f"--output_dir={tmp_path}"]
    code, _, error = program("--tasks=gsm8k_cot", f"--data={gsm8k}", "--num_fewshot=9", *flags)
    assert code == 2
    assert error == "error: " + error.removeprefix("error: ")
    assert "exceeds the 8 that are available" in error


def test_names_of_benchmarks(few_builtin, tasks):
    check_benchmarks(["gsm8k", "lm_eval/gsm8k_cot", "lm_eval/numbers"], {"lm_eval/numbers": str(tasks)})
    with pytest.raises(UserError, match=r"no task 'arc_esay' \(did you mean 'arc_easy'"):
        check_benchmarks(["lm_eval/arc_esay"], {})
    with pytest.raises(UserError, match=r"there are gsm8k, .*and lm_eval/NAME"):
        find_task("gsm8k_cot")
    with pytest.raises(UserError, match=r"eval.data.lm_eval/numbers=/none: no such"):
        check_benchmarks(["lm_eval/numbers"], {"lm_eval/numbers": "/none"})


def share_between_two(folder: str) -> None:
    processes = start_processes()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    shared = Subject(AutoModelForCausalLM.from_pretrained(EMBEDDED), tokenizer, processes)
    result = harness.harness(shared, Request(Path(folder)), ["numbers"])
    own = json.dumps([result.figure.value, sorted(row["doc_id"] for row in result.samples)])
    (Path(folder) / f"{processes.rank}.json").write_text(own)


def test_two_processes_share_an_odd_number_of_items(subject, tasks):
    on_two_processes(share_between_two, str(tasks))
    alone = harness.harness(subject, Request(tasks), ["numbers"])
    for rank in (0, 1):
        assert json.loads((tasks / f"{rank}.json").read_text()) == [alone.figure.value, list(range(N))]


@pytest.mark.slow
def test_the_published_command_on_a_merged_folder(cli, tasks, tmp_path):
    """It scores what the adapter scored that was not merged; its scan of all tasks takes ten seconds."""
    name = "lm_eval/numbers"
    short = ["debug=short", "eval.task=null", "model.saving=true", f"eval.tasks=[{name}]"]
    done = cli(*short, f"eval.data={{{name}:{tasks}}}")
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path / "results")
    figure = json.loads((run / "record.json").read_text())["metrics"][name]
    rows = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
    assert (figure["n"], len(rows)) == (N, N)
    command = ["--model", "hf", "--model_args", f"pretrained={run}/merged", "--tasks", "numbers"]
    command += ["--include_path", str(tasks), "--batch_size", "auto", "--device", "cpu", "--log_samples"]
    lm_eval_program = str(Path(sys.executable).with_name("lm_eval"))
    published = run_program(
        lm_eval_program, *command, "--output_path", f"{tmp_path}/theirs", HF_HOME=str(tmp_path / "hf")
    )
    assert published.returncode == 0, published.stderr
    (found,) = (tmp_path / "theirs").rglob("results_*.json")
    assert json.loads(found.read_text())["results"]["numbers"]["acc,none"] == figure["value"]
    (samples,) = (tmp_path / "theirs").rglob("samples_*.jsonl")
    for line in samples.read_text().splitlines():
        theirs = json.loads(line)
        ours = next(row for row in rows if row["doc_id"] == theirs["doc_id"])
        numbers = [[float(response[0][0]) for response in row["resps"]] for row in (theirs, ours)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-3)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/gsm8k")
def test_the_real_gsm8k_file(subject):
    (task,) = harness.load_tasks(["gsm8k_cot"], SHARED / "data" / "gsm8k" / "test.jsonl")
    assert len(task.eval_docs) == 1319
    assert task.doc_to_target(task.eval_docs[0]) == "18"
