"""A published table takes runs with its experiments' settings, averages no others, says what is missing."""

import csv
import io
import sys
from math import sqrt

import pytest
from conftest import load_script
from stored_runs import config_of, falling_loss, record_of, store

from lora_one.errors import UserError
from lora_one.experiments import compose_experiment
from lora_one.published import Cell, Column, Line, Table
from lora_one.reports.paper_layout import in_every_format
from lora_one.reports.papers import fill_table
from lora_one.reports.reading import figure_at, load_records, settings_key
from lora_one.reports.summary import summarise

RATES = {"a": 1e-3, "b": 2e-3, "c dataset=x": 3e-3}
COLUMNS = (
    Column("x", "X", "test", True),
    Column("y", "Y", "other", False),
    Column("judged", "Judged", None, False, note="needs a judge"),
    Column("mean", "mean", None, True, mean_of=("x", "y")),
)
LINES = (
    Line("A & co", {"x": "a", "y": "b"}, {"x": (Cell(59.26, None, "One"), Cell(42.08, 0.5, "GA"))}),
    Line("C", {"x": "c dataset=x"}, {"mean": (Cell(1.0, None, "One"),)}, note="as printed"),
    Line("quoted", {}, {"judged": (Cell(5.61, None, "GA"),)}),
)
TABLE = Table("small", "A small table", "One", (0, 1, 2), COLUMNS, LINES, note="by hand")


def compose(spec, overrides):
    changes = dict(override.split("=") for override in overrides)
    length = int(changes.get("model.max_length", 1024))
    tree = config_of(9, learning_rate=RATES[spec], max_length=length).model_dump()
    if "eval.limit" in changes:
        tree["eval"]["limit"] = int(changes["eval.limit"])
    return type(config_of()).model_validate(tree)


def run(seed, test, rate=1e-3, limit=None, other=None, **more):
    record = record_of(seed, test, config=config_of(seed, learning_rate=rate), **more)
    record["config"]["eval"]["limit"] = limit
    if other is not None:
        record["metrics"]["other"] = {"value": other, "n": 7}
    return record


def test_the_summary_is_students():
    # The 97.5 % points of t are 12.7062 with one degree of freedom and 4.3027 with two.
    two, three = summarise([1.0, 3.0]), summarise([1.0, None, 2.0, 3.0])
    assert (two.n, two.mean, two.std) == (2, 2.0, pytest.approx(sqrt(2)))
    assert two.high - two.mean == pytest.approx(12.7062, rel=1e-5)
    assert (three.low, three.high) == pytest.approx((2 - 4.302653 / sqrt(3), 2 + 4.302653 / sqrt(3)))
    one = summarise([4.0])
    assert (one.mean, one.std, one.low) == (4.0, None, None)
    assert summarise([None]) is None


def test_runs_with_the_experiments_settings_fill_its_cells():
    records = [run(0, 0.50), run(1, 0.54), run(5, 0.9, rate=7e-3), run(0, None, rate=2e-3, other=4.0)]
    filled = fill_table(TABLE, records, compose)
    cells = filled.cells[0]
    assert cells[0].values == {0: 0.50, 1: 0.54}
    assert (cells[0].n_items, cells[0].missing) == (500, (2,))
    assert (cells[1].values, cells[1].missing) == ({0: 4.0}, (1, 2))
    # Seed 0 alone has both.
    assert cells[3].values == {0: pytest.approx((0.50 + 4.0) / 2)}
    # Where one of its columns is never measured, a mean is not missing either.
    assert (filled.cells[1][3].values, filled.cells[1][3].missing) == ({}, ())
    assert filled.cells[2][0].is_blank and not filled.cells[2][2].is_blank
    assert "1 runs have other settings" in " ".join(filled.remarks)
    assert {record["run_id"] for record in filled.used} == {records[i]["run_id"] for i in (0, 1, 3)}


def test_other_seeds_are_as_good_as_the_tables():
    filled = fill_table(TABLE, [run(seed, 0.5) for seed in (3, 4)], compose)
    assert filled.cells[0][0].missing == (0,)
    filled = fill_table(TABLE, [run(seed, 0.5) for seed in (3, 4, 5, 6)], compose)
    assert (filled.cells[0][0].missing, filled.cells[0][0].summary.n) == ((), 4)


