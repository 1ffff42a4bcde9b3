"""Run folders as runs leave them, made by hand."""

import json
from pathlib import Path
from typing import Any

from lora_one.config import ExperimentConfig


def config_of(seed: int = 0, init: dict[str, Any] | None = None, **model: Any) -> ExperimentConfig:
    """A small config; plain LoRA unless ``init`` says otherwise."""
    tree = {
        "dataset": {"name": "tiny"},
        "model": {"name": "m", **model},
        "init": init or {"mode": "simple"},
        "seed": seed,
    }
    return ExperimentConfig.model_validate(tree)


def record_of(
    seed: int = 0,
    test: float | None = None,
    n: int = 500,
    status: str = "finished",
    error: str | None = None,
    data: str = "d",
    config: ExperimentConfig | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A record; ``more`` replaces whole entries of it."""
    config = config or config_of(seed)
    figure = {"test": {"task": "gsm8k", "metric": "exact_match", "value": test, "n": n, "decoding": "greedy"}}
    rate = config.model.learning_rate
    return {
        "run_id": f"tiny-m-{config.method}-lr{rate:g}-s{seed}",
        "method": config.method,
        "status": status,
        "error": error,
        "seed": seed,
        "config": config.model_dump(),
        "started": "2026-01-02T03:04:05+0000",
        "code": {"commit": "a" * 40, "dirty": False, "command": "run_exp.py"},
        "packages": {"torch": "2.0"},
        "hardware": {"host": "elsewhere", "cpu_cores": 2, "gpus": []},
        "metrics": {"validation_loss": 0.5} | (figure if test is not None else {}),
        "stages": {
            "gradient": {"seconds": 2.0, "peak_resident_bytes": 10**9},
            "init": {"seconds": 1.0, "peak_resident_bytes": 2 * 10**9},
        },
        "gradient": None,
        "training": {"seconds": 10.0, "n_steps": 10},
        "data": {"fingerprint": data},
        "model": {"fingerprint": "w"},
    } | more


def store(root: Path, record: dict[str, Any], points: list[dict[str, Any]] = ()) -> Path:
    """Writes a record and its curve as a run folder."""
    folder = root / record["run_id"]
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    return folder


def falling_loss(n_steps: int, start: float = 2.0, seconds: float = 0.5) -> list[dict[str, Any]]:
    """A loss that falls as 1 / step, with a validation loss at a quarter of the steps."""
    points: list[dict[str, Any]] = []
    for step in range(1, n_steps + 1):
        points.append({"step": step, "loss": start / step, "seconds": seconds * step})
        if step % max(1, n_steps // 4) == 0:
            points.append(
                {
                    "step": step,
                    "eval_loss": start / step,
                    "eval_exact_match": step / n_steps / 2,
                    "seconds": seconds * step,
                }
            )
    return points
