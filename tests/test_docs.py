"""The programs and commands of the docs, and PEFT's published quick start, with local names for the Hub's."""

import re
import shlex
import sys

import peft
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import EMBEDDED, ROOT, SHARED, run_program, run_script
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

PROGRAMS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "docs/library.md").read_text(), re.DOTALL | re.MULTILINE
)
TEXTS = [
    f"Tom has {i} apples and buys {j} more, so now he has {i + j} apples."
    for i in range(20)
    for j in range(9)
]
LAUNCHER = "accelerate.commands.launch"
SEED = SHARED / "seeds" / "peft_lora_ga_example.md"


@pytest.fixture
def gpt2(tmp_path):
    """A small GPT-2 with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def run(program: str, **names) -> dict:
    """Runs a program; what it leaves defined."""
    scope = {"__name__": "program", **names}
    exec(compile(program, "docs/library.md", "exec"), scope)
    return scope


def local(program: str, gpt2, tmp_path) -> str:
    replacements = {
        '"gpt2"': repr(str(gpt2)),
        'load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")["train"]': "TEXTS",
        '"./output"': repr(str(tmp_path / "output")),
        "num_train_epochs=3": "max_steps=3, report_to=[], use_cpu=True",
    }
    for published, ours in replacements.items():
        assert published in program, published
        program = program.replace(published, ours)
    return program


@pytest.mark.parametrize("method", ["lora_ga", "lora_one"])
def test_quick_start(method, gpt2, tmp_path):
    program = local(PROGRAMS[0], gpt2, tmp_path)
    if method == "lora_one":
        program = program.replace("preprocess_loraga", "preprocess_lora_one").replace("lora_ga", "lora_one")
        program = re.sub(
            r"LoraGAConfig(\(.*?\))?", lambda m: "LoraOneConfig" + ("()" if m[1] else ""), program
        )
    scope = run(program, TEXTS=Dataset.from_dict({"text": TEXTS}))
    travelled = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(gpt2), str(tmp_path / "output")
    ).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = scope["peft_model"].eval()(input_ids=ids).logits
        assert torch.allclose(travelled(input_ids=ids).logits, expected, atol=1e-4)
    assert travelled.peft_config["default"].r == (16 if method == "lora_ga" else 8)


def test_two_stages_with_a_quantised_model(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    LlamaForCausalLM.from_pretrained(EMBEDDED).save_pretrained(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    program = PROGRAMS[1].replace('"meta-llama/Llama-2-7b-hf"', repr(str(tmp_path / "llama")))
    program = program.replace(', device_map="auto"', "")
    ids = torch.arange(3, 60).view(3, 19)
    scope: dict = {}

    def train_step() -> None:
        scope["model"](input_ids=ids, labels=ids).loss.backward()

    scope["train_step"] = train_step
    exec(compile(program, "docs/library.md", "exec"), scope)
    assert (tmp_path / "loraga_gradients.safetensors").stat().st_size > 1000
    assert scope["peft_model"].init_report.shift == "adapter"


@pytest.mark.skipif(not SEED.exists(), reason="../shared/seeds is not here")
def test_pefts_published_quick_start_with_its_import_lines_and_names_changed(gpt2, tmp_path, monkeypatch):
    """As printed it feeds raw text; here the data comes tokenised, with labels."""
    program = re.search(r"^```python\n(.*?)^```", SEED.read_text(), re.DOTALL | re.MULTILINE)[1]
    replacements = {
        "from peft import LoraConfig, get_peft_model\n": "from lora_one import LoraConfig, get_peft_model\n",
        "from peft.tuners.lora import LoraGAConfig, preprocess_loraga\n": (
            "from lora_one import LoraGAConfig, preprocess_loraga\n"
        ),
        '"gpt2"': repr(str(gpt2)),
        'load_dataset("wikitext", "wikitext-2-raw-v1")': "TOKENISED",
    }
    for published, ours in replacements.items():
        assert published in program, published
        program = program.replace(published, ours)
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    rows = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=16)
    tokenised = Dataset.from_dict({"input_ids": rows["input_ids"], "labels": rows["input_ids"]}).with_format(
        "torch"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    before = AutoModelForCausalLM.from_pretrained(gpt2)
    scope = run(program, TOKENISED={"train": tokenised})
    travelled = PeftModel.from_pretrained(before, str(tmp_path / "output")).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = scope["peft_model"].eval()(input_ids=ids).logits
        assert torch.allclose(travelled(input_ids=ids).logits, expected, atol=1e-4)


def commands_of(page: str) -> list[list[str]]:
    return [
        shlex.split(line.strip(), comments=True)
        for block in re.findall(r"^ *```sh\n(.*?)^ *```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]


@pytest.mark.parametrize(
    "command", commands_of("docs/optimizers.md") + commands_of("docs/training.md"), ids=" ".join
)
def test_commands_on_optimizers_and_training(command, cli):
    assert command[:2] == ["python", "run_exp.py"]
    done = cli(*command[2:], "dry_run=true" if "-m" in command else "debug=short")  # a sweep takes minutes
    assert done.returncode == 0, done.stderr


def test_the_optimiser_in_a_script_of_ones_own(tmp_path):
    (program,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/optimizers.md").read_text(), re.DOTALL | re.MULTILINE
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(EMBEDDED), peft.LoraConfig(r=4))
    arguments = TrainingArguments(str(tmp_path), max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True)
    ids = torch.arange(3, 60).view(3, 19).tolist()
    scope = run(
        program,
        peft_model=model,
        training_arguments=arguments,
        dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        Trainer=Trainer,
    )
    scope["trainer"].train()
    assert scope["optimizer"].form == "symmetric"
    assert all(float(pair.B_OR.abs().max()) > 0 for pair in scope["optimizer"].pairs)


@pytest.mark.parametrize("command", commands_of("docs/gradients.md"), ids=" ".join)
def test_commands_on_gradients(command, cli, tmp_path):
    assert command[0] == "python"
    if command[1] == "run_exp.py":
        assert cli(*command[2:], "dry_run=true").returncode == 0
        return
    if command[1] == "scripts/compare_estimators.py":
        # That of the curves needs the runs of the line before: tests/test_compare_estimators.py.
        small = ["dataset.train_size=256"] if command[2] == "accuracy" else []
        done = run_script(*command[1:3], *small, *(command[3:] if small else [str(tmp_path)]))
        assert done.returncode == (0 if small else 2), done.stderr
        return
    assert cli("debug=short").returncode == 0
    arguments = [a.replace("results/", f"{tmp_path}/results/") for a in command[2:]]
    done = run_script(command[1], *arguments)
    assert done.returncode == 0, done.stderr
    assert "1 entries" in done.stdout


@pytest.mark.parametrize("command", commands_of("docs/scaling.md"), ids=" ".join)
def test_commands_on_scaling(command, cli, tmp_path):
    """Those on GPUs as far as their files and settings."""
    environment = dict([command[0].split("=", 1)]) if "=" in command[0] else {}
    program, *words = command[len(environment) :]
    if program == "python":
        done = run_script(*words, "--help")
        assert done.returncode == 0, done.stderr
        return
    script = words.index("run_exp.py")
    if program == "torchrun" or environment:
        module, own = (
            ("torch.distributed.run", [])
            if program == "torchrun"
            else (LAUNCHER, ["--main_process_port", "0"])
        )
        words = [word for word in words if word != "launch"]
        done = run_program(
            sys.executable,
            "-m",
            module,
            *own,
            *words,
            f"results_dir={tmp_path}",
            "eval.task=null",
            **environment,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert len(list(tmp_path.glob("*/record.json"))) == 1
        return
    file = words[words.index("--config_file") + 1]
    assert load_config_from_file(str(ROOT / file)).num_processes > 1
    done = cli(*words[script + 1 :], "dry_run=true")
    assert done.returncode == 0, done.stderr
