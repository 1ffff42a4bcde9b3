"""What a run will take: GPU hours and memory by arithmetic, before anything is loaded.

Operations are those of the matrix products: 2 a weight and token forward, 2 for the gradient of the
activations, 2 for that of the weights; embeddings count as weights, attention between tokens is left out,
and so are evaluation, loading and exporting. Memory is the arithmetic of ``docs/scaling.md``.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lora_one.config import DatasetConfig, ExperimentConfig, ModelConfig, OptimizerConfig, PeftConfig
from lora_one.layers import shape_OI
from lora_one.models import empty_model, target_names
from lora_one.plan import count_trainable, row_counts
from lora_one.training import plan_training

# Tokens of an example, prompt and target, after cutting: round guesses from a few rows' characters, never
# counted with the models' own tokenizers. What is not here counts with its longest.
MEAN_TOKENS: dict[str, int] = {
    "meta_math": 250,
    "meta_math_full": 300,
    "gsm8k": 180,
    "codefeedback": 500,
    "alpaca": 150,
    "wizard_lm": 400,
    "commonsense_reasoning": 120,
    "mnli": 55,
    "sst2": 30,
    "cola": 30,
    "qnli": 80,
    "mrpc": 80,
}
_BASE_BYTES = {"4bit": 0.53, "8bit": 1.0}
_LOGIT_BYTES = 10


@dataclass(frozen=True)
class Machine:
    """A GPU, and how much of it a training gets.

    Attributes:
        tflops: Of matrix products in bfloat16 or float16, in 10¹² operations a second: an A100's.
        fp32_tflops: In float32, without TF32.
        utilisation: Share of them that a training reaches.
        mean_tokens: Tokens of an example, instead of ``MEAN_TOKENS``.
    """

    tflops: float = 312.0
    fp32_tflops: float = 19.5
    utilisation: float = 0.4
    mean_tokens: float | None = None

    def seconds(self, operations: float, config: ModelConfig) -> float:
        """How long it takes for so many operations."""
        peak = self.tflops if config.bf16 or config.fp16 else self.fp32_tflops
        return operations / (peak * 1e12 * self.utilisation)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and its adapter.

    Attributes:
        weights: All numbers of the base.
        trained: Numbers that are trained.
        target_weights: Numbers of the base's layers with an adapter.
        hidden: Width of the residual stream.
        inner: Width of the feed-forward layers.
        blocks: Of encoder and decoder together.
        vocabulary: Rows of the output head.
    """

    weights: int
    trained: int
    target_weights: int
    hidden: int
    inner: int
    blocks: int
    vocabulary: int


@dataclass(frozen=True)
class Cost:
    """What a run takes; None where the model or the number of examples is not known offline.

    Attributes:
        tokens: Of the training, padding not counted.
        hours: Of one GPU: gradient estimate and training.
        gpu_bytes: Weights, adapter, optimiser, and a micro-batch.
    """

    tokens: float | None
    hours: float | None
    gpu_bytes: float | None


def estimate_cost(config: ExperimentConfig, machine: Machine) -> Cost:
    """GPU hours and memory of one run."""
    shape, n_train = shape_of(config), _n_train(config.dataset.model_dump_json())
    mean_tokens = _mean_tokens(config, machine)
    tokens = None
    if config.model.max_steps is not None or n_train is not None:
        # Unknown rows with a limit of steps: as if there were enough.
        n_examples = n_train if n_train is not None else 2**40
        tokens = plan_training(n_examples, config.model).n_steps * config.model.real_batch_size * mean_tokens
        if n_train is not None:  # an epoch's last step may be smaller
            tokens = min(tokens, config.model.epochs * n_train * mean_tokens)
    if shape is None:
        return Cost(tokens, None, None)
    hours = None
    if tokens is not None:
        operations = training_operations(shape, tokens, trains_all=not config.peft.use_peft)
        operations += gradient_operations(shape, _sample_size(config, n_train) * mean_tokens)
        hours = machine.seconds(operations, config.model) / 3600
    return Cost(tokens, hours, gpu_bytes(shape, config))


