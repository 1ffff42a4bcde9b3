"""Every command of docs/reports.md runs, on two made runs and a small table under the published names."""

import re
import shlex
import sys

import pytest
from conftest import ROOT, load_script
from stored_runs import config_of, falling_loss, record_of, store

from lora_one.published import Cell, Column, Line, Table

COMMANDS = [
    line
    for block in re.findall(
        r"^```sh\n(.*?)^```", (ROOT / "docs/reports.md").read_text(), re.DOTALL | re.MULTILINE
    )
    for line in block.splitlines()
]


def table_named(name):
    line = Line("LoRA", {"x": name}, {"x": (Cell(59.26, None, "One"),)})
    return Table(name, f"Table {name}", "One", (0, 1), (Column("x", "X", "test", True),), (line,))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs(command, tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        store(tmp_path / "results", record_of(seed, 0.5 + seed / 10), falling_loss(8))
    _, path, *arguments = shlex.split(command)
    program = load_script(path.removeprefix("scripts/").removesuffix(".py"))
    monkeypatch.setattr(program, "find_table", table_named)
    monkeypatch.setattr(program, "compose_experiment", lambda *_: config_of())
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    monkeypatch.chdir(tmp_path)
    program.main()
    printed = capsys.readouterr().out
    if "report" in path:
        page = tmp_path / (arguments[-1] if "-o" in arguments else "results/report.html")
        assert page.read_text().startswith("<!doctype html>")
        assert ("59.26" in page.read_text()) == ("--table" in arguments)
    else:
        assert ("59.26" in printed) == ("--table" in arguments)
        assert (
            "55.00 ± 7.07" if "--table" in arguments else "0.5000" if "--metric" in arguments else "55.0%"
        ) in printed


def test_there_are_commands():
    assert {command.split()[1] for command in COMMANDS} == {"scripts/make_table.py", "scripts/make_report.py"}
