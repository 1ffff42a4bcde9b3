"""The tables' experiment files: composed, checked, planned with the real models, run on small ones."""

import json
import re
import shlex
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from conftest import ALONE, EMBEDDED, only_run, save_small_t5
from test_config import parse
from test_data import gsm8k_rows, write_jsonl

import run_exp
from eval.tasks import find_task
from lora_one.config import ExperimentConfig, result_settings
from lora_one.errors import UserError
from lora_one.experiments import CONF_DIR, command_of, compose_experiment
from lora_one.models import empty_model
from lora_one.plan import describe_plan
from lora_one.published import read_tables
from lora_one.records import run_id
from lora_one.runs import Run

TABLES = read_tables()
FOLDER = CONF_DIR / "experiment"
FILES = {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in FOLDER.glob("*/*.yaml")}
ROWS = sorted(name for name in FILES if not name.endswith("/base"))


@cache
def composed(name: str) -> ExperimentConfig:
    return compose_experiment(name)


def uses(file: str) -> list[tuple]:
    """Table, line, column and experiment of every cell that a file makes."""
    return [
        (table, line, column, line.experiments[column.name])
        for table in TABLES.values()
        for line in table.lines
        for column in table.columns
        if line.experiments.get(column.name, "").split(" ")[0] == file
    ]


def test_files_and_tables_belong_together():
    """A base is composed with every row that names it."""
    shared = {path for name, path in FILES.items() if name.endswith("/base")}
    rows = "".join(FILES[name].read_text() for name in ROWS)
    assert all(f"- /experiment/{path.parent.name}/base\n" in rows for path in shared)
    named = {text.split(" ")[0] for table in TABLES.values() for text in table.experiments()}
    assert named == set(ROWS)
    assert {name.split("/")[0] for name in ROWS} | {"cost"} == set(TABLES)


@pytest.mark.parametrize("file", ROWS)
def test_a_file_opens_with_its_command_and_its_cells(file):
    lines = FILES[file].read_text().splitlines()
    comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    assert lines[0] == "# @package _global_"
    command = shlex.split(lines[1].removeprefix("# "))
    assert command[:4] == ["python", "run_exp.py", "-m", f"experiment={file}"]
    asked = dict(word.split("=", 1) for word in command[4:])
    own = [(table, line, column, text) for table, line, column, text in uses(file) if table.name != "cost"]
    if own:  # math/lora_pro is of table cost alone
        table = next((t for t, *_ in own if t.name == file.split("/")[0]), own[0][0])
        assert asked["seed"] == ",".join(map(str, table.seeds))
        overrides = [text.split(" ")[1:] for t, _, _, text in own if t is table]
        for key in ("dataset", "model"):
            wanted = [w.split("=")[1] for words in overrides for w in words if w.startswith(f"{key}=")]
            assert asked.get(key, "").split(",") == (wanted or [""])
    cells = [(column, cell) for _, line, column, _ in own for cell in line.published.get(column.name, ())]
    for column, cell in cells:
        assert f"{column.title} {cell.value:.2f}" in comment
        assert cell.source in comment
    if own and not cells:
        assert "No published cell." in comment


