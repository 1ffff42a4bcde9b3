"""Mutated command lines: each is a valid plan or is refused in one line, never a traceback."""

import functools
import gc
import re
from collections import Counter
from dataclasses import replace

import pytest
from conftest import load_script
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_one.config import ExperimentConfig, valid_keys
from lora_one.data.specs import SPECS

BASES = (
    ("dataset=tiny",),
    ("dataset=meta_math", "model=tiny", "init.direction=LoRA-GA"),
    ("dataset=gsm8k", "model=t5small", "peft=qv", "init=default"),
    ("dataset=commonsense_reasoning", "model=tiny", "peft=dora", "init=svd", "optimizer=sgd"),
    ("dataset=gsm8k", "model=custom", "model.name=some/model", "peft=full_ft", "init=default"),
    ("dataset=gsm8k", "model=tiny", "init=gradient", "optimizer=scaled_adamw"),
)
GROUPS = ("dataset", "model", "init", "peft", "optimizer", "experiment", "debug", "dataset_name")
KEYS = [key for key in valid_keys() if key not in GROUPS and key != "dry_run"]
ODD_KEYS = ("foo", "", "seed.x", "model.foo.bar", "model.", ".seed", "model..name", "hydra", "model.shape.x")
# Values of a key's own kind, some of them out of all proportion.
PLAUSIBLE = {
    "bool": ("true", "false", "True", "null"),
    "int": ("1", "2", "3", "64", "4096", "1000000", "999999999999", str(2**63), "null"),
    "float": ("0.5", "1", "2", "1e-30", "1e30", "1e400", "nan", "null"),
    "str": (
        "tiny",
        "a/b",
        "/none",
        "..",
        "~",
        "~nobody/x",
        "x" * 300,
        "模型",
        "README.md",
        ".*",
        "(",
        "q_proj",
        "null",
    ),
    "list": ("[q_proj]", "[q_proj,q_proj]", "[0]", "[99]", "[]", "0", "-1", "all", "qv", "[all]", "[a,null]"),
    "dict": ("{a: 1}", "{'.*': 4}", "{'(': 4}", "{q_proj: 0}", "{model_type: llama}", "{train: 5}", "{}"),
}
# Values of any other kind.
WRONG = {
    "number": ("-1", "0", "1.5", "nan", "-inf", "9" * 30, "-0.0", "0x10", "1_000", "007"),
    "empty": ("", "''", "null", "~", "[]", "{}", "' '"),
    "word": ("true", "None", "foo", "LoRA-One", "adamw"),
    "structure": ("[1,2]", "[[q_proj]]", "[null]", "{a: {b: 2}}", "1,2", "[", "}"),
    "interpolation": (
        "${foo}",
        "${seed}",
        "${model}",
        "${model.name}",
        "${",
        "${oc.env:NOT_SET}",
        "${foo:1}",
        "???",
    ),
    "odd": ("é", "🙂", "a=b", "a b", "a\nb", "\t", "\\", "'", "%s", "x" * 5000, "\x00", "!!python/object:os"),
    "function": ("range(1,3)", "glob(*)", "choice(a,b)", "sort(3,1)", "int('x')", "tag(a,1)"),
}


def fitting(key: str) -> list[str]:
    """Values that the key's annotation names."""
    field = ExperimentConfig.model_fields[key.split(".")[0]]
    if "." in key:
        field = field.annotation.model_fields[key.split(".")[1]]
    annotation = str(field.annotation)
    kinds = [kind for kind in PLAUSIBLE if kind in annotation]
    return [value for kind in kinds for value in PLAUSIBLE[kind]] + re.findall(r"'([^']+)'", annotation)


