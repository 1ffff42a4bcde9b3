"""The typed configuration: every key, its type, its range, and what it does.

This is the only module that sees a composed Hydra config. Keys of the published LoRA-GA / LoRA-One
configs keep their names and places; the rest of the code receives the frozen objects below.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from lora_one.errors import UserError, nearest

Text = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
Direction = Literal["LoRA-One", "LoRA-GA", "ArB2r", "A2rBr", "ArBr", "random"]
Scale = Literal["stable", "gd", "unit"]


class Section(BaseModel):
    """A strict, immutable node of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class DatasetConfig(Section):
    """Where examples come from. A local file replaces the Hub for its split."""

    name: str
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    train_size: int | None = Field(None, ge=1, description="keep at most so many rows")
    validation_size: int | None = Field(None, ge=1)
    test_size: int | None = Field(None, ge=1)
    rows: dict[str, int] | None = Field(None, description="known row counts, for the dry run only")


class ModelConfig(Section):
    """The pretrained model and how it is trained."""

    name: Text
    type: Literal["CausalLM"] = "CausalLM"
    revision: Text | None = None
    trust_remote_code: bool = False
    shape: dict[str, Any] | None = Field(None, description="Hugging Face config, for the dry run")
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="stop after so many optimiser steps")
    per_device_batch_size: int | None = Field(None, ge=1, description="null: at most 8192 tokens")
    real_batch_size: int = Field(32, ge=1, description="examples per optimiser step, all devices")
    bf16: bool = False
    max_length: int = Field(1024, ge=2)
    loss_reduction: Literal["sample", "token"] = "sample"
    learning_rate: float = Field(2e-4, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(100, ge=0)
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: float = Field(1.0, gt=0)
    prec_reg: float = Field(1e-6, gt=0, description="damping of the preconditioned optimisers")
    eval_epochs: float = Field(1.0, gt=0, description="epochs between two validation losses")
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="stop after so many validation losses without a new best; keeps the last weights",
    )
    save_steps: int = Field(500, ge=1, description="steps between checkpoints")
    logging_steps: int = Field(1, ge=1, description="steps between two points sent to the tracker")
    saving: bool = Field(False, description="write the merged model too")


class PeftConfig(Section):
    """The adapter."""

    use_peft: bool = True
    lora_r: int = Field(8, ge=1)
    lora_relative_r: float | None = Field(None, gt=0, le=1, description="rank / hidden size")
    lora_target_modules: str | list[str] = "all"
    use_rslora: bool = True
    lora_alpha: float = Field(16, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)


class InitConfig(Section):
    """How the adapter starts."""

    mode: Literal["simple", "gradient"] = "gradient"
    direction: Direction = "LoRA-One"
    scale: Scale = "stable"
    stable_gamma: float = Field(128, gt=0)
    normalize: Literal["spectral", "none"] = "spectral"
    bsz: int = Field(1, ge=1, description="examples per gradient batch")
    iters: int = Field(8, ge=1, description="gradient batches")
    max_length: int | None = Field(None, ge=2, description="null: model.max_length")
    do_subsampling: bool | None = Field(
        None, description="true: sub_size examples; false: the whole training split; null: bsz*iters"
    )
    sub_size: int = Field(100_000, ge=1)


class EvalConfig(Section):
    """The generation test on the test split after training."""

    task: Literal["gsm8k"] | None = None
    before_training: bool = False
    limit: int | None = Field(None, ge=1)
    max_new_tokens: int = Field(512, ge=1)
    batch_size: int = Field(32, ge=1)