def test_every_file_is_planned_with_its_real_model(monkeypatch):
    """One test, so that each file is composed once."""
    monkeypatch.setattr("lora_one.plan.empty_model", cache_by_model(empty_model))
    variants = {text for row in ("glue_t5/lora", "commonsense/lora") for *_, text in uses(row)}
    models = set()
    for name in sorted({*ROWS, *variants}):
        config = composed(name)
        plan = dict(re.split(r"  +", line, maxsplit=1) for line in describe_plan(config, 1).splitlines())
        assert "unknown" not in plan["trainable parameters"] + plan["steps"] + plan["tokens"], (name, plan)
        for task in config.eval.tasks:
            find_task(task)
        models.add(config.model.name)
    assert models == {
        *("google-t5/t5-base", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B")
    }
    for table in TABLES.values():
        files = {text.split(" ")[0] for text in table.experiments()}
        assert len({run_id(composed(file)) for file in files}) == len(files), table.name
        for line, column in product(table.lines, table.columns):
            if column.metric is not None and column.name in line.experiments:
                config = composed(line.experiments[column.name].split(" ")[0])
                made = {
                    *config.eval.tasks,
                    *(["test"] if config.eval.task else []),
                    "cost.hours",
                    "cost.peak_gb",
                }
                made |= {f"{task}_rating" for task in made & {"mt_bench"}}  # a judge's
                assert column.metric in made, (table.name, column.name)


def cache_by_model(function):
    """So that a model of seven billion empty weights is built once, and not for each row."""
    known = {}

    def cached(config):
        if config.name not in known:
            known[config.name] = function(config)
        return known[config.name]

    return cached


# The settings of the papers, by hand: method, rate, schedule, rank, alpha, rsLoRA, gamma, sample.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("glue_t5/lora", ("lora", 1e-4, "cosine", 8, 16, False, None, None)),
        ("glue_t5/rslora", ("lora", 1e-4, "cosine", 8, 16, True, None, None)),
        ("glue_t5/p_lora", ("lora+scaled_adamw", 1e-4, "cosine", 8, 16, False, None, None)),
        ("glue_t5/lora_one", ("LoRA-One", 1e-4, "cosine", 8, 16, True, 128, 8)),
        ("glue_t5/lora_ga", ("LoRA-GA", 1e-4, "cosine", 8, 16, True, 16, 128)),
        ("math/lora_one", ("LoRA-One", 2e-4, "linear", 8, 16, True, 128, 8)),
        ("math_full/loraplus", ("loraplus", 2e-4, "linear", 8, 16, False, None, None)),
        ("math_lora_ga/pissa", ("pissa", 2e-5, "cosine", 8, 16, False, None, None)),
        ("ranks/code_r128", ("LoRA-GA", 2e-5, "cosine", 128, 16, True, 64, 128)),
        ("commonsense/lora_one_r16", ("LoRA-One", 5e-5, "linear", 16, 16, True, 128, 8)),
        ("ablation_gamma/lora_one_256", ("LoRA-One", 1e-4, "cosine", 8, 16, True, 256, 8)),
        ("ablation_sample/lora_ga_8", ("LoRA-GA", 1e-4, "cosine", 8, 16, True, 16, 8)),
    ],
)
def test_settings_of_the_papers(name, expected):
    config = composed(name)
    init, is_gradient = config.init, config.init.mode == "gradient"
    assert expected == (
        *(config.method, config.model.learning_rate, config.model.lr_scheduler, config.peft.lora_r),
        *(config.peft.lora_alpha, config.peft.use_rslora, init.gamma if is_gradient else None),
        init.bsz * init.iters if is_gradient else None,
    )


def test_the_command_of_lora_ones_readme_is_the_row_of_its_rank():
    published = compose_experiment(
        "commonsense/lora_one_r16", ["model=llama", "seed=42", "eval.tasks=[]"]
    ).model_dump()
    words = "dataset=commonsense_reasoning model.epochs=3 model.real_batch_size=16 init=gradient "
    words += "init.direction=LoRA-One model.max_length=256 peft=qv peft.lora_r=16 init.scale=stable "
    words += "peft.use_rslora=True peft.lora_alpha=16 peft.lora_dropout=0.05 model.learning_rate=5e-5 seed=42"
    assert result_settings(published) == result_settings(parse(*words.split()).model_dump())


def test_overrides_of_the_command_line_win():
    assert command_of("glue_t5/lora dataset=mnli", ["dataset=sst2", "seed=3"]) == [
        *("experiment=glue_t5/lora", "dataset=sst2", "seed=3")
    ]
    config = compose_experiment("glue_t5/lora dataset=mnli", ["++dataset=cola", "model.learning_rate=1"])
    assert (config.dataset.name, config.model.learning_rate) == ("cola", 1.0)


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("glue_t5/lorra", [], "experiment glue_t5/lorra: .*no such choice .did you mean 'glue_t5/lora'"),
        ("glue_t5/lora", ["peft.lora_rr=1"], "experiment glue_t5/lora: unknown config key 'peft.lora_rr'"),
        ("glue_t5/lora", ["init.sub_size=1"], "experiment glue_t5/lora: init.sub_size"),
        ("glue_t5/lora", ["hydra/launcher=none"], "experiment glue_t5/lora: .*none"),
    ],
)
def test_mistakes_name_the_experiment_in_one_line(name, overrides, words):
    with pytest.raises(UserError, match=words) as caught:
        compose_experiment(name, overrides)
    assert "\n" not in str(caught.value)


