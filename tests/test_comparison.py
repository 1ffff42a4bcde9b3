"""Fair comparison: the search, the statistics and the verdict on their own, then whole comparisons."""

import json
import math
import re
import shlex
import shutil

import pytest
from conftest import ROOT
from omegaconf import OmegaConf
from scipy import stats
from test_config import parse
from test_interruption import record_of

from lora_one.comparison.analysis import LOSS, analyse
from lora_one.comparison.report import as_tree, markdown
from lora_one.comparison.results import Comparison, Final, Method, Trial
from lora_one.comparison.search import FAILED, Line, Point, Space, log_grid, plan, walk
from lora_one.comparison.settings import check_arguments, read_settings
from lora_one.comparison.statistics import (
    compare,
    first_at_or_below,
    geometric,
    holm,
    mean_curve,
)
from lora_one.comparison.verdict import verdict
from lora_one.config import ModelConfig
from lora_one.errors import UserError
from lora_one.overrides import normalise_overrides
from lora_one.summaries import summarise
from lora_one.sweeps import prepare_engines
from lora_one.training import TrainPlan

# --- the search


def test_a_log_grid_has_the_usual_numbers_and_goes_on_beyond_its_ends():
    line = log_grid(5.6e-3, 5, per_decade=4)
    assert [line.value(i) for i in range(5)] == [1.8e-3, 3.2e-3, 5.6e-3, 1e-2, 1.8e-2]
    assert [line.value(i) for i in (-3, -1, 5, 7)] == [3.2e-4, 1e-3, 3.2e-2, 1e-1]
    assert [log_grid(2e-4, 3, per_decade=2).value(i) for i in range(3)] == [1e-4, 3.2e-4, 1e-3]


def test_given_values_stay_as_they_are():
    line = Line((1e-3, 1.725e-3), 10**0.5, digits=2, given=True)
    assert [line.value(i) for i in (-1, 0, 1, 2)] == [3.2e-4, 1e-3, 1.725e-3, 5.5e-3]


def walked(loss, first, widest=8):
    """Runs a walk to its end; what it tried, in order, and where it ended."""
    known: dict[int, float] = {}
    tried: list[int] = []
    for _ in range(100):
        found = walk(known.get, first, range(first[0] - widest, first[-1] + widest + 1))
        if not found.asks:
            return tried, found
        assert not set(found.asks) & known.keys()
        tried += found.asks
        known |= {number: loss(number) for number in found.asks}
    raise AssertionError("it does not end")


@pytest.mark.parametrize(
    ("best", "extra"),
    [(2, []), (1, []), (4, [5]), (6, [5, 6, 7]), (0, [-1]), (-2, [-1, -2, -3])],
)
def test_a_grid_grows_until_its_best_has_two_neighbours(best, extra):
    tried, found = walked(lambda number: (number - best) ** 2, range(5))
    assert tried == [0, 1, 2, 3, 4, *extra]
    assert (found.best, found.edge) == (best, None)


def test_growing_is_bounded_and_the_bound_is_said():
    tried, found = walked(lambda number: -number, range(3), widest=2)
    assert (tried, found.best, found.edge) == ([0, 1, 2, 3, 4], 4, "highest")
    tried, found = walked(lambda number: number, range(3), widest=0)
    assert (tried, found.best, found.edge) == ([0, 1, 2], 0, "lowest")


def test_what_diverges_is_infinitely_bad():
    tried, found = walked(lambda number: math.inf if number > -2 else -number, range(3))
    assert (tried, found.best, found.edge) == ([0, 1, 2, -1, -2, -3], -2, None)
    tried, found = walked(lambda number: math.inf if number > 1 else (number - 1) ** 2, range(3))
    assert (tried, found.best, found.edge) == ([0, 1, 2], 1, None)
    assert walked(lambda _: math.inf, range(3), widest=2)[1].best is None


def test_failures_are_no_reason_to_go_on():
    tried, found = walked(lambda _: FAILED, range(3))
    assert (tried, found.best) == ([0, 1, 2], None)
    tried, found = walked(lambda number: FAILED if number == 3 else -number, range(3))
    assert (tried, found.best, found.edge) == ([0, 1, 2, 3], 2, None)


