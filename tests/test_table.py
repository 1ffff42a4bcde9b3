"""The table averages runs that differ in the seed alone, and names what is missing."""

import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_program

sys.path.insert(0, str(ROOT / "scripts"))

from make_table import distinguishing_settings, group, init_seconds, notes, spread

from lora_one.config import ExperimentConfig


def record(seed: int, value: float | None, status="finished", n=500, data="d", **model) -> dict:
    method = "lora"
    config = ExperimentConfig.model_validate(
        {
            "dataset": {"name": "tiny"},
            "model": {"name": "m", **model},
            "init": {"mode": "simple"},
            "seed": seed,
        }
    )
    return {
        "run_id": f"{method}-{seed}",
        "method": method,
        "status": status,
        "error": "out of memory" if status == "failed" else None,
        "seed": seed,
        "config": config.model_dump(),
        "metrics": {"validation_loss": 0.5}
        | ({"test": {"value": value, "n": n}} if value is not None else {}),
        "stages": {"init": {"seconds": 1.0}, "gradient": {"seconds": 2.0}},
        "training": {"seconds": 10.0},
        "data": {"fingerprint": data},
    }


def test_seeds_are_averaged_and_nothing_else_is():
    rows = group([record(0, 0.6), record(1, 0.8), record(0, 0.5, learning_rate=1e-3)])
    assert [len(row.finished) for row in rows] == [2, 1] or [len(row.finished) for row in rows] == [1, 2]
    cells = {row.cells("test")[3]: row.cells("test") for row in rows}
    assert cells["0.0002"][5] == "70.0% ± 14.1%"
    assert cells["0.0002"][7] == "3.0 ± 0.0"
    assert cells["0.001"][4:6] == ["1", "50.0%"]


def test_other_data_or_test_sizes_are_rows_of_their_own():
    rows = group([record(0, 0.6), record(1, 0.8, n=16), record(2, 0.7, data="other")])
    assert [len(row.finished) for row in rows] == [1, 1, 1]
    assert {"test n=16", "test n=500"} < {row.settings for row in rows}


def test_what_is_missing_is_named():
    rows = group([record(0, 0.6), record(1, None, status="failed"), record(0, 0.7, learning_rate=1e-3)])
    remarks = notes(rows)
    assert any("seed 1 is failed: out of memory" in remark for remark in remarks)
    assert any("seed 1 was not run" in remark for remark in remarks)
    stopped = record(1, None, status="unfinished") | {"error": "stopped by SIGTERM after step 3 of 5"}
    (remark,) = notes(group([record(0, 0.6), stopped]))
    assert remark.endswith("seed 1 is unfinished: stopped by SIGTERM after step 3 of 5")


def test_settings_that_tell_rows_apart_are_shown():
    assert distinguishing_settings([record(0, 0.6), record(0, 0.6, max_length=64)]) == [
        "model.max_length=1024",
        "model.max_length=64",
    ]


@pytest.mark.parametrize(
    ("values", "text"), [([], "-"), ([None], "-"), ([0.5], "50.0%"), ([0.5, None, 0.7], "60.0% ± 14.1%")]
)
def test_spread(values, text):
    assert spread(values, "{:.1%}") == text


def test_no_records_is_one_line(tmp_path: Path):
    done = run_program(sys.executable, "scripts/make_table.py", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}: no record.json below it")


def test_a_table_counts_a_gradient_with_what_it_took_to_make():
    stages = {"gradient": {"seconds": 30.0}, "init": {"seconds": 1.0}}
    own = {"stages": stages, "gradient": {"seconds": 29.0, "cache_file": None}}
    waited = {"stages": stages, "gradient": {"seconds": 29.0, "cache_file": "somewhere"}}
    assert init_seconds(own) == 31
    assert init_seconds(waited) == 30
