"""The typed configuration: every key, its type, its range, and what it does.

This is the only module that sees a composed Hydra config. Keys of the published LoRA-GA / LoRA-One
configs keep their names and places; the rest of the code receives the frozen objects below.
"""

import hashlib
import json
import math
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from lora_one.combinations import check_combinations
from lora_one.errors import UserError, nearest
from lora_one.preconditioners import LORA_PRO_DAMPING, PAPER_DAMPING, Form
from lora_one.starts import GradientStart

Text = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
_ALIASES = {"ArB2r": "LoRA-GA", "gd_scale": "gd", "weight_svd": "weightS"}
_canonical = BeforeValidator(lambda value: _ALIASES.get(value, value) if isinstance(value, str) else value)
Direction = Literal["LoRA-One", "LoRA-GA", "ArB2r", "A2rBr", "ArBr", "random"]
Scale = Literal["default", "stable", "gd", "gd_scale", "unit", "weightS", "weight_svd", "normalized"]
Factor = Literal["kaiming", "zeros", "gaussian", "fan_out_kaiming", "xavier", "unit", "orthogonal"]
InitMode = Literal["simple", "svd", "gradient", "pissa", "olora", "eva", "corda", "peft_lora_ga", "adapter"]
# The modes that look at a sample of the training split before training.
SAMPLE_MODES = ("gradient", "eva", "corda", "peft_lora_ga")
PRECONDITIONED = ("scaled_gd", "scaled_adamw", "lora_pro")