def test_of_equals_the_lower_rate_is_taken():
    assert walked(lambda _: 1.0, range(3), widest=0)[1].best == 0


def searched(space, loss):
    known: dict[Point, float] = {}
    for _ in range(100):
        found = plan(space, known)
        if not found.asks:
            return known, found
        assert not set(found.asks) & known.keys()
        known |= {point: loss(point) for point in found.asks}
    raise AssertionError("it does not end")


SPACE = Space(log_grid(1e-2, 5, 4), Line((32.0, 128.0, 512.0), 4.0), gamma_start=1)


def bowl(point, rate, gamma, tilt=0.0):
    x, y = 4 * math.log10(point.rate / rate), math.log(point.gamma / gamma, 4)
    return 1 + (x + tilt * y) ** 2 + y**2


def test_the_coordinate_search_finds_the_bottom_of_a_bowl():
    known, found = searched(SPACE, lambda point: bowl(point, rate=3.2e-2, gamma=8))
    assert found.best == Point(3.2e-2, 8)
    assert found.remarks == ()
    # Six rates at γ 128, four further γ at the best rate, that rate's two neighbours at the best γ.
    assert len(known) == 6 + 4 + 2


def test_the_rate_is_looked_for_again_at_the_new_gamma():
    _, found = searched(SPACE, lambda point: bowl(point, rate=1e-2, gamma=8, tilt=0.8))
    assert found.best is not None
    assert found.best.gamma < 128
    at_default = min((bowl(Point(SPACE.rates.value(i), 128.0), 1e-2, 8, 0.8), i) for i in range(-4, 9))
    assert found.best.rate != SPACE.rates.value(at_default[1])


def test_the_best_is_the_lowest_of_all_that_were_tried():
    known, found = searched(SPACE, lambda point: hash((point.rate, point.gamma)) % 997)
    assert known[found.best] == min(known.values())


def test_a_known_search_asks_for_nothing():
    known, found = searched(SPACE, lambda point: bowl(point, 1e-2, 128))
    assert plan(SPACE, known) == found


def test_without_gamma_only_rates_are_tried():
    known, found = searched(Space(log_grid(1e-2, 3, 4)), lambda point: abs(math.log(point.rate / 1e-2)))
    assert (len(known), found.best) == (3, Point(1e-2))


def test_a_method_that_only_fails_has_no_best():
    known, found = searched(SPACE, lambda _: FAILED)
    assert (len(known), found.best, found.asks) == (5, None, ())


def test_a_bound_is_said_of_the_last_search_only():
    space = Space(Line((1.0, 2.0, 4.0), 2.0), Line((1.0, 4.0, 16.0), 4.0), 1, widest=1)
    _, found = searched(space, lambda point: -point.rate * (1 if point.gamma == 4 else 0.5))
    assert found.best == Point(8.0, 4.0)
    assert found.remarks == ("its best rate, 8, is the highest that was allowed: the best may lie beyond",)


# --- the statistics


