"""The guide's commands run, and what it and the page on troubles name is there."""

import json
import re
import shlex

import pytest
from conftest import ROOT, only_run
from test_readme import COMMANDS as OF_README

from lora_one import out_of_memory
from lora_one.config import valid_keys

GUIDE = (ROOT / "docs" / "guide.md").read_text()
TROUBLES = (ROOT / "docs" / "troubleshooting.md").read_text()
SECTIONS = ("dataset", "model", "peft", "init", "optimizer", "eval", "wandb")


def commands_of(kind: str) -> list[list[str]]:
    """The commands in blocks of one kind: ``sh``, ``sh gpu`` or ``sh quantized``."""
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


OWN = [command for command in commands_of("sh") if command not in OF_README]


@pytest.mark.parametrize("command", OWN + commands_of("sh gpu"), ids=" ".join)
def test_commands_as_far_as_their_plan(command, cli):
    """Those that the README has too run to the end in its own tests. Of a sweep's rates one is planned."""
    assert command[:2] == ["python", "run_exp.py"]
    words = [re.sub(r"^(model\.learning_rate=[^,]+),.*", r"\1", word) for word in command[2:]]
    done = cli(*words, *(["dry_run=true"] * ("dry_run=true" not in words)))
    assert done.returncode == 0, done.stderr
    assert "run folder" in done.stdout


@pytest.mark.parametrize("command", commands_of("sh quantized"), ids=" ".join)
def test_a_quantised_base(command, cli):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    done = cli(*command[2:], "debug=short", "eval.task=null")
    assert done.returncode == 0, done.stderr


def test_every_command_is_of_a_known_kind():
    assert set(re.findall(r"^```(.+)$", GUIDE, re.MULTILINE)) == {"sh", "sh gpu", "sh quantized"}
    assert "```" not in TROUBLES
    assert len(commands_of("sh")) - len(OWN) >= 4


def test_extras_are_those_of_the_package():
    table = GUIDE.split("| `pip install -e '.[NAME]'` |")[1].split("\n\n")[0]
    project = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    extras = re.findall(r"^(\w+) = \[", project.split("\n\n[")[0], re.MULTILINE)
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(extras)


@pytest.fixture(scope="module")
def record_keys(tmp_path_factory):
    """Dotted keys of a real record."""
    import run_exp

    folder = tmp_path_factory.mktemp("record")
    settings = ("debug=short", "optimizer=scaled_adamw", "eval.limit=2", f"results_dir={folder}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["run_exp.py", *settings, "eval.before_training=false"])
        with pytest.raises(SystemExit) as exited:
            run_exp.main()
    assert not exited.value.code
    return dotted(json.loads((only_run(folder) / "record.json").read_text()))


def dotted(tree: dict, prefix: str = "") -> set[str]:
    keys = {f"{prefix}{name}" for name in tree}
    for name, node in tree.items():
        keys |= dotted(node, f"{prefix}{name}.") if isinstance(node, dict) else set()
    return keys


def test_the_records_keys_are_in_a_record(record_keys):
    table = GUIDE.split("| key | tells |\n")[1].split("\n\n")[0]
    named = [key for row in table.splitlines()[1:] for key in re.findall(r"`([\w.]+)`", row.split("|")[1])]
    assert len(named) > 25
    assert [key for key in named if key not in record_keys] == []


@pytest.mark.parametrize("page", [GUIDE, TROUBLES], ids=["guide", "troubleshooting"])
def test_named_settings_exist(page, record_keys):
    known = {*valid_keys(), *record_keys}
    named = re.findall(
        rf"`((?:{'|'.join((*SECTIONS, 'gradient', 'training', 'data', 'stages'))})\.\w[\w.]*)", page
    )
    assert len(named) > 15
    assert [key for key in named if key not in known] == []


def test_remedies_are_those_of_the_message():
    rows = TROUBLES.split("## It runs out of memory")[1].split("\n\n")[2]
    for stage, remedies in out_of_memory._REMEDIES.items():
        (row,) = [line for line in rows.splitlines() if re.match(rf"\| `{stage}`", line)]
        assert [key for key in remedies if key not in row] in (
            [],
            ["model.quantization"],
            ["model.bf16", "model.quantization"],
        )
    message = out_of_memory.explain_out_of_memory(MemoryError(), "training", {})
    assert message.startswith("out of memory in the stage 'training'; lower ")
    assert "`out of memory in the stage 'training'; lower …`" in TROUBLES


@pytest.mark.parametrize(
    "shown, written",
    [
        (
            "the training loss is nan; lower model.learning_rate, …",
            "{logs[key]}; lower model.learning_rate, use ",
        ),
        ("gradient batch 3 of 8: its loss is inf; …", "its loss is {loss.item()}"),
        ("its LoRA factors are not finite; …", "its LoRA factors are not finite; lower model.learning_rate"),
        ("this run is being made by …", "this run is being made by {holder}"),
        ("record.json: damaged; …", "{path}: damaged; remove the run folder, or restore the file"),
    ],
)
def test_messages_are_those_of_the_program(shown, written):
    assert shown in TROUBLES
    assert any(written in path.read_text() for path in (ROOT / "lora_one").glob("*.py"))