def spoilt(key: str) -> str:
    """The key with a letter too few."""
    return key[: len(key) // 2] + key[len(key) // 2 + 1 :]


TEXTS = st.text(max_size=8)
QUOTED = TEXTS.map(lambda text: "'" + text.replace("\\", "").replace("'", "") + "'")
NAMED = st.sampled_from(KEYS)
ANY_KEY = st.sampled_from(KEYS) | st.sampled_from(GROUPS) | NAMED.map(spoilt) | st.sampled_from(ODD_KEYS)
ANY_VALUE = st.sampled_from(sorted(WRONG)).flatmap(lambda kind: st.sampled_from(WRONG[kind])) | QUOTED | TEXTS
FITTING = NAMED.flatmap(lambda key: st.tuples(st.just(""), st.just(key), st.sampled_from(fitting(key))))
WILD = st.tuples(st.sampled_from(["", "", "", "+", "++", "~"]), ANY_KEY, ANY_VALUE)
MUTATIONS = (FITTING | WILD).map(lambda parts: f"{parts[0]}{parts[1]}={parts[2]}")


@pytest.fixture(scope="module")
def start():
    return load_script("try_combinations").start


@pytest.mark.slow
@pytest.mark.parametrize("bases", [BASES[:3], BASES[3:]], ids=["first bases", "last bases"])
def test_mutated_command_lines_get_a_plan_or_one_line(start, tmp_path, monkeypatch, bases):
    # Each plan of generated data would make its ten thousand rows again.
    generate = functools.cache(SPECS["tiny"].generate)
    monkeypatch.setitem(SPECS, "tiny", replace(SPECS["tiny"], generate=generate))
    monkeypatch.chdir(tmp_path)
    counts, crashed = Counter(), {}

    @settings(max_examples=250, derandomize=True, deadline=None, database=None)
    @given(st.sampled_from(bases), st.lists(MUTATIONS, min_size=1, max_size=2))
    def check(base, mutations):
        outcome = start([*base, *mutations, "dry_run=true"])
        counts[outcome.kind] += 1
        if outcome.kind == "crashed":
            crashed[" ".join((*base, *mutations))] = outcome.text

    gc.collect()
    gc.freeze()  # run_exp collects after every job: only what that job left
    check()
    gc.unfreeze()
    print(counts)
    assert crashed == {}
    assert counts["ran"] + counts["refused"] == 250
    assert counts["ran"] > 25
    assert not list(tmp_path.iterdir())


# Found by these mutations, and by trying what they led to.
@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("dataset.name=${foo}", "dataset.name: Interpolation key 'foo' not found"),
        ("init.iters=${foo:1}", "init.iters: Unsupported interpolation type foo"),
        ("+=a", "cannot read the override '+=a': there is no key before '='"),
        ("~dataset=1", "~dataset=1: dataset cannot be taken away; give dataset=NAME"),
        ("~model", "~model: model cannot be taken away; give model=NAME"),
        ("+hydra=[null]", "+hydra=[null]: Hydra's own settings stay"),
        ("model.shape.hidden_size=a", "model.shape describes no model (Strict"),
        ("model.shape.model_type=a", "model.shape describes no model (ValueError: "),
        ("peft.lora_alpha=1e400", "peft.lora_alpha=inf: input should be a finite number"),
        ("model.learning_rate=nan", "model.learning_rate=nan: input should be a finite number"),
        (
            "dataset.validation_size=9999999999",
            "dataset.validation_size=9999999999: tiny generates its rows, at",
        ),
        ("dataset.test_size=9223372036854775808", "dataset.test_size=9223372036854775808: tiny generates"),
        ("results_dir=''", "results_dir='': string should have at least 1 character"),
        ("model.name='~nobody/x'", "model.name=~nobody/x: "),
        ("model.name=" + "x" * 300, "model.name=xxx"),
        ("dataset.train_file=" + "x" * 300, "xxx"),
    ],
)
def test_what_once_ended_in_a_traceback_or_never(start, tmp_path, argument, words):
    model = "llama" if argument.startswith("model.shape") else "tiny"
    outcome = start([f"results_dir={tmp_path}", "dataset=tiny", f"model={model}", argument, "dry_run=true"])
    assert (outcome.kind, outcome.text[: 7 + len(words)]) == ("refused", f"error: {words}")


def test_clipping_can_be_turned_off(start, tmp_path):
    assert start([f"results_dir={tmp_path}", "model.max_grad_norm=inf", "dry_run=true"]).kind == "ran"