def test_the_interval_is_students():
    found = summarise([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.n, found.mean) == (5, 3.0)
    assert found.std == pytest.approx(math.sqrt(2.5))
    assert found.high - found.mean == pytest.approx(2.776445 * math.sqrt(2.5 / 5), abs=1e-5)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert summarise([7.0]).low is None


def test_ratios_are_averaged_as_logarithms():
    found = geometric([0.5, 2.0])
    assert found.mean == pytest.approx(1.0)
    assert found.low * found.high == pytest.approx(1.0)
    # Half the difference of the logarithms, times the quantile 12.706 of one degree of freedom.
    assert math.log(found.high) == pytest.approx(12.7062 * math.log(2), rel=1e-4)
    assert geometric([0.25]).mean == pytest.approx(0.25)


def test_the_paired_test_is_scipys():
    mine, theirs = {0: 0.1, 1: 0.25, 2: 0.2, 3: 9.0}, {0: 0.3, 1: 0.35, 2: 0.5, 7: 1.0}
    found = compare(mine, theirs)
    assert found.difference.n == 3
    assert found.difference.mean == pytest.approx(-0.2)
    assert found.p == pytest.approx(stats.ttest_rel([0.1, 0.25, 0.2], [0.3, 0.35, 0.5]).pvalue)
    assert compare({0: 1.0}, {1: 1.0}) is None
    assert compare({0: 1.0}, {0: 2.0}).p is None
    assert compare({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1
    assert compare({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}).p == 0


def test_holms_correction_on_hand_made_numbers():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.5}) == pytest.approx({"b": 1.0, "a": 1.0})
    assert holm({}) == {}


@pytest.mark.parametrize(
    ("target", "place"),
    [(3.0, 10.0), (2.0, 20.0), (1.5, 25.0), (1.0, 30.0), (0.9, None), (5.0, 10.0)],
)
def test_the_first_crossing_lies_on_the_line_between_two_measurements(target, place):
    curve = [(10.0, 3.0), (20.0, 2.0), (30.0, 1.0), (40.0, 2.5)]
    assert first_at_or_below(curve, target) == place


def test_the_first_crossing_counts():
    assert first_at_or_below([(1.0, 4.0), (2.0, 1.0), (3.0, 4.0), (4.0, 0.0)], 2.5) == 1.5
    assert first_at_or_below([], 1.0) is None


def test_a_mean_curve_has_the_places_of_all():
    assert mean_curve([[(1, 4.0), (2, 2.0)], [(1, 2.0), (2, 1.0), (3, 0.0)]]) == [(1, 3.0), (2, 1.5)]
    assert mean_curve([]) == []


# --- the verdict


def final(seed, losses, test, seconds=1.0):
    curve = tuple((10 * (i + 1), loss, seconds * (i + 1)) for i, loss in enumerate(losses))
    scores = {"test": {"value": test, "metric": "exact_match", "is_share": True}}
    return Final(seed, losses[-1], scores, curve, 0.5, 1e9, seconds * len(losses), 1e9, 100, 40, 1)


def method(name, runs, missing=()):
    return Method(
        name, [], Point(1e-2), [], [Trial(1e-2, None, 0.1), Trial(1.0, None, math.inf)], 2,
        {run.seed: run for run in runs}, missing,
    )  # fmt: skip


NOISE = [0.0, 0.01, -0.01, 0.02, -0.02]


@pytest.fixture
def comparison():
    """Four measurements at steps 10 … 40: LoRA ends at 1, half of its steps suffice for the fast one."""
    fast = ["init=default", "model.max_steps=20"]
    settings = read_settings({"methods": {"LoRA": [], "fast": fast, "same": [], "bad": []}})
    kinds = {
        "LoRA": ([4, 3, 2, 1], 0.5, NOISE),
        "fast": ([2, 1, 0.5, 0.25], 0.7, NOISE),
        "same": ([4, 3, 2, 1], 0.5, NOISE[::-1]),
        "bad": ([4, 3, 2.5, 2], 0.3, NOISE),
    }
    methods = [
        method(name, [final(s, [x + noise[s] for x in losses], score + noise[s] ** 2) for s in range(5)])
        for name, (losses, score, noise) in kinds.items()
    ]
    setup = {"dataset": "d", "model": "m", "rank": 8, "batch": 4, "steps": 40, "rows": {}, "commits": ["abc"]}
    return Comparison(settings, methods, setup | {"hardware": {"gpus": [], "threads": 1}})


def test_the_verdict_names_who_is_better_who_is_worse_and_who_cannot_be_told(comparison):
    score, loss, speed = verdict(analyse(comparison))
    assert score.startswith("test exact match: fast has the best mean, 70")
    assert "Better than LoRA, corrected for 3 tests: fast (-0.7500, p < 0.001)." in loss
    assert "Worse than LoRA: bad (+1.0000, p < 0.001)." in loss
    assert "Not told from LoRA: same (+0.0000, p 1.000)." in loss
    assert "sooner, with an interval below 1: fast (0.50 (0.50–0.50) of the steps)." in speed
    assert "Not there with every seed by the last step: same, bad." in speed


def test_steps_to_the_target_are_counted_on_hand_made_curves(comparison):
    found = analyse(comparison)
    assert found.target == pytest.approx(1.0)
    speed = found.speeds["fast"]
    assert (speed.steps, speed.n_reached, speed.n_seeds) == (pytest.approx(20), 5, 5)
    assert speed.step_ratio.mean == pytest.approx(0.5)
    # Half a second to start, a second for ten steps.
    assert speed.time_ratio.mean == pytest.approx((0.5 + 2) / (0.5 + 4))
    assert found.speeds["LoRA"].step_ratio.mean == pytest.approx(1)
    assert (found.speeds["bad"].steps, found.speeds["bad"].step_ratio) == (None, None)
    assert found.speeds["same"].n_reached == 3


def test_missing_runs_are_named_and_nothing_is_made_of_them(comparison):
    bad = method("bad", [], missing=["seed 0 is failed: why"])
    fewer = Comparison(comparison.settings, [*comparison.methods[:3], bad], comparison.setup)
    found = analyse(fewer)
    assert "bad" not in found.figures[LOSS]
    assert "bad" not in found.tests[LOSS]
    assert "corrected for 2 tests" in verdict(found)[1]
    assert verdict(found)[-1] == "Runs are missing of bad; what that changes is unknown."
    text = markdown(found, ["scores.png"])
    assert "- bad: seed 0 is failed: why" in text
    assert "1: diverged" in text
    assert "- fast: `init=default model.max_steps=20`" in text
    json.dumps(as_tree(found), allow_nan=False)


def test_a_baseline_without_results_is_said():
    settings = read_settings({"methods": {"LoRA": [], "other": []}})
    methods = [method("LoRA", [], ["x"]), method("other", [final(0, [1.0], 0.5), final(1, [1.1], 0.5)])]
    found = analyse(Comparison(settings, methods, {}))
    assert found.speeds == {}
    assert f"{LOSS}: LoRA has no result, so nothing is told." in verdict(found)


# --- what is asked for


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"only": ["LoRA", "LoRA-Onne"]}, "only: there is no method 'LoRA-Onne' (did you mean 'LoRA-One'?)"),
        ({"centres": {"x": 1.0}}, "centres: there is no method 'x'"),
        ({"only": ["LoRA-One", "PiSSA"]}, "baseline=LoRA: is not among the methods compared"),
        ({"only": ["LoRA"]}, "one method is no comparison"),
        ({"seeds": [0]}, "hydra.sweeper.seeds=[0]: list should have at least 2 items"),
        ({"seeds": [0, 0]}, "seeds=[0, 0]: one stands there twice"),
        ({"seeds": [0, 100]}, "100 is one of hydra.sweeper.seeds too"),
        ({"tuning_seeds": []}, "tuning_seeds=[]"),
        ({"rates": {"LoRA": []}}, "rates.LoRA=[]: give different learning rates"),
        ({"rates": {"LoRA": [-1.0]}}, "rates.LoRA.0=-1.0: input should be greater than 0"),
        ({"points": 1}, "points=1"),
        ({"name": "../x"}, "name=../x"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_in_one_line(keys, words):
    methods = {"LoRA": [], "LoRA-One": [], "PiSSA": []}
    with pytest.raises(UserError) as raised:
        read_settings({"methods": methods, **keys})
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_the_comparison_or_a_method_gives_is_refused():
    settings = read_settings(
        {"methods": {"LoRA": ["init=default"], "B": ["++peft.dora=true", "peft=full_ft"]}}
    )
    check_arguments(["++peft.lora_r=4", "peft=qv", "++model.max_steps=3"], settings)
    for argument, words in (
        ("++seed=3", "use hydra.sweeper.seeds"),
        ("++init.stable_gamma=3", "use hydra.sweeper.gamma_factor"),
        ("init=pissa", "method LoRA gives it"),
        ("++peft.dora=false", "method B gives it"),
    ):
        with pytest.raises(UserError, match=words):
            check_arguments([argument], settings)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hydra.sweeper.only=[LoRA,nobody]"], "there is no method 'nobody'"),
        (["hydra.sweeper.methods.LoRA=['peft.lora_rr=3']"], "unknown config key 'peft.lora_rr'"),
        (
            ["hydra.sweeper.methods.LoRA=['init=defalt']"],
            "init=defalt: no such choice (did you mean 'default'?)",
        ),
        (["model.max_steps=2,3"], "a comparison makes its own lists"),
        (["model.lerning_rate=1"], "unknown config key 'model.lerning_rate'"),
        (["seed=1"], "seed: a comparison gives it to its runs; use hydra.sweeper.seeds"),
    ],
    ids=str,
)
def test_bad_input_is_found_before_any_run_begins(cli, tmp_path, arguments, words):
    done = cli("+experiment=fair_comparison", "debug=short", *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert words in done.stderr
    assert not list(tmp_path.rglob("*.json"))


def test_several_processes_are_refused(cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = cli("+experiment=fair_comparison", "dry_run=true")
    assert done.returncode == 2
    assert "start it without accelerate launch" in done.stderr


def test_a_dry_run_shows_the_methods_and_their_first_rates(cli, tmp_path):
    asked = ("hydra.sweeper.only=[LoRA,LoRA-One,full-FT]", "peft.lora_r=4", "init.iters=4")
    done = cli("+experiment=fair_comparison", "dry_run=true", *asked)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("comparison: 3 methods")
    assert "LoRA-One: rates 0.0018, 0.0032, 0.0056, 0.01, 0.018, then γ 32, 128, 512" in lines
    assert "full-FT: rates 0.00056, 0.001, 0.0018, 0.0032, 0.0056" in lines
    assert not list(tmp_path.rglob("*.json"))


def documented() -> list[list[str]]:
    texts = [
        (ROOT / name).read_text() for name in ("docs/fair-comparison.md", "docs/best-recipe.md", "README.md")
    ]
    blocks = [block for text in texts for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.M)]
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [command for command in commands if "+experiment=fair_comparison" in command]


@pytest.mark.parametrize("command", documented(), ids=" ".join)
def test_commands_on_the_comparison(command, cli):
    """As dry runs of two methods, without their launchers."""
    assert command[:2] == ["python", "run_exp.py"]
    here = [argument for argument in command[2:] if "hydra/launcher" not in argument]
    only = [] if any("hydra.sweeper.only" in a for a in here) else ["hydra.sweeper.only=[LoRA,LoRA-GA]"]
    done = cli(*here, *only, *[a for a in ["dry_run=true"] if a not in here])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("comparison: ")


def test_the_methods_are_what_their_names_say():
    tree = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/hydra/sweeper/fair.yaml"))
    found = {name: parse(*overrides) for name, overrides in tree["methods"].items()}
    assert {name: (config.method, config.peft.use_rslora) for name, config in found.items()} == {
        "LoRA": ("lora", False),
        "rsLoRA": ("lora", True),
        "LoRA+": ("loraplus", False),
        "PiSSA": ("pissa", False),
        "DoRA": ("dora", False),
        "LoRA-GA": ("LoRA-GA", True),
        "LoRA-One": ("LoRA-One", True),
        "LoRA-One-scaled": ("LoRA-One+scaled_adamw", True),
        "LoRA-One-scaled-symmetric": ("LoRA-One+scaled_adamw+symmetric", True),
        "LoRA-scaled": ("lora+scaled_adamw", False),
        "full-FT": ("full-ft", True),
    }
    given = {key: value for key, value in tree.items() if not key.startswith("_")}
    assert read_settings(given).chosen == tree["methods"]


def test_a_launcher_goes_with_the_experiment_without_m():
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the joblib launcher is not installed")
    conf = ROOT / "conf"
    arguments, _ = normalise_overrides(["+experiment=fair_comparison", "hydra/launcher=joblib"], conf)
    assert "hydra.launcher.n_jobs=2" in prepare_engines(arguments, conf)
    with pytest.raises(UserError, match="add -m"):
        prepare_engines(["experiment=tiny_lora", "hydra/launcher=joblib"], conf)


# --- whole comparisons

PAIR = (
    "+experiment=fair_comparison",
    "debug=short",
    "eval.limit=2",
    "hydra.sweeper.only=[LoRA,LoRA-One]",
    "hydra.sweeper.seeds=[0,1]",
    "hydra.sweeper.rates={LoRA:[3e-3,1e-2,3e-2],LoRA-One:[1e-2]}",
    "hydra.sweeper.widest=0",
)


def test_a_comparison_from_the_search_to_the_report_and_again(cli, tmp_path):
    done = cli(*PAIR)
    assert done.returncode == 0, done.stderr
    assert "final runs over seeds [0, 1], 4 of 4 runs to make" in done.stdout
    results = tmp_path / "results"
    records = [record_of(path.parent) for path in results.rglob("record.json")]
    tuning = [r for r in records if r["seed"] == 100]
    finals = [r for r in records if r["seed"] in (0, 1)]
    assert (len(tuning), len(finals)) == (3 + 3, 4)
    assert not any("test" in record["metrics"] for record in tuning)
    assert all(record["metrics"]["test"]["n"] == 2 for record in finals)
    lora = {r["config"]["model"]["learning_rate"]: r for r in tuning if r["method"] == "lora"}
    assert sorted(lora) == [3e-3, 1e-2, 3e-2]
    best = min(lora, key=lambda rate: lora[rate]["metrics"]["validation_loss"])
    assert {r["config"]["model"]["learning_rate"] for r in finals if r["method"] == "lora"} == {best}
    gammas = {r["config"]["init"]["stable_gamma"] for r in tuning if r["method"] == "LoRA-One"}
    assert gammas == {32.0, 128.0, 512.0}
    folder = results / "comparisons" / "tiny-tiny_llama"
    report = json.loads((folder / "report.json").read_text())
    losses = [r["metrics"]["validation_loss"] for r in finals if r["method"] == "lora"]
    assert report["figures"][LOSS]["LoRA"]["mean"] == pytest.approx(sum(losses) / 2)
    assert {path.name for path in folder.iterdir()} == {
        *("report.md", "report.json", "scores.png", "sensitivity.png", "curves.png")
    }
    # One lost run of each phase, one of them killed: only these are made.
    shutil.rmtree(results / finals[0]["run_id"])
    record = results / tuning[0]["run_id"] / "record.json"
    record.write_text(json.dumps(record_of(record.parent) | {"status": "running"}))
    again = cli(*PAIR)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("[training]") == 2
    assert json.loads((folder / "report.json").read_text())["figures"] == report["figures"]
    third = cli(*PAIR)
    assert third.returncode == 0
    assert "[training]" not in third.stdout
    assert third.stdout.splitlines()[-1] == f"report: {folder / 'report.md'}"


def test_runs_that_diverge_or_fail_do_not_stop_a_comparison(cli, tmp_path):
    done = cli(
        *("+experiment=fair_comparison", "debug=short", "eval.task=null", "hydra.sweeper.seeds=[0,1]"),
        "hydra.sweeper.methods.large=['init=default','peft.lora_r=500']",
        "hydra.sweeper.only=[LoRA,large]",
        "hydra.sweeper.rates={LoRA:[1e-3,1e38],large:[1e-3]}",
        *("hydra.sweeper.widest=0", "hydra.sweeper.tune_gamma=false", "hydra.sweeper.name=mine"),
    )
    assert done.returncode == 2
    assert "error: 1 of 5 jobs failed" in done.stderr
    report = json.loads((tmp_path / "results/comparisons/mine/report.json").read_text())
    lora, large = report["methods"]
    assert [trial["loss"] for trial in lora["trials"]][1] == "diverged"
    assert [run["seed"] for run in lora["finals"]] == [0, 1]
    assert large["best"] is None
    assert "peft.lora_r=500: is 500, but" in large["missing"][0]
    assert report["verdict"][-1].startswith("Runs are missing of large")
    assert "| diverged |" in done.stdout


# --- what else it needed


def test_validation_losses_evenly_over_the_training():
    plan = TrainPlan(steps_per_epoch=625, n_steps=225)
    settings = {"name": "m"}
    assert plan.eval_steps(ModelConfig(**settings, eval_points=20)) == 11
    assert plan.eval_steps(ModelConfig(**settings, eval_points=1)) == 225
    assert plan.eval_steps(ModelConfig(**settings, eval_points=500)) == 1
    assert plan.eval_steps(ModelConfig(**settings, eval_epochs=0.08)) == 50


def test_two_rhythms_are_refused(cli):
    done = cli("model.eval_epochs=0.5", "model.eval_points=3", "dry_run=true")
    assert (done.returncode, "leave one out" in done.stderr) == (2, True)
