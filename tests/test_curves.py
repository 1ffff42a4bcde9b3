"""Curves are means over seeds at common steps; thinning keeps their ends and their spikes."""

import pytest
from stored_runs import config_of, falling_loss, record_of, store

from lora_one.reports.curves import Curve, Point, figures_of, mean_curve, thinned
from lora_one.reports.page_data import figure_data
from lora_one.reports.rows import group


def figures(root, records, points):
    folders = {record["run_id"]: store(root, record, points) for record in records}
    return {figure.name: figure for figure in figures_of(group(records), folders, "test")}


def test_the_mean_is_over_the_steps_that_all_have():
    one = {1: (1.0, 4.0), 2: (2.0, 2.0), 3: (3.0, 1.0)}
    two = {1: (3.0, 8.0), 3: (5.0, 2.0), 4: (6.0, 0.0)}
    assert mean_curve([one, two]) == (Point(2.0, 6.0, 4.0, 8.0), Point(4.0, 1.5, 1.0, 2.0))
    assert mean_curve([]) == ()


def test_time_counts_from_the_pretrained_model(tmp_path):
    # Three seconds of gradient and init, then half a second a step.
    drawn = figures(tmp_path, [record_of(0, 0.5)], falling_loss(8))
    assert [point.x for point in drawn["accuracy"].curves[0].points] == [2, 4, 6, 8]
    assert [point.x for point in drawn["accuracy_time"].curves[0].points] == [4, 5, 6, 7]
    assert [point.y for point in drawn["accuracy_time"].curves[0].points] == [0.125, 0.25, 0.375, 0.5]
    assert "rates" not in drawn


def test_the_loss_is_smoothed(tmp_path):
    (curve,) = figures(tmp_path, [record_of(0, 0.5)], falling_loss(8))["loss"].curves
    # 2, then (0.8 · 2 + 1) / 1.8 of the losses 2 and 1.
    assert [point.y for point in curve.points[:2]] == pytest.approx([2.0, 2.6 / 1.8])
    assert len(curve.points) == 8


def test_rates_are_compared_where_nothing_else_differs(tmp_path):
    kinds = [(1e-3, 8), (1e-3, 8), (2e-3, 8), (5e-3, 4)]
    records = []
    for seed, (rate, length) in enumerate(kinds):
        config = config_of(seed, learning_rate=rate, max_length=length)
        records.append(record_of(seed, 0.2 + 0.2 * seed, config=config))
    drawn = figures(tmp_path, records, falling_loss(4))
    (curve,) = drawn["rates"].curves
    expected = [(1e-3, 0.3, 0.2, 0.4), (2e-3, 0.6, 0.6, 0.6)]
    found = [(point.x, point.y, point.low, point.high) for point in curve.points]
    assert found == [pytest.approx(point) for point in expected]
    assert drawn["rates"].percent and not drawn["rates_loss"].percent


def test_unfinished_runs_are_drawn_where_there_is_nothing_else(tmp_path):
    (curve,) = figures(tmp_path, [record_of(0, status="failed")], falling_loss(4))["loss"].curves
    assert curve.name.endswith("(failed)")


def test_thinning_keeps_ends_and_spikes():
    heights = [1.0] * 10_000
    heights[4321], heights[7654] = 99.0, -5.0
    curve = Curve("c", tuple(Point(float(i), y, y, y) for i, y in enumerate(heights)), 1)
    thin = thinned(curve, 100)
    xs = [point.x for point in thin.points]
    assert len(xs) <= 100 and xs == sorted(xs)
    assert {0.0, 4321.0, 7654.0, 9999.0} <= set(xs)
    assert thinned(curve, 10_000) is curve


def test_what_is_no_number_is_not_drawn(tmp_path):
    points = falling_loss(8)
    points[-2]["loss"] = float("nan")
    drawn = figures(tmp_path, [record_of(0, 0.5)], points)
    (curve,) = figure_data(drawn["loss"])["curves"]
    assert curve["x"] == [1, 2, 3, 4, 5, 6, 7]
    nowhere = [{"step": 1, "loss": float("nan"), "seconds": 1.0}]
    drawn = figures(tmp_path / "other", [record_of(0, 0.5)], nowhere)
    assert figure_data(drawn["loss"])["curves"] == []


def test_at_first_the_best_are_shown(tmp_path):
    records = [
        record_of(0, seed / 20, config=config_of(0, learning_rate=1e-3 * (seed + 1))) for seed in range(15)
    ]
    folders = {
        record["run_id"]: store(tmp_path, record, falling_loss(4, start=2.0 + abs(7 - i)))
        for i, record in enumerate(records)
    }
    loss = next(figure for figure in figures_of(group(records), folders, "test") if figure.name == "loss")
    shown = [curve["first"] for curve in figure_data(loss)["curves"]]
    # The starts 2 to 6 are the best; of the two that start at 7 the first is taken.
    assert shown == [False] * 2 + [True] * 10 + [False] * 3
