"""The table of all runs averages those that differ in the seed alone, and names what is missing."""

import csv
import io
import sys
from pathlib import Path

import pytest
from conftest import run_program
from stored_runs import config_of, falling_loss, record_of, store

from lora_one.reports.reading import init_seconds
from lora_one.reports.row_layout import in_every_format
from lora_one.reports.rows import HEADER, distinguishing_settings, group, notes, usual_settings
from lora_one.reports.summary import spread


def with_model(seed: int, test: float | None, **model) -> dict:
    return record_of(seed, test, config=config_of(seed, **model))


def cells(row) -> dict[str, str]:
    return dict(zip(HEADER, row.cells("test"), strict=True))


def test_seeds_are_averaged_and_nothing_else_is():
    rows = group([record_of(0, 0.6), record_of(1, 0.8), with_model(0, 0.5, learning_rate=1e-3)])
    assert [len(row.finished) for row in rows] == [2, 1]
    by_rate = {cells(row)["learning rate"]: cells(row) for row in rows}
    assert by_rate["0.0002"]["{metric}"] == "70.0% ± 14.1%"
    # 12.706 · 0.1 on both sides of the mean.
    assert by_rate["0.0002"]["95 % interval"] == "-57.1% … 197.1%"
    assert by_rate["0.0002"]["init s"] == "3.0 ± 0.0"
    assert (by_rate["0.001"]["n"], by_rate["0.001"]["{metric}"]) == ("1", "50.0%")


def test_other_data_weights_or_test_sizes_are_rows_of_their_own():
    rows = group(
        [
            record_of(0, 0.6),
            record_of(1, 0.8, n=16),
            record_of(2, 0.7, data="other"),
            record_of(3, 0.7, model={"fingerprint": "v"}),
        ]
    )
    assert [len(row.finished) for row in rows] == [1, 1, 1, 1]
    assert {row.settings for row in rows} == {
        "data d, weights w, test n=16",
        "data d, weights w, test n=500",
        "data other, weights w",
        "data d, weights v",
    }


def test_what_is_missing_is_named():
    rows = group([record_of(0, 0.6), record_of(1, status="failed", error="out of\nmemory")])
    assert notes(rows) == ["missing: tiny lora seed 1 is failed: out of memory"]
    rows = group([record_of(0, 0.6), record_of(1, 0.6), with_model(0, 0.7, learning_rate=1e-3)])
    assert notes(rows) == ["missing: tiny lora seed 1 was not run"]


def test_settings_that_tell_rows_apart_are_shown():
    assert distinguishing_settings([with_model(0, 0.6), with_model(0, 0.6, max_length=64)]) == [
        "model.max_length=1024",
        "model.max_length=64",
    ]


def test_of_many_settings_each_row_names_its_own():
    changes = [{}, {}, {"max_length": 64}, {"weight_decay": 0.5}, {"epochs": 2.0, "bf16": True}]
    records = [with_model(seed, 0.6, **change) for seed, change in enumerate(changes)]
    assert distinguishing_settings(records) == [
        "",
        "",
        "model.max_length=64",
        "model.weight_decay=0.5",
        "model.bf16=True, model.epochs=2.0",
    ]
    (usual,) = usual_settings(records)
    assert usual == (
        "tiny lora: where a row does not say otherwise, model.bf16=False, model.epochs=1.0, "
        "model.max_length=1024, model.weight_decay=0.0"
    )


@pytest.mark.parametrize(
    ("values", "text"), [([], "-"), ([None], "-"), ([0.5], "50.0%"), ([0.5, None, 0.7], "60.0% ± 14.1%")]
)
def test_spread(values, text):
    assert spread(values, "{:.1%}") == text


def test_every_format_holds_the_same():
    failed = record_of(2, status="failed", error="a | <b>")
    rows = group([record_of(0, 0.6), record_of(1, 0.8), failed])
    texts = in_every_format(rows, "test", ["read twice"])
    for form in ("text", "markdown"):
        assert "70.0% ± 14.1%" in texts[form]
    assert "a \\| &lt;b>" in texts["markdown"]  # an error is no markup
    assert r"70.0\% $\pm$ 14.1\%" in texts["latex"]
    (numbers,) = csv.DictReader(io.StringIO(texts["csv"]))
    assert (float(numbers["test"]), int(numbers["n"])) == (pytest.approx(0.7), 2)
    assert float(numbers["test_std"]) == pytest.approx(0.02**0.5)
    assert all("read twice" in texts[form] for form in ("text", "markdown", "latex"))
    head = in_every_format(rows, "validation_loss")["text"].splitlines()[0]
    assert head.endswith("init s     train s") and " loss " not in head  # once is enough


def test_no_records_is_one_line(tmp_path: Path):
    done = run_program(sys.executable, "scripts/make_table.py", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}: no record.json below it")


def test_the_program_leaves_tables_and_figures_that_say_something(tmp_path: Path):
    for seed in (0, 1):
        store(tmp_path, record_of(seed, 0.5), falling_loss(8))
    done = run_program(sys.executable, "scripts/make_table.py", str(tmp_path), "--format", "csv")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("dataset,method,")
    written = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert written == {
        *("table.md", "table.tex", "table.csv"),
        *("loss.png", "loss_time.png", "validation.png", "accuracy.png", "accuracy_time.png"),
    }  # one learning rate says nothing about others


def test_a_table_counts_a_gradient_with_what_it_took_to_make():
    stages = {"gradient": {"seconds": 30.0}, "init": {"seconds": 1.0}}
    own = {"stages": stages, "gradient": {"seconds": 29.0, "cache_file": None}}
    waited = {"stages": stages, "gradient": {"seconds": 29.0, "cache_file": "somewhere"}}
    assert init_seconds(own) == 31
    assert init_seconds(waited) == 30