SENTENCES = [
    {"sentence": f"the {a} {b} runs home", "label": len(a + b) % 2}
    for a in ("old", "red", "big", "tall", "young", "small")
    for b in ("cat", "dog", "horse", "cow", "sheep")
]
INSTRUCTIONS = [
    {"instruction": f"Say {i}.", "input": "", "output": f"It is {i}.", "answer": "true"} for i in range(16)
]
MATH = [
    {"query": f"What is {i} + 1?", "response": f"{i} + 1 = {i + 1}\n#### {i + 1}", "type": "GSM_Rephrased"}
    for i in range(16)
]
CODE = [{"query": f"Print {i}.", "answer": f"Here:\n```python\nprint({i})\n```\nDone."} for i in range(16)]
GSM8K = gsm8k_rows(4, start=100)
SAMPLE, RANK = "init.iters=2", "peft.lora_r=4"
# Experiment, training rows, test rows, and what a small model makes necessary.
ONE_ROW = {
    "glue_t5": ("glue_t5/p_lora dataset=cola", SENTENCES[:16], SENTENCES[16:], [RANK]),
    "math": ("math/lora_one", MATH, GSM8K, []),
    "math_full": ("math_full/loraplus", MATH, GSM8K, []),
    "math_lora_ga": ("math_lora_ga/full_ft", MATH, GSM8K, []),
    "code": ("code/lora_ga", CODE, [], [SAMPLE]),
    "code_lora_ga": ("code_lora_ga/dora", CODE, [], []),
    "mmlu": ("mmlu/lora", INSTRUCTIONS, [], []),
    "mt_bench": ("mt_bench/adalora", INSTRUCTIONS, [], []),
    "commonsense": ("commonsense/pissa", INSTRUCTIONS, [], ["peft.lora_r=16"]),
    "ranks": ("ranks/code_r32", CODE, [], [SAMPLE]),
    "ablation_direction": (
        *("ablation_direction/a2rbr dataset=cola", SENTENCES[:16], SENTENCES[16:], [RANK, SAMPLE]),
    ),
    "ablation_scale": (
        *("ablation_scale/lora_one_weights dataset=cola", SENTENCES[:16], SENTENCES[16:], [RANK]),
    ),
    "ablation_gamma": (*("ablation_gamma/lora_one_16 dataset=cola", SENTENCES[:16], SENTENCES[16:], [RANK]),),
    "ablation_sample": (
        *("ablation_sample/lora_one_1 dataset=cola", SENTENCES[:16], SENTENCES[16:], [RANK]),
    ),
}
TWO_STEPS = (
    *("dataset.validation_size=4", "model.max_steps=2", "model.real_batch_size=4", "wandb.mode=disabled"),
    *("eval.tasks=[]", "eval.limit=2", "eval.max_new_tokens=8", "model.bf16=false", "model.max_length=128"),
)


def test_a_row_of_every_table_runs():
    assert ONE_ROW.keys() == TABLES.keys() - {"cost"}  # its rows are those of math


def stand_ins(table: str, folder: Path, tokenizer) -> tuple[str, list[str]]:
    """A table's experiment, and the overrides that have it train two steps of a small model."""
    name, train, test, own = ONE_ROW[table]
    words = [*TWO_STEPS, f"dataset.train_file={write_jsonl(folder / 'train.jsonl', train)}", *own]
    if test:
        words.append(f"dataset.test_file={write_jsonl(folder / 'test.jsonl', test)}")
    if "dataset=cola" in name:
        model = save_small_t5(folder / "t5", tokenizer)
        return name, [*words, "model=custom", f"model.name={model}", "model.type=ConditionalGeneration"]
    return name, [*words, "model=custom", f"model.name={EMBEDDED}"]


@pytest.mark.parametrize("table", ONE_ROW)
def test_two_steps_with_a_small_model(tmp_path, monkeypatch, tokenizer, table):
    monkeypatch.setattr(run_exp, "plot_run", lambda *_: None)  # takes a third of the time
    name, words = stand_ins(table, tmp_path, tokenizer)
    config = compose_experiment(name, [*words, f"results_dir={tmp_path}/results"])
    run = Run(config, ALONE)
    run_exp.run_experiment(config, run)
    run.close()
    assert run.record.status == "finished"
    assert run.record.training["n_steps"] == 2
    assert run.record.metrics.get("test", {}).get("n") == (2 if ONE_ROW[table][2] else None)


def test_a_table_finds_a_run_by_its_settings_whoever_started_it(cli, tmp_path, tokenizer):
    name, words = stand_ins("glue_t5", tmp_path, tokenizer)
    assert cli(*command_of(name, [*words, "wandb.name=mine", "model.saving=true"])).returncode == 0
    record = json.loads((only_run(tmp_path / "results") / "record.json").read_text())
    expected = compose_experiment(name, words).model_dump()
    assert result_settings(record["config"]) == result_settings(expected)
