"""The program as people start it: runs, resumes, sweeps, launches, and mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import EMBEDDED, ROOT, SHARED, only_run, run_program
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_one.processes import start_processes
from lora_one.records import RunLock

SHORT = ("debug=short",)
LORA_ONE_COMMAND = (
    "-m ++dataset_name=meta_math model.epochs=1 model.eval_epochs=1 ++model.saving=true +init=gradient "
    "++peft.lora_r=8 +peft=all wandb.name=enter-name-here ++init.weight=stable peft.use_rslora=True "
    "peft.lora_alpha=16 ++init.stable_gamma=128 model.learning_rate=2e-4 ++seed=9 ++init.direction=LoRA-One"
).split()
COMMONSENSE_COMMAND = (
    "-m model.epochs=3 model.eval_epochs=3 ++model.saving=false model.real_batch_size=16 "
    "++dataset_name=commonsense_reasoning +init=gradient ++init.direction=LoRA-One ++init.max_length=256 "
    "++model.max_length=256 ++peft.lora_r=16 +peft=qv wandb.name=enter-name-here ++init.scale=stable "
    "peft.use_rslora=True peft.lora_alpha=16 ++peft.lora_dropout=0.05 ++init.stable_gamma=128 "
    "model.learning_rate=5e-5 ++seed=42"
).split()


def record_of(folder) -> dict:
    return json.loads((folder / "record.json").read_text())


def math_rows(n: int) -> list[dict[str, str]]:
    return [
        {
            "query": f"What is {i} + 2?",
            "response": f"{i} + 2 = {i + 2}\n#### {i + 2}\nThe answer is: {i + 2}",
            "type": "GSM_AnsAug",
        }
        for i in range(n)
    ]


def commonsense_rows(n: int) -> list[dict[str, str]]:
    return [
        {
            "instruction": f"Is {i} even? Answer true or false.",
            "input": "",
            "output": f"the correct answer is {str(i % 2 == 0).lower()}",
            "answer": str(i % 2 == 0).lower(),
        }
        for i in range(n)
    ]


@pytest.fixture
def math_file(tmp_path):
    path = tmp_path / "math.json"
    path.write_text(json.dumps(math_rows(60)))
    return f"dataset.train_file={path}"


@pytest.fixture
def commonsense_file(tmp_path):
    path = tmp_path / "commonsense.json"
    path.write_text(json.dumps(commonsense_rows(160)))
    return f"dataset.train_file={path}"


def test_a_run_leaves_everything_it_promises(cli, tmp_path):
    done = cli(*SHORT, "model.saving=true", "wandb.mode=offline")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model embedded/tiny_llama (the model of dataset tiny")
    folder = only_run(tmp_path)
    for name in ("config.yaml", "record.json", "metrics.jsonl", "plot.png", "adapter", "merged", "wandb"):
        assert (folder / name).exists(), name
    record = record_of(folder)
    assert record["status"] == "finished"
    assert set(record["stages"]) >= {"data", "model", "gradient", "init", "training", "export", "test"}
    assert record["metrics"]["test"]["n"] == 16
    assert record["gradient"]["n_examples"] == 8
    assert record["training"]["trainable_parameters"] > 0
    assert record["packages"]["peft"]
    assert record["model"]["fingerprint"]
    assert record["data"]["rows"] == {"train": 64, "validation": 16, "test": 16}
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [row["step"] for row in steps if "loss" in row] == [1, 2, 3]


def test_a_finished_run_is_left_alone(cli, tmp_path):
    cli(*SHORT)
    folder = only_run(tmp_path)
    before = (folder / "record.json").read_bytes()
    again = cli(*SHORT)
    assert again.returncode == 0
    assert "this run is finished, nothing to do" in again.stdout
    assert (folder / "record.json").read_bytes() == before


def test_a_finished_run_makes_only_the_new_output(cli, tmp_path):
    cli(*SHORT)
    folder = only_run(tmp_path)
    metrics = (folder / "metrics.jsonl").read_bytes()
    test = record_of(folder)["metrics"]["test"]
    again = cli(*SHORT, "model.saving=true", "eval.limit=8")
    assert again.returncode == 0, again.stderr
    assert only_run(tmp_path) == folder
    assert (folder / "merged" / "model.safetensors").exists()
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert record_of(folder)["metrics"]["test"]["n"] == 8
    assert record_of(folder)["status"] == "finished"
    assert test["n"] == 16


def test_a_finished_run_that_lost_its_adapter_says_so(cli, tmp_path):
    cli(*SHORT)
    shutil.rmtree(only_run(tmp_path) / "adapter")
    done = cli(*SHORT)
    assert done.returncode == 2
    assert "adapter: the run is finished but this is gone" in done.stderr


def test_a_new_output_that_fails_is_made_by_the_next_start(cli, tmp_path, monkeypatch):
    cli(*SHORT)
    with monkeypatch.context() as patch:
        patch.setattr("run_exp.grade", lambda *_: 1 / 0)
        assert cli(*SHORT, "eval.limit=8").returncode == 1
    folder = only_run(tmp_path)
    assert (record_of(folder)["status"], record_of(folder)["metrics"]["test"]["n"]) == ("finished", 16)
    assert cli(*SHORT, "eval.limit=8").returncode == 0
    assert record_of(folder)["metrics"]["test"]["n"] == 8


def test_full_fine_tuning_keeps_trained_weights_in_float32(cli, tmp_path):
    assert cli(*SHORT, "peft=full_ft", "model.bf16=true").returncode == 0
    merged = AutoModelForCausalLM.from_pretrained(only_run(tmp_path) / "merged")
    assert merged.dtype == torch.float32


def test_no_test_split_is_said(cli, math_file):
    done = cli(*SHORT, "dataset=meta_math", "model=tiny", math_file, "dataset.validation_size=8")
    assert "note: there is no test split, so nothing is tested" in done.stdout


@pytest.mark.parametrize(
    "method",
    [
        ("init=default",),
        ("init.direction=LoRA-One",),
        ("init.direction=LoRA-GA", "init.stable_gamma=16"),
        ("init.direction=ArBr", "peft.lora_dropout=0.1"),
    ],
    ids=lambda method: method[0],
)
def test_adapter_and_merged_model_are_stock(cli, tmp_path, method, tokenizer):
    assert cli(*SHORT, *method, "model.saving=true", "model.learning_rate=0.05").returncode == 0
    folder = only_run(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    inputs = tokenizer("Q: Ada has 3 boxes with 4 pens each.\nA: ", return_tensors="pt")
    with torch.no_grad():
        plain = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()(**inputs).logits
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged")(**inputs).logits
    assert (adapted - merged).norm() < 1e-4 * merged.norm()
    assert (adapted - plain).norm() > 1e-2 * plain.norm()
    assert (folder / "merged" / "tokenizer.json").exists()


def test_gradient_checkpointing_changes_nothing(cli, tmp_path):
    for flag in ("true", "false"):
        place = f"results_dir={tmp_path}/{flag}"  # it is the same run
        assert cli(*SHORT, f"gradient_checkpointing={flag}", place).returncode == 0
    losses = [record_of(path.parent)["metrics"]["validation_loss"] for path in tmp_path.rglob("record.json")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_full_fine_tuning_saves_its_weights(cli, tmp_path):
    done = cli(*SHORT, "peft=full_ft")
    assert done.returncode == 0, done.stderr
    assert "init is ignored" in done.stdout
    folder = only_run(tmp_path)
    record = record_of(folder)
    assert record["training"]["trainable_parameters"] == record["training"]["parameters"]
    assert (folder / "merged" / "model.safetensors").exists()
    assert not (folder / "adapter").exists()


def test_the_published_single_process_command(cli, tmp_path, math_file):
    done = cli(
        *LORA_ONE_COMMAND, "model=tiny", math_file, "dataset.validation_size=8", "dataset.train_size=null"
    )
    assert done.returncode == 0, done.stderr
    assert "init.weight was never read" in done.stderr
    folder = only_run(tmp_path)
    config = record_of(folder)["config"]
    assert config["init"]["direction"] == "LoRA-One"
    assert config["init"]["scale"] == "stable"
    assert config["dataset"]["name"] == "meta_math"
    assert config["seed"] == 9
    assert (folder / "merged" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_published_two_process_command(tmp_path, commonsense_file):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", "accelerate_config.yaml", "run_exp.py", *COMMONSENSE_COMMAND]
    command += ["model=tiny", commonsense_file, f"results_dir={tmp_path}/results", "model.max_steps=6"]
    done = run_program(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = only_run(tmp_path)
    record = record_of(folder)
    assert record["status"] == "finished"
    assert record["data"]["rows"]["validation"] == 120
    assert done.stdout.count("validation loss") >= 1
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 7


def test_more_processes_than_have_found_each_other_are_refused(cli, monkeypatch):
    start_processes()  # alone, whatever test comes first
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "_exit", sys.exit)
    done = cli(*SHORT)
    assert done.returncode == 2
    assert "the launcher started 2 processes but 1 found each other" in done.stderr


def test_jobs_of_a_sweep_do_not_disturb_each_other(cli, tmp_path):
    done = cli("-m", "init=default,gradient", "seed=0,1", "model.bf16=false,true", *SHORT)
    assert done.returncode == 0, done.stderr
    swept = {path.parent.name: record_of(path.parent) for path in tmp_path.rglob("record.json")}
    assert len(swept) == 8
    shutil.rmtree(tmp_path / "results")
    cli("init=gradient", "seed=1", "model.bf16=true", *SHORT)
    alone = record_of(only_run(tmp_path))
    assert alone["metrics"]["validation_loss"] == swept[alone["run_id"]]["metrics"]["validation_loss"]


def test_a_failed_job_does_not_stop_the_sweep(cli, tmp_path):
    done = cli("-m", "peft.lora_r=4,500", *SHORT)
    assert done.returncode == 2
    assert "peft.lora_r=500: is 500, but" in done.stderr
    assert "1 of 2 jobs failed" in done.stderr
    assert record_of(only_run(tmp_path))["status"] == "finished"


def test_dry_run_loads_and_writes_nothing(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("run_exp.load_model", lambda *_: pytest.fail("weights were loaded"))
    done = cli("dataset=meta_math", "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "model meta-llama/Llama-2-7b-hf (the model of dataset meta_math" in done.stdout
    plan = dict(line.split("  ", 1) for line in done.stdout.splitlines()[1:])
    plan = {name.strip(): value.strip() for name, value in plan.items()}
    assert plan["trainable parameters"] == "19,988,480 of 6,738,415,616 (0.30%)"
    assert plan["targets"].startswith("224 layers")
    assert plan["steps"].startswith("3,125 of 32 examples")
    assert plan["examples"] == "train 100,000, validation 1,000, test 1,319"
    assert not (tmp_path / "results").exists()


def test_dry_run_of_an_unknown_model_says_so(cli):
    done = cli("model=custom", "model.name=some/model", "dataset=gsm8k", "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "trainable parameters  unknown offline" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.lerning_rate=1"], "did you mean 'model.learning_rate'"),
        (["peft.lora_r=500"], "peft.lora_r=500: is 500, but"),
        (["init.direction=LoRA-GA", "peft.lora_r=90"], "needs 2r = 180 directions"),
        (["peft.lora_target_modules=[]"], "peft.lora_target_modules: the list is empty"),
        (["peft.lora_target_modules=[foo]"], "'foo' matches no linear layer; the model has: down_proj"),
        (["dataset.train_file=/none.jsonl"], "/none.jsonl: no such data file"),
        (["model=custom", "model.name=/none"], "model.name=/none: no such folder"),
        (["model=custom", "model.name=tests"], "the folder has no config.json"),
        (["model=custom", "model.name=some/model"], "model.name=some/model: "),
        (["dataset=gsm8k", "model=tiny"], "dataset openai/gsm8k (main): "),
        (["model.fp16=true"], "model.fp16=true: not on this device (cpu); use model.fp16=false"),
        (["model.fp16=true", "model.bf16=true"], "two number formats"),
        (["model.attn_implementation=flash"], "model.attn_implementation=flash: "),
        (["model.attn_implementation=flash_attention_2"], "model.attn_implementation=flash_attention_2: "),
        (["eval.during_training=true", "eval.task=null"], "eval.during_training: has no effect here"),
        (["model.max_tokens_per_device=64", "model.per_device_batch_size=4"], "two sizes of a micro-batch"),
        (["init.iters=5000"], "init.bsz*init.iters=5000: the training split has only 64"),
        (["model.max_length=4"], "no example has a target token within 4 tokens"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(cli, tmp_path, arguments, words):
    done = cli(*SHORT, *arguments)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("record.json"))


def test_model_folder_without_weights(cli, tmp_path):
    folder = tmp_path / "hollow"
    shutil.copytree(EMBEDDED, folder)
    (folder / "model.safetensors").unlink()
    done = cli(*SHORT, "model=custom", f"model.name={folder}")
    assert done.returncode == 2
    assert "the folder has no *.safetensors weights" in done.stderr


def test_bf16_is_refused_where_the_device_has_none(cli, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    done = cli(*SHORT, "model.bf16=true")
    assert done.returncode == 2
    assert "model.bf16=true: the device (cpu) has no bfloat16" in done.stderr


def test_a_place_that_cannot_be_written(cli):
    done = cli(*SHORT, "results_dir=/proc/none")
    assert done.returncode == 2
    assert "results_dir=/proc/none: cannot write there" in done.stderr


def test_a_damaged_record_is_named(cli, tmp_path):
    cli(*SHORT)
    (only_run(tmp_path) / "record.json").write_text('{"status": ')
    done = cli(*SHORT)
    assert done.returncode == 2
    assert "record.json: damaged" in done.stderr


def test_changed_data_is_noticed_on_resuming(cli, tmp_path, math_file):
    arguments = [*SHORT, "dataset=meta_math", "model=tiny", math_file, "dataset.validation_size=8"]
    cli(*arguments)
    folder = only_run(tmp_path / "results")
    record = record_of(folder) | {"status": "running"}
    (folder / "record.json").write_text(json.dumps(record))
    (tmp_path / "math.json").write_text(json.dumps(math_rows(59)))
    for _ in range(2):
        done = cli(*arguments)
        assert done.returncode == 2
        assert "the data has changed since this run began" in done.stderr
    assert (folder / "adapter").exists()


def test_a_failure_while_training_is_recorded(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_one.training.weighted_loss", lambda *_: 1 / 0)
    done = cli(*SHORT)
    assert done.returncode == 1
    record = record_of(only_run(tmp_path))
    assert record["status"] == "failed"
    assert "division by zero" in record["error"]


def test_two_programs_in_one_run_folder_are_refused(cli, tmp_path):
    cli(*SHORT)
    folder = only_run(tmp_path)
    lock = RunLock(folder)
    done = cli(*SHORT)
    sweep = cli("-m", *SHORT, "model.learning_rate=1e-3,-1")
    lock.release()
    assert done.returncode == 76
    assert f"this run is being made by process {os.getpid()}" in done.stderr
    assert sweep.returncode == 2  # bad input in a sweep counts for more


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_bits(tmp_path):
    command = [sys.executable, "run_exp.py", *SHORT, f"results_dir={tmp_path}/results"]
    command += ["model.max_steps=150", "model.save_steps=5", "init.direction=LoRA-GA", "init.stable_gamma=16"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 120
        while (
            not list(tmp_path.rglob("checkpoints/checkpoint-*/trainer_state.json"))
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
    assert first.returncode == -signal.SIGKILL
    resumed = run_program(*command)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "(resuming)" in resumed.stdout
    folder = only_run(tmp_path)
    record = record_of(folder)
    assert record["status"] == "finished"
    assert record["training"]["resumed_from_step"] >= 5
    assert "gradient" in record["stages"]
    shutil.move(folder, tmp_path / "resumed")
    whole = run_program(*command)
    assert whole.returncode == 0
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/models and ../shared/data")
def test_real_model_on_real_data(cli, tmp_path):
    data = SHARED / "data" / "gsm8k"
    done = cli(
        "dataset=gsm8k",
        "model=custom",
        f"model.name={SHARED}/models/stories260K",
        f"dataset.train_file={data}/train.jsonl",
        f"dataset.test_file={data}/test.jsonl",
        "model.max_steps=5",
        "model.real_batch_size=8",
        "dataset.train_size=400",
        "dataset.validation_size=16",
        "eval.limit=4",
        "eval.max_new_tokens=32",
        "wandb.mode=disabled",
    )
    assert done.returncode == 0, done.stderr
    record = record_of(only_run(tmp_path))
    assert record["metrics"]["test"]["n"] == 4
    assert record["data"]["rows"]["test"] == 1319


@pytest.mark.slow
def test_the_embedded_default_learns_to_reason(tmp_path):
    done = run_program(sys.executable, "run_exp.py", f"results_dir={tmp_path}/results", timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = record_of(only_run(tmp_path))["metrics"]
    assert metrics["test"]["n"] >= 500
    assert metrics["test_before"]["value"] < 0.10
    assert metrics["test"]["value"] > 0.60