def training_operations(shape: Shape, tokens: float, *, trains_all: bool) -> float:
    """Forward and backward passes over so many tokens."""
    return (6 if trains_all else 4) * shape.weights * tokens


def gradient_operations(shape: Shape, tokens: float) -> float:
    """The gradient of all targets' weights over so many tokens."""
    return (4 * shape.weights + 2 * shape.target_weights) * tokens


def gpu_bytes(shape: Shape, config: ExperimentConfig) -> float:
    """Bytes on one GPU with a micro-batch as given, or else of one longest example."""
    model = config.model
    number = 2 if model.bf16 or model.fp16 else 4
    tokens = model.max_tokens_per_device or (model.per_device_batch_size or 1) * model.max_length
    block = number * (12 * shape.hidden + 4 * shape.inner)
    if config.gradient_checkpointing:
        activations = number * shape.hidden * shape.blocks + block
    else:
        activations = block * shape.blocks
    base: float = 0
    if config.peft.use_peft:
        base = shape.weights * _BASE_BYTES.get(model.quantization or "", number)
    # Trained numbers and their gradients are float32.
    trained = 8 * shape.trained + moment_bytes(shape, config.optimizer)
    return base + trained + tokens * (activations + _LOGIT_BYTES * shape.vocabulary)


def moment_bytes(shape: Shape, optimizer: OptimizerConfig) -> int:
    """What the optimiser remembers, in float32."""
    if optimizer.name == "lora_pro":
        return 8 * shape.target_weights
    if optimizer.name in ("sgd", "scaled_gd"):
        return 4 * shape.trained if optimizer.momentum else 0
    return 8 * shape.trained


def shape_of(config: ExperimentConfig) -> Shape | None:
    """The sizes, or None where the model's are not known offline.

    Raises:
        UserError: If the targets are none of the model's.
    """
    is_known = config.init.mode != "adapter"
    return _shape(config.model.model_dump_json(), config.peft.model_dump_json(), is_known)


@lru_cache  # the rows of a table share their models
def _shape(model_json: str, peft_json: str, is_known: bool) -> Shape | None:
    """Of an adapter that is not known, one that exists already, nothing is counted."""
    model = empty_model(ModelConfig.model_validate_json(model_json))
    if model is None:
        return None
    peft = PeftConfig.model_validate_json(peft_json)
    weights = sum(parameter.numel() for parameter in model.parameters())
    targets = target_names(model, peft) if peft.use_peft and is_known else ()
    sizes = model.config
    hidden, blocks = sizes.hidden_size, sizes.num_hidden_layers
    if sizes.is_encoder_decoder:
        blocks += getattr(sizes, "num_decoder_layers", None) or getattr(sizes, "decoder_layers", blocks)
    return Shape(
        weights=weights,
        trained=count_trainable(model, targets, peft) if peft.use_peft else weights,
        target_weights=sum(_numbers(model.get_submodule(name)) for name in targets),
        hidden=hidden,
        inner=getattr(sizes, "intermediate_size", None) or getattr(sizes, "d_ff", None) or 4 * hidden,
        blocks=blocks,
        vocabulary=sizes.vocab_size,
    )


def _numbers(layer: Any) -> int:
    n_out, n_in = shape_OI(layer)
    return n_out * n_in


def _mean_tokens(config: ExperimentConfig, machine: Machine) -> float:
    longest = config.model.max_length * (2 if config.model.is_pair else 1)
    return min(longest, machine.mean_tokens or MEAN_TOKENS.get(config.dataset.name, longest))


def _sample_size(config: ExperimentConfig, n_train: int | None) -> int:
    """Examples that the gradient is taken from."""
    init = config.init
    if not config.peft.use_peft or not init.needs_sample:
        return 0
    if init.do_subsampling is False:
        return n_train or 0
    return init.sub_size if init.do_subsampling else init.bsz * init.iters


@lru_cache
def _n_train(dataset: str) -> int | None:
    return row_counts(DatasetConfig.model_validate_json(dataset))["train"]