class Section(BaseModel):
    """A strict, immutable node of the configuration."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False
    )


class DatasetConfig(Section):
    """Where examples come from. A local file replaces the Hub for its split."""

    name: str
    chat: bool = Field(False, description="prompt and answer through the tokenizer's chat template")
    revision: Text | None = Field(None, description="commit, tag or branch of the Hub dataset")
    streaming: bool | None = Field(
        None,
        description="fetch the Hub's training rows until there are enough; null: as the dataset's table says",
    )
    prompt: str | None = Field(None, description="custom: template of the prompt, with {column}")
    target: str | None = Field(None, description="custom: column, or template, of what is learned")
    answer: str | None = Field(None, description="custom: column of the answer for graders; null: the target")
    messages: str | None = Field(
        None, description="custom: column of conversations, instead of the three above"
    )
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
    type: Literal["CausalLM", "ConditionalGeneration"] = Field(
        "CausalLM", description="one text, or an encoder for the prompt and a decoder for the target"
    )
    revision: Text | None = None
    trust_remote_code: bool = False
    shape: dict[str, Any] | None = Field(None, description="Hugging Face config, for the dry run")
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="stop after so many optimiser steps")
    max_tokens_per_device: int | None = Field(
        None, ge=1, description="tokens of a micro-batch, padding included; null: what suits the device"
    )
    per_device_batch_size: int | None = Field(
        None, ge=1, description="examples of a micro-batch, instead of max_tokens_per_device"
    )
    packing: bool | None = Field(
        None, description="micro-batches in one row without padding; null: on a CPU, where it saves time"
    )
    real_batch_size: int = Field(32, ge=1, description="examples per optimiser step, all devices")
    bf16: bool = Field(False, description="frozen weights and arithmetic in bfloat16")
    fp16: bool = Field(False, description="the same in float16, for GPUs without bfloat16")
    compile: bool = Field(False, description="compile the model's blocks; for long trainings")
    attn_implementation: Text | None = Field(
        None, description="eager, sdpa, flash_attention_2, …; null: what the model chooses"
    )
    quantization: Literal["4bit", "8bit"] | None = Field(None, description="bitsandbytes; 4bit is NF4")
    device_map: Literal["auto", "balanced", "sequential"] | None = Field(
        None, description="spread the layers over the GPUs of one process, for models larger than one"
    )
    max_length: int = Field(1024, ge=2)
    loss_reduction: Literal["sample", "token"] = "sample"
    learning_rate: float = Field(2e-4, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(100, ge=0)
    warmup_ratio: float | None = Field(
        None, ge=0, le=1, description="share of all steps to warm up, instead of warmup_steps"
    )
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=True, description="inf: no clipping")
    prec_reg: float | None = Field(
        None, gt=0, description="damping of the preconditioners; null: 1e-6, with lora_pro 1e-8"
    )
    eval_epochs: float = Field(1.0, gt=0, description="epochs between two validation losses")
    eval_points: int | None = Field(
        None, ge=1, description="so many validation losses evenly over the training, instead of eval_epochs"
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="stop after so many validation losses without a new best",
    )
    prune_above: float | None = Field(
        None, ge=0, description="a validation loss above it, before the last step, ends the run as pruned"
    )
    keep_best: bool = Field(False, description="end with the weights of the lowest validation loss")
    save_steps: int = Field(500, ge=1, description="steps between checkpoints")
    logging_steps: int = Field(1, ge=1, description="steps between two points sent to the tracker")
    saving: bool = Field(False, description="write the merged model too")
    push_to_hub: str | None = Field(None, description="private Hub repository for the finished adapter")

    @property
    def is_pair(self) -> bool:
        """Whether prompt and target are two texts: one for an encoder, one for its decoder."""
        return self.type == "ConditionalGeneration"

    def warmup(self, n_steps: int) -> int:
        """Steps of warm-up in a training of so many."""
        return self.warmup_steps if self.warmup_ratio is None else math.ceil(self.warmup_ratio * n_steps)


class PeftConfig(Section):
    """The adapter."""

    use_peft: bool = True
    lora_r: int = Field(8, ge=1)
    lora_relative_r: float | None = Field(None, gt=0, le=1, description="rank / hidden size")
    lora_target_modules: str | list[str] = Field(
        "all", description="all, qv, ends of layer names, or a regular expression of whole names"
    )
    lora_exclude_modules: str | list[str] | None = Field(None, description="taken away from the targets")
    layers_to_transform: int | list[int] | None = Field(None, description="numbers of the blocks to adapt")
    rank_pattern: dict[str, int] = Field({}, description="regular expression of layer names: their rank")
    alpha_pattern: dict[str, float] = Field({}, description="the same for lora_alpha")
    train_embeddings: bool = Field(False, description="train embeddings and output head too, in full")
    use_rslora: bool = True
    use_loraplus: bool = Field(False, description="learn lora_B faster than lora_A")
    loraplus_lr_ratio: float = Field(16.0, ge=1, description="rate of lora_B / rate of lora_A")
    lora_alpha: float = Field(16, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    dora: bool = False
    adalora: bool = False


class InitConfig(Section):
    """How the adapter starts."""

    mode: InitMode = "gradient"
    adapter: Text | None = Field(None, description="folder or Hub id of the adapter that is trained on")
    lora_A: Factor = Field("kaiming", description="simple: the start of A")
    lora_B: Factor = Field("zeros", description="simple: the start of B")
    lora_A_std: float = Field(0.01, gt=0, description="standard deviation of a gaussian A")
    lora_B_std: float = Field(0.01, gt=0, description="standard deviation of a gaussian B")
    direction: Annotated[Direction, _canonical] = "LoRA-One"
    scale: Annotated[Scale, _canonical] = "stable"
    stable_gamma: float | None = Field(None, gt=0, description="null: 128 with LoRA-One, else 16")
    normalize: Literal["spectral", "none"] = "spectral"
    objective: Literal["gradient", "sign", "adam"] = Field(
        "gradient", description="decompose G, decompose sign(G), or fit Adam's first step"
    )
    estimator: Literal["auto", "exact", "sketch", "sketch_two_pass"] = Field(
        "auto",
        description="the whole gradient, or sketches of it in one pass or two; auto: one pass from 64 "
        "examples on, two below, exact where the objective or a shared weight needs it",
    )
    n_triplets: int | None = Field(
        None, ge=1, description="singular triplets to keep; null: a power of two that covers the ranks"
    )
    offload: bool = Field(
        True, description="exact: sum the gradients on the CPU; false: on the layers' devices"
    )
    dropout: bool = Field(False, description="keep the model's dropout on in the gradient estimate")
    norm_clip: bool = Field(False, description="no entry of s·B·A above the largest of W")
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the adapter's weights; AdamW's moments underflow in fp16"
    )
    shift: Literal["auto", "weight", "adapter"] = Field(
        "auto", description="where s·B₀A₀ is taken off the base; auto: adapter on a quantised base"
    )
    eva_rho: float = Field(2.0, ge=1, description="EVA: a layer's largest rank / lora_r")
    corda_method: Literal["ipm", "kpm"] = "kpm"
    bsz: int = Field(1, ge=1, description="examples per gradient batch")
    iters: int = Field(8, ge=1, description="gradient batches")
    max_length: int | None = Field(None, ge=2, description="null: model.max_length")
    do_subsampling: bool | None = Field(
        None, description="true: sub_size examples; false: the whole training split; null: bsz*iters"
    )
    sub_size: int = Field(100_000, ge=1)

    @property
    def gamma(self) -> float:
        """γ: as given, or that of the method's paper."""
        if self.stable_gamma is not None:
            return self.stable_gamma
        return 128 if self.mode == "gradient" and self.direction == "LoRA-One" else 16

    @property
    def is_plain_lora(self) -> bool:
        """Whether the adapter starts as in LoRA itself: A Kaiming-uniform, B zero."""
        return self.mode == "simple" and (self.lora_A, self.lora_B) == ("kaiming", "zeros")

    @property
    def needs_sample(self) -> bool:
        """Whether the start looks at training examples."""
        return self.mode in SAMPLE_MODES


