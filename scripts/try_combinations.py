"""Tries combinations of the groups under conf/: each must run or be refused in one line.

    python scripts/try_combinations.py             # about two minutes on one core

First every model x peft x init x optimizer is checked with one dataset of each kind, and every other dataset
with every model, without running. Then two steps
are trained on random models of a few thousand parameters for each way through the code: every peft with every
init, and every optimizer. It exits with 1 if one ends in anything but a result or one line.
"""

import contextlib
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run_exp
from lora_one.config import parse_tree
from lora_one.errors import UserError
from lora_one.models import EMBEDDED_MODEL, model_source
from lora_one.tables import markdown_table

GROUPS = ("dataset", "model", "init", "peft", "optimizer")
# What a dataset's file decides: the others are nodes of their own, which a choice replaces.
SHARED = ("dataset", "eval")
TWO_STEPS = (
    *("dataset=tiny", "dataset.train_size=16", "dataset.validation_size=4", "dataset.test_size=4"),
    *("eval.task=null", "wandb.mode=disabled", "model=custom", "model.max_length=64", "model.max_steps=2"),
    *("model.real_batch_size=4", "model.warmup_steps=0"),
)
ON_A_SAMPLE = ("gradient", "eva", "corda", "peft_lora_ga")


@dataclass(frozen=True)
class Outcome:
    """How a start of the program ended: ``ran``, ``refused`` or ``crashed``, and what it said of it."""

    kind: str
    text: str = ""


def choices(group: str) -> list[str]:
    """The files of a group."""
    return sorted(path.stem for path in (run_exp.CONF_DIR / group).glob("*.yaml"))


def overrides(chosen: dict[str, str]) -> list[str]:
    """The command line that makes these choices."""
    named = ["++model.name=some/model"] if chosen["model"] == "custom" else []
    return [*(f"{group}={chosen[group]}" for group in GROUPS), *named]


def composed(chosen: dict[str, str]) -> dict[str, Any]:
    """What Hydra makes of these choices."""
    tree = OmegaConf.to_container(compose("config", overrides(chosen)), resolve=True)
    assert isinstance(tree, dict)
    return {str(key): node for key, node in tree.items()}


def all_trees() -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """The combinations with their trees, from one composition of each file.

    Datasets are alike whose evaluation is: one of each kind meets every combination of the others, the rest
    every model.
    """
    first = {group: choices(group)[0] for group in GROUPS}
    parts = {(group, name): composed(first | {group: name}) for group in GROUPS for name in choices(group)}
    kinds = {str(parts["dataset", name].get("eval")): name for name in choices("dataset")}
    tried = [
        *product(sorted(kinds.values()), *map(choices, GROUPS[1:])),
        *(
            (dataset, model, *(first[group] for group in GROUPS[2:]))
            for dataset, model in product(choices("dataset"), choices("model"))
            if dataset not in kinds.values()
        ),
    ]
    for names in tried:
        chosen = dict(zip(GROUPS, names, strict=True))
        base = parts["dataset", chosen["dataset"]]
        nodes = {group: dict(parts[group, chosen[group]][group]) for group in GROUPS}
        yield chosen, base | nodes


def check(chosen: dict[str, str], tree: dict[str, Any]) -> Outcome:
    """Whether a combination is a valid configuration."""
    named = {*GROUPS} | ({"model.name"} if chosen["model"] == "custom" else set())
    try:
        parse_tree(tree, named)
    except UserError as error:
        return Outcome("refused" if "\n" not in str(error) else "crashed", str(error))
    except Exception as error:
        return Outcome("crashed", f"{type(error).__name__}: {error}")
    return Outcome("ran")


