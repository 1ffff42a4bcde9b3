"""Points on their way to disk and to Weights & Biases."""

import json
import os
from pathlib import Path
from typing import Any

from lora_one.config import WandbConfig
from lora_one.files import write_text


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, flushed at once, for plots and for people."""

    def __init__(self, path: Path, keep_through_step: int = 0) -> None:
        """Opens the file; rows after ``keep_through_step`` belong to steps that are done again."""
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= keep_through_step]
        self.kept_seconds: float = kept[-1]["seconds"] if kept else 0.0
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: dict[str, Any]) -> None:
        """Adds one row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete rows of a ``metrics.jsonl``; a last line cut by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class Tracker:
    """Weights & Biases, or nothing. Its failures are said once and never stop a run."""

    def __init__(self, config: WandbConfig, run_id: str, folder: Path, settings: dict[str, Any]) -> None:
        self._run: Any = None
        mode = _mode(config)
        if mode == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb

            self._run = wandb.init(
                mode=mode,
                project=config.project,
                entity=config.entity,
                id=run_id,
                resume="allow",
                name=config.name or run_id,
                dir=str(folder),
                config=settings,
                reinit="finish_previous",
            )
        except Exception as error:  # any failure of a tracker: the run is worth more than its log
            _complain("start", error)

    def log(self, point: dict[str, float], step: int | None = None) -> None:
        """Sends one point."""
        self._attempt("log", lambda run: run.log(point, step=step))

    def summarise(self, figures: dict[str, float]) -> None:
        """Sends the final figures."""
        self._attempt("log", lambda run: run.summary.update(figures))

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, error_type: Any, *_: Any) -> None:
        exit_code = 0 if error_type is None else 1
        self._attempt("finish", lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _attempt(self, what: str, action: Any) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # as above
            _complain(what, error)
            self._run = None


def _mode(config: WandbConfig) -> Any:
    if config.mode != "auto":
        return config.mode
    netrc = Path.home() / ".netrc"
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (
        netrc.exists() and "api.wandb.ai" in netrc.read_text()
    )
    return "online" if has_key else "offline"


def _complain(what: str, error: Exception) -> None:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    print(f"wandb could not {what}: {reason}; the run goes on, its figures are in metrics.jsonl", flush=True)
