"""The commands of docs/laptop.md and docs/preemptible.md."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, only_run, run_script

PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def commands(page: str) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def test_a_laptops_commands(cli, tmp_path):
    first, plan, status = commands("laptop.md")
    results = f"results_dir={tmp_path}/results"
    done = cli(*shlex.split(first)[2:], results)
    assert done.returncode == 0, done.stderr
    planned = cli(*shlex.split(plan)[2:], results)
    assert "targets " in planned.stdout, planned.stderr
    table = run_script(*shlex.split(status.replace("results_debug", f"{tmp_path}/results"))[1:])
    assert "1 runs: 1 finished" in table.stdout, table.stderr


def test_a_machine_that_is_warned_again_and_again(tmp_path):
    """The loop starts the run again after each warning, until it is finished."""
    loop, warn = commands("preemptible.md")
    ours = f"results_dir={tmp_path} debug=short model.max_steps=80 model.epochs=80 eval.task=null"
    assert "results_dir=results" in loop
    process = subprocess.Popen(
        ["bash", "-c", loop.replace("results_dir=results", ours)],
        cwd=ROOT,
        env=os.environ | {"PATH": PATH, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not any(path.read_text().count("\n") > 3 for path in tmp_path.rglob("metrics.jsonl")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        # The pattern of the page would reach other runs of this machine; ours has its own words.
        pattern = f"^[^ ]*python[^ ]* run_exp.py .*{tmp_path}"
        subprocess.run(shlex.split(warn.replace("run_exp.py", shlex.quote(pattern))), check=True)
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    assert errors.count("stopped by SIGTERM after step") == 1
    record = json.loads((only_run(tmp_path) / "record.json").read_text())
    assert record["status"] == "finished"
    assert record["training"]["resumed_from_step"] > 0
    assert record["training"]["n_steps"] == 80


@pytest.mark.parametrize(("codes", "expected"), [((75, 75, 0), 0), ((75, 1), 1), ((2,), 1), ((76,), 1)])
def test_the_loop_goes_on_only_from_an_unfinished_run(tmp_path, codes, expected):
    loop, _ = commands("preemptible.md")
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!/bin/bash\necho >> {tmp_path}/starts\ncodes=({' '.join(map(str, codes))})\n"
        f"exit ${{codes[$(wc -l < {tmp_path}/starts) - 1]}}\n"
    )
    stand_in.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", loop], env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, timeout=30
    )
    assert done.returncode == expected
    assert (tmp_path / "starts").read_text().count("\n") == len(codes)
