"""Configuration: every file composes, every spelling works, every mistake gets one line."""

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lora_one.config import ExperimentConfig, ModelConfig, parse_config, result_identity
from lora_one.errors import UserError
from lora_one.models import empty_model
from lora_one.overrides import named_keys, normalise_overrides
from lora_one.records import run_id

CONF = ROOT / "conf"
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))
# The rows of the papers' tables are composed in test_experiments.py.
HERE = [file for file in FILES if not (file.parts[0] == "experiment" and len(file.parts) == 3)]
REQUIRED = {"init/adapter.yaml": ["init.adapter=folder"], "model/custom.yaml": ["model.name=some/model"]}


def parse(*arguments: str) -> ExperimentConfig:
    overrides, _ = normalise_overrides(list(arguments), CONF)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return parse_config(compose("config", overrides), named_keys(overrides))


def test_number_of_config_files():
    assert len(FILES) == 171


@pytest.mark.parametrize("file", HERE, ids=str)
def test_every_file_composes_into_the_typed_config(file):
    choice = [] if len(file.parts) == 1 else [f"{file.parent}={file.stem}"]
    config = parse(*choice, *REQUIRED.get(str(file), []))
    assert config.model.name
    if file.parts[0] == "dataset":
        assert config.dataset.name == file.stem
    if file.parts[0] == "experiment":
        opening = (CONF / file).read_text().splitlines()[1]
        assert opening == f"# python run_exp.py experiment={file.stem}"


@pytest.mark.parametrize(
    ("published", "plain"),
    [
        (["+init=gradient"], ["init=gradient"]),
        (["+init=default"], ["init=default"]),
        (["+peft=qv"], ["peft=qv"]),
        (["++dataset_name=meta_math"], ["dataset=meta_math"]),
        (["dataset_name=commonsense"], ["dataset=commonsense_reasoning"]),
        (["++init.weight=stable"], ["init.scale=stable"]),
        (["++model.saving=true"], ["model.saving=true"]),
        (["+experiment=tiny_lora"], ["experiment=tiny_lora"]),
    ],
)
def test_published_spellings_mean_the_plain_ones(published, plain):
    assert parse(*published) == parse(*plain)


def test_a_choice_replaces_the_whole_group():
    assert parse("+init=default").init.model_fields_set == {"mode"}
    assert parse("+init=default").method == "lora"


PARAMETERS = {
    "gemma3": 999_885_952,
    "llama": 6_738_415_616,
    "llama3": 8_030_261_248,
    "llama3_1b": 1_235_814_400,
    "mistral": 7_241_732_096,
    "qwen3": 8_190_735_360,
    "t5base": 222_903_552,
    "t5large": 737_668_096,
    "t5small": 60_506_624,
    "tinyllama": 1_100_048_384,
}


def test_the_shapes_of_the_models_are_those_on_the_hub():
    files = {file.stem: OmegaConf.load(CONF / file) for file in FILES if file.parts[0] == "model"}
    assert {name for name, tree in files.items() if "shape" in tree} == PARAMETERS.keys()
    for name, expected in PARAMETERS.items():
        model = empty_model(ModelConfig.model_validate(OmegaConf.to_container(files[name])))
        assert sum(parameter.numel() for parameter in model.parameters()) == expected, name


@pytest.mark.parametrize("size", ["small", "base", "large", "xl"])
def test_the_t5_groups_are_for_pairs(size):
    config = parse(f"model=t5{size}", "dataset=gsm8k").model
    assert (config.is_pair, config.warmup(1000)) == (True, 30)


def test_init_weight_is_mapped_with_a_note():
    overrides, notes = normalise_overrides(["++init.weight=stable"], CONF)
    assert overrides == ["++init.scale=stable"]
    assert "init.weight" in notes[0]


def test_flags_come_before_overrides():
    assert normalise_overrides(["seed=1,2", "-m"], CONF)[0] == ["-m", "++seed=1,2"]