def test_time_and_memory_are_of_the_whole_training_and_name_the_device():
    columns = tuple(Column(name, name, f"cost.{name}", False) for name in ("hours", "peak_gb"))
    table = Table("t", "t", "s", (0, 1), columns, (Line("A", {"hours": "a", "peak_gb": "a"}, {}),))
    whole = run(0, 0.5, limit=16)  # on how many problems it was tested does not matter
    whole["stages"] = {
        "model": {"seconds": 900.0, "peak_gpu_bytes": 99e9},  # loading is not the method's
        "gradient": {"seconds": 360.0, "peak_gpu_bytes": 20e9},
        "init": {"seconds": 36.0, "peak_resident_bytes": 30e9, "peak_gpu_bytes": 15e9},
        "training": {"seconds": 7000.0, "peak_gpu_bytes": 21.5e9},
    }
    whole["training"] = {"seconds": 6804.0, "resumed_from_step": 0}
    whole["hardware"] = {"gpus": ["A100"]}
    resumed = run(1, 0.5)
    resumed["training"] = {"seconds": 60.0, "resumed_from_step": 90}
    filled = fill_table(table, [whole, resumed], compose)
    assert [cell.values for cell in filled.cells[0]] == [{0: pytest.approx(2.0)}, {0: 21.5}]
    assert all(cell.missing == (1,) for cell in filled.cells[0])
    whole["gradient"] = {"cache_file": "x", "seconds": 7200.0}  # its memory is nowhere
    cached = fill_table(table, [whole], compose).cells[0]
    assert [cell.values for cell in cached] == [{0: pytest.approx(3.9)}, {}]
    assert "A, hours: on A100" in filled.remarks


def test_what_fills_it_is_a_command():
    records = [run(1, 0.5), run(0, None, status="failed", error="out of\nmemory")]
    filled = fill_table(TABLE, records, compose, ["model.max_length=1024"], "my runs")
    assert filled.commands == [
        "python run_exp.py -m experiment=a model.max_length=1024 seed=0,2 'results_dir=my runs'",
        "python run_exp.py -m experiment=b model.max_length=1024 seed=0,1,2 'results_dir=my runs'",
        "python run_exp.py -m experiment=c dataset=x model.max_length=1024 seed=0,1,2 'results_dir=my runs'",
    ]
    assert filled.missing[:2] == ["missing: A & co, seeds 0, 2 of X", "missing: A & co, seeds 0, 1, 2 of Y"]
    assert filled.missing[-1].endswith("s0 is failed: out of memory")
    assert "with model.max_length=1024, which was not published" in filled.remarks[0]


def test_one_sweep_fills_cells_that_differ_in_one_override():
    columns = tuple(Column(name, name, "test", True) for name in ("x", "y"))
    line = Line("A", {name: f"a dataset={name}" for name in ("x", "y")}, {})
    table = Table("t", "t", "s", (0,), columns, (line,))
    (command,) = fill_table(table, [], lambda *_: config_of()).commands
    assert command == "python run_exp.py -m experiment=a dataset=x,y seed=0"
    # A sweep over two keys would make more than the two cells.
    line = Line("A", {"x": "a dataset=x model=m", "y": "a dataset=y model=n"}, {})
    commands = fill_table(Table("t", "t", "s", (0,), columns, (line,)), [], lambda *_: config_of()).commands
    assert commands == [
        "python run_exp.py experiment=a dataset=x model=m seed=0",
        "python run_exp.py experiment=a dataset=y model=n seed=0",
    ]