class OptimizerConfig(Section):
    """How gradients become steps; learning rate, decay and damping are keys of ``model``."""

    name: Literal["adamw", "sgd", "scaled_gd", "scaled_adamw", "lora_pro"] = "adamw"
    form: Form = Field("classic", description="of the preconditioner of scaled_gd and scaled_adamw")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd and scaled_gd")

    @property
    def is_preconditioned(self) -> bool:
        """Whether it looks at pairs of factors."""
        return self.name in PRECONDITIONED

    @property
    def default_damping(self) -> float:
        """δ where none is given: that of the method's authors."""
        return LORA_PRO_DAMPING if self.name == "lora_pro" else PAPER_DAMPING

    def reads(self, key: str) -> bool:
        """Whether a key of this section has an effect."""
        if key == "form":
            return self.name in ("scaled_gd", "scaled_adamw")
        if key == "momentum":
            return self.name in ("sgd", "scaled_gd")
        return key == "name" or self.name not in ("sgd", "scaled_gd")


class EvalConfig(Section):
    """What is tested after training: the dataset's own test split, and benchmarks.

    Lengths and temperatures are those of the test split; each benchmark has its own, as published.
    """

    task: Literal["gsm8k", "label", "commonsense"] | None = Field(
        None, description="how answers to the dataset's test split are graded"
    )
    tasks: list[str] = Field([], description="benchmarks by name; eval/tasks.py has the table")
    data: dict[str, str] = Field({}, description="benchmark: its local file or folder, instead of the Hub")
    before_training: bool = False
    during_training: bool = Field(
        False, description="also on the validation split, whenever its loss is measured"
    )
    limit: int | None = Field(None, ge=1, description="the first so many problems only")
    max_new_tokens: int = Field(512, ge=1)
    temperature: float = Field(0.0, ge=0, description="0: greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    batch_size: int | None = Field(None, ge=1, description="most prompts of a batch; null: by tokens alone")
    max_tokens: int | None = Field(
        None, ge=1, description="tokens of a batch, new ones included; null: what suits the device"
    )


class ProbesConfig(Section):
    """What is measured while a run trains; nothing of it changes the run."""

    update: bool = Field(False, description="each step's cosine with full fine-tuning's")
    subspaces: bool = Field(False, description="A and B against the gradient's singular spaces")
    spectrum: bool = Field(False, description="norms, singular values and effective rank of s·B·A")
    variance: bool = Field(False, description="forward and backward scale of the adapters")
    curvature: bool = Field(False, description="largest eigenvalue of the Hessian, and stable rates")
    every: int = Field(25, ge=1, description="steps between two looks")
    n_examples: int = Field(8, ge=1, description="of the fixed sample, one batch")
    products: int = Field(12, ge=2, description="curvature: most Hessian-vector products of a look")
    snapshots: bool = Field(False, description="full fine-tuning: keep the weights at every look")
    reference: Text | None = Field(None, description="run folder with snapshots to be compared with")

    @property
    def names(self) -> list[str]:
        """Those that are asked for, by the names of their keys."""
        flags = ("update", "subspaces", "spectrum", "variance", "curvature", "snapshots")
        return [key for key in flags if getattr(self, key)] + ["reference"] * (self.reference is not None)

    @property
    def is_on(self) -> bool:
        """Whether there is anything to look at."""
        return bool(self.names)


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
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()
    wandb: WandbConfig = WandbConfig()
    probes: ProbesConfig = ProbesConfig()
    seed: int = Field(0, ge=0, lt=2**32)
    tensorboard: bool = Field(False, description="event files in the run folder's tensorboard/")
    gradient_checkpointing: bool = False
    dry_run: bool = False
    results_dir: str = Field("results", min_length=1)
    cache_dir: str | None = Field(
        "results/gradients",
        min_length=1,
        description="where gradient estimates are kept for other runs; null: nowhere",
    )
    token_cache_dir: str | None = Field(
        "results/tokens",
        min_length=1,
        description="where the tokens of large datasets are kept for other runs; null: nowhere",
    )

    @property
    def method(self) -> str:
        """Short name of what is compared: ``full-ft``, ``lora``, ``LoRA-One``, ``LoRA-GA+dora``, …"""
        choice = self.optimizer
        optimizer: list[str] = [choice.name] * (choice.name != "adamw")
        optimizer += [choice.form] * (choice.reads("form") and choice.form != "classic")
        if not self.peft.use_peft:
            return "+".join(["full-ft", *optimizer])
        extras = [name for name in ("dora", "adalora") if getattr(self.peft, name)]
        extras += ["loraplus"] * self.peft.use_loraplus
        start = self._start_name()
        return "+".join([*(extras if start == "lora" and extras else [start, *extras]), *optimizer])

    @property
    def damping(self) -> float:
        """δ of the preconditioners: as given, or that of the method's authors."""
        return self.model.prec_reg or self.optimizer.default_damping

    def gradient_start(self) -> GradientStart:
        """The settings of ``init.mode=gradient``."""
        init = self.init
        return GradientStart(
            direction=init.direction,
            scale=init.scale,
            gamma=init.gamma,
            normalize=init.normalize,
            objective=init.objective,
            norm_clip=init.norm_clip,
            seed=self.seed,
        )

    def _start_name(self) -> str:
        init = self.init
        if init.is_plain_lora:
            return "lora"
        if init.mode == "simple":
            return f"{init.lora_A}-{init.lora_B}"
        if init.mode != "gradient":
            return init.mode
        name = init.direction
        return name if init.objective == "gradient" else f"{name}-{init.objective}"

    @property
    def gradient_max_length(self) -> int:
        """Tokens at which the examples of the gradient sample are cut."""
        return self.init.max_length or self.model.max_length


# What only adds an output, or says how to watch or how to cut the same sums into pieces, and so must not
# change the run's folder.
_OUTPUT_KEYS: dict[str, set[str]] = {
    "": {
        "dry_run",
        "results_dir",
        "cache_dir",
        "token_cache_dir",
        "gradient_checkpointing",
        "wandb",
        "tensorboard",
        "eval",
        "probes",
    },
    "dataset": {"rows"},
    "init": {"offload"},
    "model": {
        *("shape", "saving", "push_to_hub", "save_steps", "logging_steps", "prec_reg", "device_map"),
        *("max_tokens_per_device", "per_device_batch_size", "packing", "compile", "attn_implementation"),
        "prune_above",
    },
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
    return parse_tree(tree, named)


def parse_tree(tree: Any, named: frozenset[str] | set[str] = frozenset()) -> ExperimentConfig:
    """As ``parse_config``, of a composed config whose interpolations are resolved."""
    if "model.name" in named and isinstance(tree, dict):
        tree["model"]["shape"] = None  # it is that of the group's own model
    try:
        config = ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error.errors()[0])) from None
    check_combinations(config, named)
    return config


