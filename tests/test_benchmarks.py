"""The benchmarks of training and of the optimisers measure what they say, on little."""

import argparse
import json
import sys
import time

import pytest
from conftest import ROOT, load_script, run_program, run_script

from lora_one.errors import UserError
from lora_one.models import EMBEDDED_MODEL


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


def test_a_compiled_training_is_compared_with_the_compiled_limit():
    bench = load_script("bench_training")
    rates = {"ours": 60.0, "published": 40.0, "limit": 50.0, "ours, compiled": 72.0, "limit, compiled": 80.0}
    found = {name: bench.Measured([rate], peak_bytes=10**6) for name, rate in rates.items()}
    found["ours, compiled"].peak_bytes, found["ours, compiled"].first_rate = None, 10.0
    rows = {row[0]: row[1:] for row in rows_of(bench.report(found))}
    assert rows["method"] == ["tokens/s", "/ limit", "/ published", "peak MB"]
    assert rows["ours"] == ["60", "1.20", "1.50", "1"]
    assert rows["ours, compiled"][:3] == ["72", "0.90", "1.80"]
    assert bench.compiling(found, 720) == [
        "ours, compiled: the first training took 72 s, which compiled, later ones 10 s"
    ]


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
    done = run_script(script, "--ranks", "2", "--layers", "1", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    assert "r = 2, 7 targets, float32" in done.stdout
    found = {row[0]: row[1:] for row in rows_of(done.stdout)}
    assert set(found) == {"method", "---", "classic", "symmetric", "sylvester", "peft"}
    assert found["peft"][3] == "1.00"
    assert all(float(cell) > 0 for name in ("classic", "peft") for cell in found[name][:2])


@pytest.mark.slow
def test_one_launch_beside_unconnected_processes():
    script = str(ROOT / "scripts" / "bench_scaling.py")
    small = ["--steps", "4", "--prompts", "4", "--new-tokens", "4", "--rounds", "1"]
    done = run_program(sys.executable, script, *small)
    assert done.returncode == 0, done.stderr
    found = {row[0]: row[1:] for row in rows_of(done.stdout)}
    works = {"gradient estimate", "training, 32 examples a step", "training, 32 a step and process"}
    assert set(found) == {"tokens/s", "---", "generation", *works}
    for name in (*works, "generation"):
        assert all(float(cell.replace(",", "")) > 0 for cell in found[name])


def test_a_stopwatch_tells_waiting_from_work():
    bench = load_script("bench_scaling")
    watch = bench.Stopwatch()
    watch.look()
    time.sleep(0.3)
    watch.look()
    took = watch.took(7)
    assert took.n_tokens == 7
    assert took.seconds >= 0.3
    assert took.busy_seconds < 0.2


def test_rates_of_several_processes():
    bench = load_script("bench_scaling")
    took = [bench.Took(100, 2.0, 1.0), bench.Took(100, 4.0, 3.0)]
    assert bench.rate(took, shared=False) == 75  # each its own tokens
    assert bench.rate(took, shared=True) == 25  # the same tokens, and the last is late
    assert bench.working(took) == 0.5
    rates = {"one": [10.0, 20.0, 10.0], "unconnected": [20.0, 20.0, 20.0], "launch": [10.0, 20.0, 18.0]}
    rates["working"] = [0.7, 0.9, 0.8]
    cells = [f"{10:,}", "20", "18", "0.90", "2.00", "1.00", "0.80"]
    assert rows_of(bench.report({"work": rates}))[-1][1:] == cells


def test_shares_of_the_unconnected_processes_make_up_the_launchs(tmp_path, monkeypatch):
    bench = load_script("bench_scaling")
    settings = {"model": EMBEDDED_MODEL, "data": None, "processes": 2, "steps": 4, "prompts": 5}
    arguments = argparse.Namespace(**settings, max_length=512, new_tokens=4)
    whole, first, second = (bench.make_case(arguments, part) for part in (None, 0, 1))
    texts = [{example.ids.tobytes() for example in case.examples} for case in (whole, first, second)]
    assert len(whole.examples) == 2 * len(first.examples) == 2 * len(second.examples) == 256
    assert texts[0] == texts[1] | texts[2]
    assert (len(whole.prompts), len(first.prompts), len(second.prompts)) == (10, 5, 5)
    assert set(whole.prompts) == {*first.prompts, *second.prompts}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--processes", "1"], "error: --processes 1: at least 2"),
        (["--steps", "1"], "error: --steps 1: a rate needs some steps"),
    ],
)
def test_scaling_refuses_what_gives_no_rate(monkeypatch, arguments, words):
    monkeypatch.setattr(sys, "argv", ["bench_scaling.py", *arguments])
    with pytest.raises(SystemExit, match=words):
        load_script("bench_scaling").main()


def test_scaling_names_a_model_that_is_not_there():
    done = run_script("scripts/bench_scaling.py", "--model", "/none")
    assert done.returncode == 1
    assert "error: model.name=/none: no such folder" in done.stderr


def test_ways_of_a_sweep_are_compared_round_by_round(tmp_path):
    bench = load_script("bench_sweep")
    made = []

    def way(seconds):
        def run(results, given):
            made.append((seconds, given))
            (results / "gradients").mkdir(parents=True)
            (results / "gradients" / "a.safetensors").touch()
            for n in range(8):
                folder = results / str(n)
                folder.mkdir()
                (folder / "record.json").write_text('{"status": "finished"}')

        return run

    taken = bench.measure({"loop": way(1), "array": way(2)}, 2, ["seed=3"])
    assert [which for which, _ in made] == [1, 2, 2, 1]  # each round begins with another
    assert {name: len(seconds) for name, seconds in taken.items()} == {"loop": 2, "array": 2}
    rows = rows_of(bench.table({"loop": [8.0, 12.0], "array": [4.0, 3.0]}))
    assert rows[-1] == ["array", "3.5", "3.00"]
    (tmp_path / "gradients").mkdir()
    with pytest.raises(UserError, match="0 of 8 runs are finished, 0 gradients"):
        bench.check_runs(tmp_path)