@pytest.mark.parametrize(
    ("dataset", "model"),
    [
        ("tiny", "embedded/tiny_llama"),
        ("meta_math", "meta-llama/Llama-2-7b-hf"),
        ("commonsense", "meta-llama/Llama-2-7b-hf"),
    ],
)
def test_a_dataset_names_its_published_model(dataset, model):
    assert parse(f"dataset={dataset}").model.name == model
    assert parse(f"dataset={dataset}", "model=tinyllama").model.name == "TinyLlama/TinyLlama_v1.1"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["model.lerning_rate=1"],
            "unknown config key 'model.lerning_rate' .did you mean 'model.learning_rate'",
        ),
        (["++seeed=1"], "unknown config key 'seeed' .did you mean 'seed'"),
        (["model.learning_rate=fast"], "model.learning_rate='fast': input should be a valid number"),
        (["peft.lora_r=8.5"], "peft.lora_r=8.5: input should be a valid integer"),
        (["peft.lora_r=0"], "peft.lora_r=0: input should be greater than or equal to 1"),
        (["model.saving=1"], "model.saving=1: input should be a valid boolean"),
        (["init.direction=lora-one"], "did you mean 'LoRA-One'"),
        (["init=gradeint"], "init=gradeint: no such choice .did you mean 'gradient'"),
        (["dataset_name=meta_maths"], "did you mean 'meta_math'"),
        (["model=custom"], "model.name: is required"),
        (["experiment=null"], "experiment=null: no such choice.*tiny_lora_one, .*glue_t5/…, math/…"),
        (
            ["experiment=code/lora_pro"],
            "no such choice .*; valid: code/base, code/lora, code/lora_ga, code/lora_one$",
        ),
        (["experiment=maths/lora"], "did you mean 'math/lora'.*; valid: .*tiny_full_ft"),
        (["peft=full_ft", "init=gradient"], "init: full fine-tuning has no adapter"),
        (["peft=full_ft", "init=gaussian"], "init: full fine-tuning has no adapter"),
        (["peft=full_ft", "++init.direction=LoRA-One"], "init.direction: full fine-tuning has no adapter"),
        (
            ["init=default", "++init.stable_gamma=4"],
            "init.stable_gamma: stable_gamma has no effect with init.mode=simple",
        ),
        (["model.name='a"], "cannot read the override"),
        (["init.mode=simple"], "init.mode=simple: .*use init=default"),
        (["init.sub_size=9"], "init.sub_size: has no effect here; .*init.do_subsampling=true"),
        (["init.scale=gd", "init.stable_gamma=4"], "init.stable_gamma: has no effect here"),
        (["init.direction=LoRA-GA", "init.normalize=none"], "init.normalize: has no effect here"),
        (["peft=full_ft", "peft.lora_r=4"], "peft.lora_r: has no effect here; .*peft=all"),
        (
            ["model=t5base", "model.warmup_steps=5"],
            "model.warmup_steps: model.warmup_ratio=0.03 sets the warm-up; .*model.warmup_ratio=null",
        ),
        (["model.type=causal"], "model.type='causal': input should be 'CausalLM' or 'ConditionalGeneration'"),
        (["model=t5base", "peft=qv_w_emb"], "peft.train_embeddings=true: .*model.type=ConditionalGeneration"),
        (["probes=al"], "probes=al: no such choice .did you mean 'all'"),
        (["probes=[update,al]"], "probes=al: no such choice .did you mean 'all'"),
        (["probes.every=5"], "probes.every: has no effect here; .*probes=all"),
        (["seed=-1"], "seed=-1: input should be greater than or equal to 0"),
    ],
)
def test_mistakes_get_one_line(arguments, words):
    with pytest.raises(UserError, match=words) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)


def test_full_fine_tuning_ignores_the_default_init():
    assert parse("peft=full_ft").method == "full-ft"
    assert run_id(parse("peft=full_ft")) == run_id(parse("peft=full_ft", "init=default"))


@pytest.mark.parametrize(
    "override",
    [
        "model.saving=true",
        "eval.limit=3",
        "wandb.name=x",
        "model.logging_steps=5",
        "dry_run=true",
        "results_dir=y",
        "tensorboard=true",
        "probes=all",
    ],
)
def test_outputs_do_not_change_the_run(override):
    assert run_id(parse(override)) == run_id(parse())


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "model.learning_rate=1",
        "init.stable_gamma=64",
        "peft.lora_r=4",
        "model.max_steps=3",
        "init=default",
    ],
)
def test_what_changes_the_weights_changes_the_run(override):
    assert run_id(parse(override)) != run_id(parse())


def test_several_probes_go_together():
    assert parse("probes=[update, spectrum]", "probes.every=5").probes.names == ["update", "spectrum"]
    assert parse("probes=all").probes.names == ["update", "subspaces", "spectrum", "variance", "curvature"]
    assert not parse().probes.is_on


def test_identity_ignores_values_equal_to_their_default():
    assert result_identity(parse("model.weight_decay=0.0")) == result_identity(parse())


def test_the_method_of_a_run_is_in_its_name():
    assert run_id(parse("seed=3")).startswith("tiny-tiny_llama-LoRA-One-s3-")
    assert run_id(parse("experiment=tiny_lora_ga")).startswith("tiny-tiny_llama-LoRA-GA-s0-")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"Q: {question}\nA: ", r"Q: {question}\nA: "),
        ('"Q: {a}, b"', "Q: {a}, b"),
        ("it's {a}", "it's {a}"),
        ("a=[1] (b) ${c}"[:11], "a=[1] (b) $"),
        ("ends in \\", "ends in \\"),
        (r"a \' b", r"a \' b"),
    ],
)
def test_a_template_means_itself_on_the_command_line(written, meant):
    assert parse("dataset=custom", f"dataset.prompt={written}", "dataset.target=a").dataset.prompt == meant


def test_keys_of_custom_datasets_and_of_the_hub_are_refused_elsewhere():
    with pytest.raises(UserError, match=r"dataset.prompt: has no effect here; .*use dataset=custom"):
        parse("dataset=gsm8k", "dataset.prompt={a}")
    with pytest.raises(UserError, match=r"dataset.revision: has no effect here"):
        parse("dataset=gsm8k", "dataset.revision=abc", "dataset.train_file=a.jsonl")
    assert parse("dataset=gsm8k", "dataset.revision=12").dataset.revision == "12"
