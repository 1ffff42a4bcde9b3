"""Every combination of the groups runs or is refused in one line; nothing ends in a traceback."""

import random
from collections import Counter

import pytest
from conftest import ROOT, load_script
from hydra import initialize_config_dir

PARTS = 4  # so that several processes share them


@pytest.fixture(scope="module")
def script():
    return load_script("try_combinations")


@pytest.fixture(scope="module")
def trees(script):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return list(script.all_trees())


def test_trees_of_single_files_are_what_hydra_composes(script, trees):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for chosen, tree in random.Random(0).sample(trees, 40):
            assert tree == script.composed(chosen)


def test_every_combination_is_valid_or_refused_in_one_line(script, trees):
    outcomes = [script.check(chosen, tree) for chosen, tree in trees]
    print(script.table({"configurations": outcomes}))
    n = {group: len(list((ROOT / "conf" / group).glob("*.yaml"))) for group in script.GROUPS}
    met = Counter(chosen["dataset"] for chosen, _ in trees)
    everything = n["model"] * n["init"] * n["peft"] * n["optimizer"]
    assert len(met) == n["dataset"]
    assert set(met.values()) == {everything, n["model"]}
    n_kinds = sum(count == everything for count in met.values())
    assert n_kinds == 5  # tiny's own evaluation, GSM8K's, by labels, by answer words, and none
    expected = n_kinds * everything + (n["dataset"] - n_kinds) * n["model"]
    counts = Counter(outcome.kind for outcome in outcomes)
    assert counts["ran"] + counts["refused"] == expected == len(outcomes)
    assert min(counts["ran"], counts["refused"]) > expected // 10
    assert all(outcome.text for outcome in outcomes if outcome.kind == "refused")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_two_steps_of_every_way_through_the_code(script, tmp_path, part):
    outcomes = dict(script.try_two_steps(script.save_models(tmp_path), tmp_path, slice(part, None, PARTS)))
    print(script.table({"two steps": list(outcomes.values())}))
    assert len(outcomes) == len(list(script.to_run())[part::PARTS])
    assert {what: outcome for what, outcome in outcomes.items() if outcome.kind == "crashed"} == {}
    # A refusal is for a method that cannot be, never for the models that are tried.
    methods = ("init", "peft.", "optimizer=")
    refusals = [
        outcome.text.removeprefix("error: ") for outcome in outcomes.values() if outcome.kind == "refused"
    ]
    assert [text for text in refusals if not text.startswith(methods)] == []
    assert sum(outcome.kind == "ran" for outcome in outcomes.values()) > len(outcomes) // 2


def test_what_is_neither_a_result_nor_one_line_counts_as_crashed(script, monkeypatch, tmp_path):
    base = [*script.TWO_STEPS, *script.save_models(tmp_path)["Llama"], f"results_dir={tmp_path}/results"]
    assert script.start([*base, "peft.lora_r=4"]).kind == "ran"
    refused = script.start([*base, "peft.lora_r=4000"])
    assert (refused.kind, "peft.lora_r=4000" in refused.text) == ("refused", True)
    monkeypatch.setattr("lora_one.training.weighted_loss", lambda *_: 1 / 0)
    assert script.start([*base, "seed=1", "peft.lora_r=4"]).kind == "crashed"