@pytest.mark.parametrize(
    ("second", "what"),
    [
        (run(1, 0.6, limit=16, n=16), "n of problems is 500 in tiny-m-lora-lr0.001-s0 and 16"),
        (run(1, 0.6, data="other"), "the data's fingerprint is d in"),
        (run(1, 0.6, model={"fingerprint": "v"}), "the fingerprint of the model's weights is w in"),
        (run(0, 0.6, run_id="again"), "seed 0 is there twice"),
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_refused(second, what):
    with pytest.raises(UserError, match=what) as raised:
        fill_table(TABLE, [run(0, 0.5), second], compose)
    assert str(raised.value).startswith("table small, A & co, X: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["decoding", "metric"])
def test_figures_of_other_kinds_are_refused(key):
    other = run(1, 0.6)
    other["metrics"]["test"][key] = "else"
    with pytest.raises(UserError, match=f"the {key} is .* and else in"):
        fill_table(TABLE, [run(0, 0.5), other], compose)


def test_a_limit_chooses_among_figures():
    records = [run(0, 0.5), run(1, 0.6, limit=16, n=16)]
    filled = fill_table(TABLE, records, compose, ["eval.limit=16"])
    assert filled.cells[0][0].values == {1: 0.6}
    assert "A & co, X: 1 runs with another eval.limit are left out" in filled.remarks
    assert "A & co, X: tested on the first 16 problems only" in filled.remarks


def test_other_code_and_packages_are_a_note():
    other = run(1, 0.6, code={"commit": "b" * 40, "dirty": True}, packages={"torch": "2.1"})
    remarks = " ".join(fill_table(TABLE, [run(0, 0.5), other], compose).remarks)
    assert "1 of 2 runs were made by code with changes" in remarks
    assert "aaaaaaaa, bbbbbbbb" in remarks
    assert "versions of torch: 2.0, 2.1" in remarks


def test_the_formats_hold_ours_and_theirs():
    texts = in_every_format(fill_table(TABLE, [run(0, 0.50), run(1, 0.54)], compose), ["read twice"])
    # 12.7062 · 2.8284 / √2 = 25.41 on both sides.
    ours = "52.00 ± 2.83 [26.59 … 77.41] (2)"
    assert f"{ours}<br>published 59.26 [1]<br>published 42.08 ± 0.50 [2]" in texts["markdown"]
    assert "- [2] GA" in texts["markdown"] and "- read twice" in texts["markdown"]
    assert r"52.00 $\pm$ 2.83 [26.59 \ldots{} 77.41] (2)" in texts["latex"]
    assert r"A \& co" in texts["latex"] and "Published: [1] One; [2] GA." in texts["latex"]
    table = texts["latex"].split(r"\toprule")[1].split(r"\bottomrule")[0]
    rows = [row for row in table.replace(r"\&", "").splitlines() if "&" in row]
    assert [row.count("&") for row in rows] == [4, 4, 4, 4]
    line = next(line for line in texts["text"].splitlines() if line.startswith("A & co"))
    assert line.split() == "A & co X, % 52.00 ± 2.83 2 26.59 … 77.41 59.26 One".split()
    numbers = list(csv.DictReader(io.StringIO(texts["csv"])))
    assert [float(row["ours"]) for row in numbers[:2]] == pytest.approx([52.0, 52.0])
    assert [(row["published"], row["published_std"], row["source"]) for row in numbers[:2]] == [
        ("59.26", "", "One"),
        ("42.08", "0.5", "GA"),
    ]
    assert float(numbers[0]["low95"]) == pytest.approx(26.588, abs=1e-3)


def test_a_real_experiment_is_found_again_however_it_was_started(tmp_path, monkeypatch, capsys):
    table = Table("t", "t", "s", (0, 1), COLUMNS[:1], (Line("LoRA", {"x": "tiny_lora"}, {}),))
    started = compose_experiment(
        "tiny_lora", ["seed=1", "model.saving=true", "eval.max_new_tokens=7", "results_dir=r"]
    )
    store(tmp_path, record_of(1, 0.25, config=started), falling_loss(8))
    store(tmp_path, record_of(0, 0.25, config=compose_experiment("tiny_lora", ["model.epochs=2"])))
    program = load_script("make_table")
    monkeypatch.setattr(program, "find_table", lambda name: table)
    monkeypatch.setattr(sys, "argv", ["make_table.py", str(tmp_path), "--table", "t", "--format", "latex"])
    program.main()
    printed = capsys.readouterr().out
    assert r"LoRA & 25.00 (1)" in printed
    assert f"to fill: python run_exp.py experiment=tiny_lora seed=0 results_dir={tmp_path}" in printed
    written = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert {"table_t.md", "table_t.tex", "table_t.csv", "table_t_loss.png"} <= written
    monkeypatch.setattr(sys, "argv", ["make_table.py", str(tmp_path), "--table", "t", "model.epochs=2"])
    program.main()
    assert "25.00  1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=tiny"], "model=tiny: overrides go with --table"),
        (["a", "b"], "b: a second folder beside a"),
        (["nowhere"], "nowhere: no such folder"),
        (
            ["runs", "--metric", "tset"],
            "--metric tset: no finished run has it (did you mean 'test'?); there are",
        ),
        (["--table", "t", "model.epoch=2"], "experiment tiny_lora: unknown config key 'model.epoch'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, monkeypatch, tmp_path):
    table = Table("t", "t", "s", (0,), COLUMNS[:1], (Line("LoRA", {"x": "tiny_lora"}, {}),))
    store(tmp_path / "runs", run(0, 0.5))
    for name in ("make_table", "make_report"):
        program = load_script(name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(program, "find_table", lambda name: table)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            program.main()
        assert str(ended.value.code).startswith(f"error: {message}"), ended.value.code
        assert "\n" not in str(ended.value.code)
        files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert files == {"record.json", "metrics.jsonl"}


def test_of_copies_the_finished_one_counts_and_damage_is_said(tmp_path):
    store(tmp_path / "a", run(0, 0.5, ended="2026-01-02"))
    store(tmp_path / "b", run(0, None, status="failed", ended="2026-01-03"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "record.json").write_text("{")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "record.json").write_text('{"status": "finished"}')
    records = load_records(tmp_path)
    assert records.damaged[1].startswith(f"{tmp_path}/d/record.json: not a run record, it has no run_id")
    assert [record["status"] for record in records.all] == ["finished"]
    assert records.remarks == (
        f"tiny-m-lora-lr0.001-s0 is there 2 times; the one in {tmp_path / 'a'} counts",
    )
    with pytest.raises(UserError, match=f"{tmp_path}/c/record.json: damaged"):
        records.check_whole()


def test_figures_are_found_by_their_path():
    record = {"metrics": {"loss": 1.5, "lm_eval/x.y": {"value": 2.0, "others": {"pass@1": {"value": 3.0}}}}}
    assert figure_at(record, "loss") == {"value": 1.5}
    assert figure_at(record, "lm_eval/x.y")["value"] == 2.0
    assert figure_at(record, "lm_eval/x.y.others.pass@1")["value"] == 3.0
    assert figure_at(record, "lm_eval/x") is None


def test_a_setting_is_the_same_as_whole_and_as_real_number():
    config = config_of().model_dump()
    other = config_of(3).model_dump()
    other["peft"]["lora_alpha"] = float(config["peft"]["lora_alpha"])
    other["results_dir"] = "elsewhere"
    assert settings_key(config) == settings_key(other)
    other["peft"]["lora_r"] = 4
    assert settings_key(config) != settings_key(other)


def test_without_runs_there_is_the_papers_side_alone(tmp_path, monkeypatch, capsys):
    program = load_script("make_table")
    table = Table("t", "t", "s", (0,), COLUMNS[:1], (Line("LoRA", {"x": "a"}, LINES[0].published),))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "find_table", lambda name: table)
    monkeypatch.setattr(program, "compose_experiment", compose)
    monkeypatch.setattr(sys, "argv", ["make_table.py", "--table", "t"])
    program.main()
    printed = capsys.readouterr().out
    assert "59.26" in printed and "to fill: python run_exp.py experiment=a seed=0\n" in printed
    assert not any(tmp_path.iterdir())


def test_the_programs_refuse_what_must_not_be_averaged(tmp_path, monkeypatch):
    for record in (run(0, 0.5), run(1, 0.6, data="other")):
        store(tmp_path, record)
    for name in ("make_table", "make_report"):
        program = load_script(name)
        monkeypatch.setattr(program, "find_table", lambda name: TABLE)
        monkeypatch.setattr(program, "compose_experiment", compose)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", str(tmp_path), "--table", "small"])
        with pytest.raises(SystemExit, match="error: table small, A & co, X: runs that differ"):
            program.main()
        assert not any(path.is_file() for path in tmp_path.iterdir())
