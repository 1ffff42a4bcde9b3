"""``scripts/status.py``: what is seen of runs from outside, while they run and when their program is gone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, load_script

from lora_one.records import RunLock

status = load_script("status")


def write_run(results, name, points=(), **record):
    folder = results / name
    folder.mkdir(parents=True)
    (folder / "run.lock").touch()
    stored = {"status": "running", "hardware": {"host": socket.gethostname()}, "config": {}} | record
    (folder / "record.json").write_text(json.dumps(stored))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    return folder


def cells(folder, quiet_seconds=600.0):
    return dict(zip(status.HEAD, status.describe(folder, quiet_seconds), strict=True))


POINTS = [{"step": n, "loss": 2.0 / n, "seconds": 3.0 * n} for n in range(1, 11)]


def test_a_running_run_shows_pace_and_loss(tmp_path):
    folder = write_run(tmp_path, "a", POINTS, training={"n_steps": 1210}, doing="training", job="7_3")
    lock = RunLock(folder)
    row = cells(folder)
    lock.release()
    assert (row["state"], row["progress"]) == ("running", "10/1,210, training")
    # 1,200 steps of three seconds.
    assert (row["left"], row["loss"], row["job"]) == ("1:00:00", "0.2000", "7_3")
    assert row["host"] == socket.gethostname()


def test_without_a_lock_it_is_dead_here_and_elsewhere_when_it_is_quiet(tmp_path):
    here = write_run(tmp_path, "here", POINTS)
    there = write_run(tmp_path, "there", POINTS, hardware={"host": "another"})
    assert cells(here)["state"] == "dead"
    assert cells(there)["state"] == "running"
    past = time.time() - 1200
    for path in there.iterdir():
        os.utime(path, (past, past))
    assert cells(there)["state"] == "dead"
    assert cells(there, quiet_seconds=3600)["state"] == "running"


def test_ended_runs_say_why_or_what(tmp_path, capsys):
    write_run(tmp_path, "a", status="failed", error="the loss is not finite at step 3")
    write_run(tmp_path, "b", status="unfinished", error="stopped by SIGTERM")
    write_run(tmp_path, "c", status="finished", metrics={"test": {"metric": "exact_match", "value": 0.5}})
    (write_run(tmp_path, "d") / "record.json").write_text("{")
    assert status.main([str(tmp_path)]) == 0
    table = capsys.readouterr().out
    for words in (
        "the loss is not finite",
        "stopped by SIGTERM",
        "test exact_match 50.0%",
        "d/record.json: damaged",
    ):
        assert words in table
    assert "4 runs: 1 failed, 1 unfinished, 1 finished, 1 damaged" in table
    assert status.main([str(tmp_path), "--state", "failed"]) == 0
    assert "SIGTERM" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--state", "lost"], "--state lost"), ([], "no record.json")]
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, words):
    assert status.main([str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_real_run_is_seen_running_and_then_dead(tmp_path):
    command = [sys.executable, "run_exp.py", "debug=short", "model.max_steps=5000", "model.epochs=5000"]
    run = subprocess.Popen(
        [*command, f"results_dir={tmp_path}", "eval.task=null"],
        cwd=ROOT,
        env=os.environ | {"SLURM_JOB_ID": "41"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not any(path.read_text().count("\n") > 3 for path in tmp_path.rglob("metrics.jsonl")):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        (record,) = tmp_path.rglob("record.json")
        row = cells(record.parent)
        assert (row["state"], row["job"]) == ("running", "41")
        assert row["progress"].endswith("/5,000, training")
        assert row["left"] and float(row["loss"]) > 0
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    row = cells(record.parent)
    assert (row["state"], row["left"]) == ("dead", "")
