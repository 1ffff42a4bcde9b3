"""The benchmarks of training and of the optimisers measure what they say, on little."""

import json
import sys

import pytest
from conftest import ROOT, load_script, run_program


def rows_of(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_training_beside_the_trainer_and_the_limit(tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = ({"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}"} for i in range(32))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = str(ROOT / "scripts" / "bench_training.py")
    small = ["--steps", "1", "--rounds", "1", "--data", str(data)]
    methods = ["--methods", "ours", "published", "grouped", "limit", "--budgets", "64"]
    done = run_program(sys.executable, script, *small, *methods)
    assert done.returncode == 0, done.stderr
    found = {row[0]: row[1:] for row in rows_of(done.stdout)}
    assert set(found) == {*("method", "---", "ours", "published", "grouped", "limit", "ours, 64 tokens")}
    for name in found.keys() - {"method", "---"}:
        rate, *ratios, peak = found[name]
        assert float(rate.replace(",", "")) > 0
        assert len(ratios) == 3
        assert float(peak.replace(",", "")) > 0
    assert found["limit"][1] == "1.00"
    assert found["published"][2] == "1.00"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/none"], "error: model.name=/none: no such folder"),
        (["--data", "/none.jsonl"], "error: /none.jsonl: No such file or directory"),
    ],
)
def test_training_names_what_is_not_there(monkeypatch, arguments, words):
    monkeypatch.setattr(sys, "argv", ["bench_training.py", *arguments])
    with pytest.raises(SystemExit, match=words):
        load_script("bench_training").main()


def test_optimisers_beside_pefts():
    script = str(ROOT / "scripts" / "bench_optimizer.py")
    done = run_program(sys.executable, script, "--ranks", "2", "--layers", "1", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    assert "r = 2, 7 targets, float32" in done.stdout
    found = {row[0]: row[1:] for row in rows_of(done.stdout)}
    assert set(found) == {"method", "---", "classic", "symmetric", "sylvester", "peft"}
    assert found["peft"][3] == "1.00"
    assert all(float(cell) > 0 for name in ("classic", "peft") for cell in found[name][:2])
