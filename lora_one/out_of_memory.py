"""What to change where memory runs out, stage by stage."""

import errno
from typing import Any

import torch

# Settings of each stage, those that change no result before those that do; None stands for a smaller number.
_REMEDIES: dict[str, dict[str, Any]] = {
    "model": {"model.quantization": "4bit", "model.bf16": True, "model.device_map": "auto"},
    "gradient": {
        "init.bsz": None,
        "init.max_length": None,
        "init.estimator": "sketch",
        "gradient_checkpointing": True,
        "model.bf16": True,
        "model.quantization": "4bit",
    },
    "training": {
        "model.max_tokens_per_device": None,
        "model.per_device_batch_size": None,
        "gradient_checkpointing": True,
        "model.bf16": True,
        "model.quantization": "4bit",
    },
    "test": {"eval.max_tokens": None, "model.bf16": True, "model.quantization": "4bit"},
    "merge": {"model.saving": False},
    "data": {"dataset.train_size": None},
}
_SAME_REMEDIES = {"test_before": "test", "init": "gradient"}
# What CPU and GPU libraries say that raise no exception of their own for it.
_WORDS = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library says that memory has run out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _WORDS)
    return isinstance(error, MemoryError)


def explain_out_of_memory(error: BaseException, stage: str, config: dict[str, Any]) -> str:
    """One line with the stage and the settings that would help and are not yet so.

    Args:
        error: What ``is_out_of_memory`` knows.
        stage: Name of the stage of the run.
        config: The run's recorded settings.
    """
    words = str(error)
    memory = "GPU memory" if isinstance(error, torch.OutOfMemoryError) or "CUDA" in words else "memory"
    is_benchmark = stage in ((config.get("eval") or {}).get("tasks") or [])
    remedies = _REMEDIES.get("test" if is_benchmark else _SAME_REMEDIES.get(stage, stage), {})
    is_counted = _setting(config, "model.per_device_batch_size") is not None
    idle = "model.max_tokens_per_device" if is_counted else "model.per_device_batch_size"
    lower = [
        key for key, value in remedies.items() if value is None and key != idle and _setting(config, key) != 1
    ]
    others = [
        f"{key}={str(value).lower()}"
        for key, value in remedies.items()
        if value is not None and _setting(config, key) != value
    ]
    advice = [f"lower {' or '.join(lower)}"] * bool(lower) + [f"use {' or '.join(others)}"] * bool(others)
    remedy = ", or ".join(advice) or "use a machine with more"
    return f"out of {memory} in the stage '{stage}'; {remedy}; the run is kept as failed"


def _setting(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
