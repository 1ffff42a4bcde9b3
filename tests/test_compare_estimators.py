"""What the comparison of estimators prints is what the estimates and the records hold."""

import pytest
import torch
from conftest import run_script

from lora_one.triplets import Triplets, energy_share

SCRIPT = "scripts/compare_estimators.py"


def rows_of(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_energy_is_one_for_the_leading_vectors_and_known_for_others():
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 6, generator=generator))[0] for n in (20, 30))
    S = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.1])
    G = (U * S) @ V.T
    assert energy_share(G, Triplets(U, S, V, float(S.norm())), 2) == pytest.approx(1, abs=1e-5)
    swapped = [0, 2, 1, 3, 4, 5]  # the third instead of the second
    found = Triplets(U[:, swapped], S[swapped], V[:, swapped], float(S.norm()))
    assert energy_share(G, found, 2) == pytest.approx((16 + 4) / (16 + 9), abs=1e-5)


def test_accuracy_of_an_experiment():
    done = run_script(SCRIPT, "accuracy", "dataset.train_size=256", "init.bsz=8")
    assert done.returncode == 0, done.stderr
    rows = {row[0]: [float(value) for value in row[1:]] for row in rows_of(done.stdout)[2:]}
    assert {"q_proj", "down_proj", "all"} <= set(rows)
    assert rows["all"] == [min(row[column] for row in rows.values()) for column in range(4)]
    assert all(value > 0.98 for row in rows.values() for value in row)
    wrong = run_script(SCRIPT, "accuracy", "init.bzs=8")
    assert wrong.returncode == 2
    assert "error: unknown config key 'init.bzs'" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert run_script(SCRIPT, "accuracy", "init=default").returncode == 2


def test_curves_of_runs_that_differ_in_the_estimator_alone(cli, tmp_path):
    results = f"results_dir={tmp_path}/results"
    done = cli("-m", "debug=short", "init.estimator=exact,auto", "seed=0,1", results)
    assert done.returncode == 0, done.stderr
    cli("debug=short", "model.learning_rate=1e-4", "init.estimator=sketch", results)  # has no exact peer
    done = run_script(SCRIPT, "curves", f"{tmp_path}/results")
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)[2:]
    assert [row[1:3] for row in rows] == [["exact", "2"], ["sketch_two_pass", "2"]]
    assert float(rows[1][3]) < float(rows[0][4])  # closer to exact than one seed to another
    empty = run_script(SCRIPT, "curves", str(tmp_path / "nothing"))
    assert empty.returncode == 2
    assert "no finished runs that differ in init.estimator alone" in empty.stderr
