"""Points on their way to disk, to Weights & Biases and to TensorBoard."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lora_one.config import WandbConfig
from lora_one.errors import UserError
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
    """Weights & Biases, TensorBoard, both or none. Their failures are said once and never stop a run."""

    def __init__(
        self,
        config: WandbConfig,
        run_id: str,
        folder: Path,
        settings: dict[str, Any],
        tensorboard: bool = False,
    ) -> None:
        self._sinks: dict[str, _Sink] = {}
        if _mode(config) != "disabled":
            self._start("wandb", lambda: _Wandb(config, run_id, folder, settings))
        if tensorboard:
            self._start("tensorboard", lambda: _TensorBoard(folder / "tensorboard"))

    def go_on_after(self, step: int) -> None:
        """Points of later steps, which an interrupted start may have sent, are made again."""
        self._each("start", lambda sink: sink.go_on_after(step))

    def log(self, point: dict[str, float], step: int | None = None) -> None:
        """Sends one point."""
        self._each("log", lambda sink: sink.log(point, step))

    def summarise(self, figures: dict[str, float]) -> None:
        """Sends the final figures."""
        self._each("log", lambda sink: sink.summarise(figures))

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, error_type: Any, *_: Any) -> None:
        self._each("finish", lambda sink: sink.finish(0 if error_type is None else 1))
        self._sinks = {}

    def _start(self, name: str, make: "Callable[[], _Sink]") -> None:
        try:
            self._sinks[name] = make()
        except Exception as error:  # any failure of a tracker: the run is worth more than its log
            _complain(name, "start", error)

    def _each(self, what: str, action: "Callable[[_Sink], None]") -> None:
        for name, sink in list(self._sinks.items()):
            try:
                action(sink)
            except Exception as error:  # as above
                _complain(name, what, error)
                del self._sinks[name]


class _Sink(Protocol):
    """Where a tracker sends its points."""

    def go_on_after(self, step: int) -> None: ...

    def log(self, point: dict[str, float], step: int | None) -> None: ...

    def summarise(self, figures: dict[str, float]) -> None: ...

    def finish(self, exit_code: int) -> None: ...


class _Wandb:
    def __init__(self, config: WandbConfig, run_id: str, folder: Path, settings: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._run: Any = wandb.init(
            mode=_mode(config),
            project=config.project,
            entity=config.entity,
            id=run_id,
            resume="allow",
            name=config.name or run_id,
            dir=str(folder),
            config=settings,
            reinit="finish_previous",
        )

    def go_on_after(self, step: int) -> None:
        pass  # it takes no step a second time: what it has, it keeps

    def log(self, point: dict[str, float], step: int | None) -> None:
        self._run.log(point, step=step)

    def summarise(self, figures: dict[str, float]) -> None:
        self._run.summary.update(figures)

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


class _TensorBoard:
    """Event files; a restart adds one that takes back the points of the steps done again."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make_writer = SummaryWriter
        self._folder = str(folder)
        self._step = 0
        self._opened: Any = None

    @property
    def _writer(self) -> Any:
        if self._opened is None:
            self._opened = self._make_writer(self._folder, purge_step=self._step + 1)
        return self._opened

    def go_on_after(self, step: int) -> None:
        self._step = step

    def log(self, point: dict[str, float], step: int | None) -> None:
        writer = self._writer  # opened with the step before
        self._step = self._step if step is None else step
        for name, value in point.items():
            writer.add_scalar(name, value, self._step)
        writer.flush()  # a killed program's points up to its last checkpoint are not made again

    def summarise(self, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(f"final/{name}", value, self._step)

    def finish(self, exit_code: int) -> None:
        if self._opened is not None:  # a writer opened only now would take points back
            self._opened.close()


def check_tensorboard() -> None:
    """Raises UserError where TensorBoard is not installed: it comes with an extra."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "tensorboard=true: the package is not installed; pip install tensorboard, or leave it off"
        )


def _mode(config: WandbConfig) -> Any:
    if config.mode != "auto":
        return config.mode
    netrc = Path.home() / ".netrc"
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (
        netrc.exists() and "api.wandb.ai" in netrc.read_text()
    )
    return "online" if has_key else "offline"


def _complain(name: str, what: str, error: Exception) -> None:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    print(f"{name} could not {what}: {reason}; the run goes on, its figures are in metrics.jsonl", flush=True)