class WandbConfig(Section):
    """Weights & Biases. ``auto`` is online where an API key is found and offline otherwise."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: Text = "lora-one"
    name: Text | None = None
    entity: Text | None = None


class ExperimentConfig(Section):
    """One experiment."""

    dataset: DatasetConfig
    model: ModelConfig
    peft: PeftConfig = PeftConfig()
    init: InitConfig = InitConfig()
    eval: EvalConfig = EvalConfig()
    wandb: WandbConfig = WandbConfig()
    seed: int = Field(0, ge=0, lt=2**32)
    gradient_checkpointing: bool = False
    dry_run: bool = False
    results_dir: str = "results"

    @property
    def method(self) -> str:
        """Short name of what is compared: ``full-ft``, ``lora``, ``LoRA-One``, ``LoRA-GA``, …"""
        if not self.peft.use_peft:
            return "full-ft"
        if self.init.mode == "simple":
            return "lora"
        return "LoRA-GA" if self.init.direction == "ArB2r" else self.init.direction

    @property
    def gradient_max_length(self) -> int:
        """Tokens at which the examples of the gradient sample are cut."""
        return self.init.max_length or self.model.max_length


# What only adds an output, or says how to watch, and so must not change the run's folder.
_OUTPUT_KEYS: dict[str, set[str]] = {
    "": {"dry_run", "results_dir", "wandb", "eval"},
    "dataset": {"rows"},
    "model": {"shape", "saving", "save_steps", "logging_steps", "prec_reg"},
}


def parse_config(composed: DictConfig, named: frozenset[str] | set[str] = frozenset()) -> ExperimentConfig:
    """Turns Hydra's composed config into the typed one.

    Args:
        composed: The config as Hydra composed it.
        named: Keys that were named on the command line: what is asked for and cannot be had is
            refused, where a default that cannot be had is left out.

    Returns:
        The validated, immutable configuration.

    Raises:
        UserError: For an unknown key, a wrong type, a value out of range or an impossible
            combination; the message names the key, the value and the nearest valid choice.
    """
    try:
        tree = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        reason = "is required, give it a value" if "???" in str(error) or "Missing" in str(error) else ""
        raise UserError(f"{key}: {reason or str(error).splitlines()[0]}") from None
    if "model.name" in named and isinstance(tree, dict):
        tree["model"]["shape"] = None  # it is that of the group's own model
    try:
        config = ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error.errors()[0])) from None
    _check_combinations(config, named)
    return config


def result_identity(config: ExperimentConfig) -> str:
    """Hex digest of everything in the config that changes the trained weights.

    Values equal to their default are left out, so that a later version with a new key keeps the
    identity of old runs.
    """
    settings = result_settings(config.model_dump(exclude_defaults=True))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def result_settings(tree: dict[str, Any]) -> dict[str, Any]:
    """The part of a dumped config that changes the trained weights."""
    settings = {name: dict(node) if isinstance(node, dict) else node for name, node in tree.items()}
    for section, keys in _OUTPUT_KEYS.items():
        node = settings if section == "" else settings.get(section, {})
        for key in keys:
            node.pop(key, None)
    if settings.get("peft", {}).get("use_peft") is False:
        settings.pop("init", None)
        settings["peft"] = {"use_peft": False}
    return settings


def valid_keys() -> list[str]:
    """All dotted keys of the configuration."""
    keys: list[str] = []
    for name, field in ExperimentConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            keys += [f"{name}.{key}" for key in section.model_fields]
        keys.append(name)
    return keys


def _explain(error: ErrorDetails) -> str:
    key = ".".join(str(part) for part in error["loc"] if not _is_union_tag(part))
    if error["type"] == "extra_forbidden":
        return f"unknown config key '{key}'{nearest(key, valid_keys())}"
    if error["type"] == "missing":
        return f"{key}: is required, give it a value"
    value = error["input"]
    hint = ""
    if error["type"] == "literal_error" and isinstance(value, str):
        choices = error.get("ctx", {}).get("expected", "").replace("'", "").replace(" or ", ", ")
        hint = nearest(value, choices.split(", "))
    return f"{key}={value!r}: {error['msg'][0].lower()}{error['msg'][1:]}{hint}"


def _is_union_tag(part: int | str) -> bool:
    # pydantic adds the tried member of a union (``str``, ``list[str]``) to the location.
    return isinstance(part, str) and part in {"str", "list[str]", "int", "function-before[<lambda>(), str]"}


def _check_combinations(config: ExperimentConfig, named: frozenset[str] | set[str]) -> None:
    peft, init = config.peft, config.init
    asked = sorted(key for key in named if key == "init" or key.startswith("init."))
    if not peft.use_peft and init.mode == "gradient" and asked:
        raise UserError(
            f"{asked[0]}: full fine-tuning has no adapter to initialise; leave it out, or use peft=all"
        )
    idle = sorted(init.model_fields_set - {"mode"})
    if peft.use_peft and init.mode == "simple" and idle:
        key = "init.mode=simple" if "init.mode" in named else f"init.{idle[0]}"
        raise UserError(
            f"{key}: gradient settings have no effect with a simple start; use init=default alone"
        )
    without_effect = {
        "init.sub_size": (init.do_subsampling is None, "init.do_subsampling=true"),
        "init.normalize": (init.direction != "LoRA-One", "init.direction=LoRA-One"),
        "init.stable_gamma": (init.scale != "stable", "init.scale=stable"),
        "peft.lora_r": (peft.lora_relative_r is not None, "peft.lora_relative_r=null"),
        **{
            f"peft.{key}": (not peft.use_peft, "peft=all")
            for key in PeftConfig.model_fields
            if key != "use_peft"
        },
    }
    for key, (is_idle, remedy) in without_effect.items():
        if key in named and is_idle:
            raise UserError(f"{key}: has no effect here; leave it out, or use {remedy}")