def result_identity(config: ExperimentConfig) -> str:
    """Hex digest of everything in the config that changes the trained weights.

    Values equal to their default are left out, so that a later version with a new key keeps the
    identity of old runs.
    """
    settings = result_settings(config.model_dump(exclude_defaults=True))
    for key in {"rank_pattern", "alpha_pattern"} & settings.get("peft", {}).keys():
        settings["peft"][key] = list(settings["peft"][key].items())  # the first match counts: keep the order
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def result_settings(tree: dict[str, Any]) -> dict[str, Any]:
    """The part of a dumped config that changes the trained weights."""
    settings = {name: dict(node) if isinstance(node, dict) else node for name, node in tree.items()}
    for section, keys in _OUTPUT_KEYS.items():
        node = settings if section == "" else settings.get(section, {})
        for key in keys:
            node.pop(key, None)
    if "optimizer" in tree:
        choice = OptimizerConfig.model_validate(tree["optimizer"])
        settings["optimizer"] = {key: value for key, value in tree["optimizer"].items() if choice.reads(key)}
        damping = tree.get("model", {}).get("prec_reg")
        if choice.is_preconditioned and damping not in (None, choice.default_damping):
            settings["model"]["prec_reg"] = damping
        if not settings["optimizer"]:
            del settings["optimizer"]
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