def start(arguments: Sequence[str]) -> Outcome:
    """One start of the program, in this process."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["run_exp.py", *arguments]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_exp.main()
    except SystemExit as stop:
        code = stop.code or 0
    except Exception as error:
        return Outcome("crashed", f"{type(error).__name__}: {error}")
    finally:
        sys.argv = argv
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    text = " ".join(errors)
    if code == 0:
        return Outcome("ran")
    is_one_line = code == run_exp.BAD_INPUT and len(errors) == 1 and "Traceback" not in err.getvalue()
    return Outcome("refused" if is_one_line else "crashed", text)


def save_models(folder: Path) -> dict[str, tuple[str, ...]]:
    """A random Llama and a random T5 with the embedded tokenizer; their command lines."""
    tokenizer = AutoTokenizer.from_pretrained(model_source(EMBEDDED_MODEL))
    ids: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    t5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    t5 |= {"decoder_start_token_id": ids["pad_token_id"]}
    torch.manual_seed(0)
    models = {
        "Llama": LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)),
        "T5": T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **t5, **ids)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    named = {name: f"model.name={folder / name}" for name in models}
    return {"Llama": (named["Llama"],), "T5": (named["T5"], "model.type=ConditionalGeneration")}


def to_run() -> Iterator[tuple[str, tuple[str, ...]]]:
    """What to train two steps of: the model, and its choices."""
    for peft, init in product(choices("peft"), choices("init")):
        if not peft.startswith("qv") or init == "default":  # qv differs from all in the names only
            yield "Llama", (f"peft={peft}", f"init={init}")
    others = [name for name in choices("optimizer") if name != "adamw"]
    adapters = ("all", "dora", "adalora", "full_ft")
    for peft, init, optimizer in product(adapters, ("default", "gradient"), others):
        yield "Llama", (f"peft={peft}", f"init={init}", f"optimizer={optimizer}")
    for init in choices("init"):
        yield "T5", ("peft=all", f"init={init}")
    for peft, init in product(choices("peft"), ("default", "gradient")):
        if peft != "all":
            yield "T5", (f"peft={peft}", f"init={init}")
    for optimizer in others:
        yield "T5", ("peft=all", "init=gradient", f"optimizer={optimizer}")


def try_two_steps(
    models: dict[str, tuple[str, ...]], folder: Path, part: slice = slice(None)
) -> Iterator[tuple[str, Outcome]]:
    """Trains two steps of each, or of a part of them; yields its command line and how it ended."""
    for number, (name, chosen) in enumerate(list(to_run())[part]):
        sample = ("init.iters=2",) * any(f"init={init}" in chosen for init in ON_A_SAMPLE)
        rank = () if "peft=full_ft" in chosen else ("peft.lora_r=4",)
        place = f"results_dir={folder / str(number)}"
        yield " ".join((name, *chosen)), start([*TWO_STEPS, *models[name], *chosen, *sample, *rank, place])


def table(rows: dict[str, list[Outcome]]) -> str:
    """How many ran, were refused and crashed."""
    kinds = ("ran", "refused", "crashed")
    counts = {name: Counter(outcome.kind for outcome in outcomes) for name, outcomes in rows.items()}
    body = [
        [name, str(count.total()), *(str(count[kind]) for kind in kinds)] for name, count in counts.items()
    ]
    return markdown_table([["", "tried", "valid, or ran", *kinds[1:]], *body])


def main() -> None:
    """The command line."""
    transformers_logging.disable_progress_bar()
    with initialize_config_dir(str(run_exp.CONF_DIR), version_base="1.3"):
        rows = {"configurations": [check(chosen, tree) for chosen, tree in all_trees()]}
    with tempfile.TemporaryDirectory() as folder:
        for what, outcome in try_two_steps(save_models(Path(folder)), Path(folder)):
            rows.setdefault(f"two steps of {what.split()[0]}", []).append(outcome)
            print(f"{what}: {outcome.kind} {outcome.text}".rstrip(), flush=True)
    print(table(rows))
    sys.exit(any(outcome.kind == "crashed" for outcomes in rows.values() for outcome in outcomes))


if __name__ == "__main__":
    main()
