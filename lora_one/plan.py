"""The dry run: what an experiment would do, without weights and without a network."""

from collections.abc import Sequence
from typing import Any

from lora_one.config import DatasetConfig, ExperimentConfig, PeftConfig
from lora_one.data.batches import Limits
from lora_one.data.custom import spec_of
from lora_one.data.loading import load_splits
from lora_one.errors import UserError
from lora_one.inits import ALIASES
from lora_one.layers import shape_OI
from lora_one.models import adapter_ranks, check_rank, empty_model, model_source, target_names
from lora_one.records import run_id
from lora_one.training import plan_training

_UNKNOWN = "unknown offline"
_SPLITS = ("train", "validation", "test")


def describe_plan(config: ExperimentConfig, world_size: int) -> str:
    """The resolved plan as an aligned table of name and value.

    Raises:
        UserError: For whatever can be found wrong before loading.
    """
    rows = [
        ("run folder", f"{config.results_dir}/{run_id(config)}"),
        ("method", _method(config)),
        ("optimizer", _optimizer(config)),
        ("model", f"{config.model.name} ({model_source(config.model.name)})"),
        *_parameters(config),
        *_data(config, world_size),
        *([("benchmarks", ", ".join(config.eval.tasks))] if config.eval.tasks else []),
        ("written", _outputs(config)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _method(config: ExperimentConfig) -> str:
    if not config.peft.use_peft:
        return "full fine-tuning; init is ignored"
    init = config.init
    if init.mode == "simple":
        return f"{config.method}: lora_A {init.lora_A}, lora_B {init.lora_B}"
    if init.mode == "svd":
        return f"{config.method}: singular vectors of the weight, scale {init.scale}"
    if init.mode == "adapter":
        return f"{init.adapter}, trained on"
    if init.mode != "gradient":
        return f"{config.method}, by PEFT"
    direction = ALIASES.get(init.direction, init.direction)
    normalize = f", normalize {init.normalize}" if direction == "LoRA-One" else ""
    normalize += "" if init.objective == "gradient" else f", objective {init.objective}"
    return f"{init.direction}: scale {init.scale}, gamma {init.gamma:g}{normalize}"


def _optimizer(config: ExperimentConfig) -> str:
    choice, model = config.optimizer, config.model
    parts = [choice.name + (f" ({choice.form})" if choice.reads("form") else "")]
    parts.append(f"learning rate {model.learning_rate:g}, {model.lr_scheduler}")
    if config.peft.use_peft and config.peft.use_loraplus:
        parts.append(f"{config.peft.loraplus_lr_ratio:g} times that for B")
    if choice.is_preconditioned:
        parts.append(f"damping {config.damping:g}")
    return ", ".join(parts)


def _parameters(config: ExperimentConfig) -> list[tuple[str, str]]:
    model = empty_model(config.model)
    if model is None:
        return [("targets", _UNKNOWN), ("trainable parameters", _UNKNOWN)]
    total = sum(parameter.numel() for parameter in model.parameters())
    if config.peft.use_peft and config.init.mode == "adapter":
        return [("targets", f"those of {config.init.adapter}"), ("parameters", f"{total:,} in the base")]
    if not config.peft.use_peft:
        return [("targets", "all weights"), ("trainable parameters", f"{total:,} of {total:,}")]
    targets = target_names(model, config.peft)
    check_rank(model, targets, config)
    ranks = adapter_ranks(model, targets, config.peft)
    trainable = count_trainable(model, targets, config.peft)
    kinds = sorted({name.rsplit(".", 1)[-1] for name in targets})
    shown = " to ".join(str(rank) for rank in sorted({min(ranks.values()), max(ranks.values())}))
    return [
        ("targets", f"{len(targets)} layers: {', '.join(kinds)}; rank {shown}"),
        ("trainable parameters", f"{trainable:,} of {total:,} ({trainable / total:.2%})"),
    ]


def count_trainable(model: Any, targets: Sequence[str], peft: PeftConfig) -> int:
    """Numbers that are trained beside a frozen base.

    Args:
        model: The model, with or without weights.
        targets: Full names of the layers with an adapter.
        peft: The adapter.
    """
    ranks = adapter_ranks(model, targets, peft)
    trainable = sum(ranks[name] * sum(shape_OI(model.get_submodule(name))) for name in targets)
    trainable += sum(shape_OI(model.get_submodule(name))[0] for name in targets) * peft.dora
    if peft.train_embeddings:
        ends = {id(part.weight): part.weight.numel() for part in _ends(model)}
        trainable += sum(ends.values())
    return trainable


def _ends(model: Any) -> list[Any]:
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [end for end in ends if end is not None]


def _data(config: ExperimentConfig, world_size: int) -> list[tuple[str, str]]:
    counts = row_counts(config.dataset)
    rows = [("examples", ", ".join(f"{name} {_number(counts[name])}" for name in counts))]
    n_train = counts["train"]
    if n_train is None:
        if config.model.max_steps is not None:
            rows.append(
                ("steps", f"at most {config.model.max_steps:,} of {config.model.real_batch_size} examples")
            )
        else:
            rows.append(("steps", _UNKNOWN))
        return [*rows, ("tokens", _UNKNOWN), ("gradient sample", _gradient_sample(config, None))]
    plan = plan_training(n_train, config.model)
    longest = config.model.max_length * (2 if config.model.is_pair else 1)  # prompt and target are cut apart
    tokens = plan.n_steps * config.model.real_batch_size * longest
    return [
        *rows,
        (
            "steps",
            f"{plan.n_steps:,} of {config.model.real_batch_size} examples, in micro-batches of "
            f"{_micro_batches(config)}, {world_size} at a time",
        ),
        ("tokens", f"at most {tokens:,} (model.max_length={config.model.max_length})"),
        ("gradient sample", _gradient_sample(config, n_train)),
    ]


def _micro_batches(config: ExperimentConfig) -> str:
    model = config.model
    packed = ", packed where that saves time" if model.packing is None else ", packed" * model.packing
    if model.per_device_batch_size is None and model.max_tokens_per_device is None:
        return "as many tokens as suit the device" + packed
    return str(Limits(model.max_tokens_per_device, model.per_device_batch_size)) + packed


def row_counts(dataset: DatasetConfig) -> dict[str, int | None]:
    """Examples of each split, as far as they are known without a network."""
    if dataset.train_file is not None or spec_of(dataset).generate is not None:
        # Nothing to download. Token limits of the dataset are not applied: that needs a tokenizer.
        splits = load_splits(dataset, lambda texts: [0] * len(texts))
        return {name: len(getattr(splits, name)) for name in _SPLITS}
    known = dataset.rows or {}
    if dataset.streaming or (dataset.streaming is None and spec_of(dataset).streamed):
        return {"train": dataset.train_size, "validation": dataset.validation_size, "test": known.get("test")}
    if "train" not in known:
        return dict.fromkeys(_SPLITS)
    validation = dataset.validation_size or max(1, known["train"] // 20)
    train = known["train"] - validation
    test = known.get("test")
    return {
        "train": min(train, dataset.train_size or train),
        "validation": validation,
        "test": None if test is None else min(test, dataset.test_size or test),
    }


def _gradient_sample(config: ExperimentConfig, n_train: int | None) -> str:
    init = config.init
    if not config.peft.use_peft or not init.needs_sample:
        return "none"
    if init.do_subsampling is False:
        return f"the whole training split, {_number(n_train)} examples"
    wanted = init.sub_size if init.do_subsampling else init.bsz * init.iters
    if n_train is not None and wanted > n_train:
        raise UserError(
            f"the gradient sample of {wanted} examples is larger than the training split ({n_train})"
        )
    return f"{wanted} examples"


def _outputs(config: ExperimentConfig) -> str:
    outputs = ["config.yaml", "record.json", "metrics.jsonl", "plot.png"]
    if config.eval.task and _has_test(config.dataset):
        outputs += ["test_before.jsonl"] * config.eval.before_training + ["test.jsonl"]
    outputs += [f"{name}.jsonl" for name in config.eval.tasks]
    if config.peft.use_peft and not config.init.is_plain_lora:
        outputs.append("init.safetensors")
    outputs += ["probes.jsonl", "probes.png"] * config.probes.is_on + ["snapshots/"] * config.probes.snapshots
    if config.wandb.mode != "disabled":
        outputs.append("wandb/")
    if config.peft.use_peft:
        outputs.append("adapter/")
    if config.model.saving or not config.peft.use_peft:
        outputs.append("merged/")
    return ", ".join(outputs)


def _has_test(dataset: DatasetConfig) -> bool:
    spec = spec_of(dataset)
    if dataset.test_file is not None or dataset.train_file is not None:
        return dataset.test_file is not None
    return spec.generate is not None or "test" in spec.sources


def _number(value: Any) -> str:
    return _UNKNOWN if value is None else f"{value:,}"
