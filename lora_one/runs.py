"""One run: its folder, lock, record and processes, from start to finish or failure."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lora_one.config import ExperimentConfig
from lora_one.errors import DivergedError, PrunedError, RunError, UserError
from lora_one.files import write_text
from lora_one.interruption import Unfinished
from lora_one.out_of_memory import explain_out_of_memory, is_out_of_memory
from lora_one.processes import Processes
from lora_one.records import RunLock, RunRecord, finish, new_record, read_record, run_id
from lora_one.tables import figure_text


class Run:
    """A run that this program is making.

    Attributes:
        folder: ``results/<run_id>``.
        record: What will be ``record.json``; written by the main process only.
        previous: The stored record of an earlier start, or None.
        has_init: Whether an earlier start has already initialised the adapters.
        processes: Who makes it together.
    """

    def __init__(self, config: ExperimentConfig, processes: Processes) -> None:
        """Takes the run's folder.

        Raises:
            UserError: If it cannot be written.
            BusyError: If another program is at work in it.
        """
        self.processes = processes
        self.folder = Path(config.results_dir) / run_id(config)
        self.init_file = self.folder / "init.safetensors"
        self._created = False
        self._lock: RunLock | None = None
        found: tuple[dict[str, Any] | None, bool] = (None, False)
        if processes.is_main:
            self._created = not self.folder.exists()
            self._make_folder(config.results_dir)
            self._lock = RunLock(self.folder)
            found = (read_record(self.folder), self.init_file.exists())
        self.previous, self.has_init = processes.from_main(found)
        self.record = self._first_record(config)

    def begin(self, config: ExperimentConfig) -> None:
        """Writes what is known before anything is loaded."""
        if self.processes.is_main:
            settings = OmegaConf.to_yaml(OmegaConf.create(config.model_dump()))
            write_text(self.folder / "config.yaml", settings)
        self.save()

    @property
    def is_finished(self) -> bool:
        """Whether an earlier start has finished this run."""
        return self.previous is not None and self.previous["status"] == "finished"

    def was_pruned(self, config: ExperimentConfig) -> bool:
        """Whether an earlier start was pruned by a limit that prunes it now too."""
        limit, previous = config.model.prune_above, self.previous
        return (
            previous is not None
            and previous["status"] == "pruned"
            and limit is not None
            and previous["metrics"]["validation_loss"] > limit
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage, prints its time once, and stores the record after it.

        Raises:
            RunError: If its memory runs out.
        """
        try:
            with self.record.stage(name):
                self.save()
                yield
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(explain_out_of_memory(error, name, self.record.config)) from None
        self.processes.say(f"[{name}] {self.record.stages[name]['seconds']:.1f} s")
        self.save()

    def save(self) -> None:
        """Stores the record as it stands."""
        if self.processes.is_main:
            self.record.write(self.folder)

    def note_source(self, what: str, summary: dict[str, Any]) -> None:
        """Records where data or model came from.

        Raises:
            UserError: If an earlier start of this run read something else, or its processes do.
        """
        if len(set(self.processes.gather([summary["fingerprint"]]))) > 1:
            raise UserError(
                f"the processes read different versions of the {what}; give dataset.revision and "
                "model.revision, or local files"
            )
        stored = (self.previous or {}).get(what, {}).get("fingerprint")
        if stored not in (None, summary["fingerprint"]):
            raise UserError(
                f"{self.folder}: the {what} has changed since this run began; "
                "restore it, or remove the run folder"
            )
        setattr(self.record, what, summary)

    def close(self, error: BaseException | None = None) -> None:
        """Ends the run. Bad input found before anything was made leaves nothing behind."""
        if self.processes.is_main:
            if error is None:
                if not self.is_finished:
                    finish(self.record, self.folder)
                for served in ("checkpoints", "answers"):  # only a run under way needs them
                    shutil.rmtree(self.folder / served, ignore_errors=True)
            elif self._created and isinstance(error, UserError) and not self.has_progress():
                shutil.rmtree(self.folder, ignore_errors=True)
            elif isinstance(error, PrunedError):
                finish(self.record, self.folder, "pruned", str(error))
            elif self.record.status != "finished":  # a signal may come while the finished run is closed
                self._end_early(error)
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def check_complete(self, config: ExperimentConfig) -> None:
        """Raises UserError if a finished run has lost its result."""
        result = self.folder / ("adapter" if config.peft.use_peft else "merged")
        if not result.is_dir():
            raise UserError(
                f"{result}: the run is finished but this is gone; restore it, or remove {self.folder}"
            )

    def has_progress(self) -> bool:
        """Whether the folder holds anything that took work."""
        return self.init_file.exists() or (self.folder / "metrics.jsonl").exists()

    def summary(self) -> str:
        """What came of a run, in a few aligned lines."""
        record = self.record
        rows = [("validation loss", f"{record.metrics['validation_loss']:.4f}")]
        for name, figures in record.metrics.items():
            if isinstance(figures, dict):
                rows.append((f"{name} {figures['metric']}", figure_text(figures)))
        seconds = sum(stage["seconds"] for stage in record.stages.values())
        rows += [
            ("tokens per second", f"{record.training['tokens_per_second']:,.0f} in training"),
            ("time", f"{seconds:.0f} s in all stages"),
            ("folder", f"{self.folder} (record.json, plot.png)"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _make_folder(self, results_dir: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "run.lock").touch()
        except OSError as error:
            raise UserError(f"results_dir={results_dir}: cannot write there ({error.strerror})") from None

    def _first_record(self, config: ExperimentConfig) -> RunRecord:
        """A new record, or the finished one; keeps what an interrupted start measured for good."""
        record = new_record(config)
        if self.previous is None:
            return record
        if self.is_finished or self.was_pruned(config):
            return RunRecord(**{name: value for name, value in self.previous.items() if name in vars(record)})
        stored = self.previous
        record.data, record.model = stored["data"], stored["model"]
        record.stages = {
            name: stored["stages"][name] for name in ("test_before",) if name in stored["stages"]
        }
        record.metrics = {
            name: stored["metrics"][name] for name in ("test_before",) if name in stored["metrics"]
        }
        if self.has_init:
            record.gradient, record.init = stored["gradient"], stored["init"]
            record.stages |= {
                name: stored["stages"][name] for name in ("gradient",) if name in stored["stages"]
            }
        return record

    def _end_early(self, error: BaseException) -> None:
        was_asked = isinstance(error, Unfinished | KeyboardInterrupt)
        if isinstance(error, DivergedError):
            self.record.training["diverged"] = True  # so that a comparison need not read the message
        text = error.reason if isinstance(error, Unfinished) else str(error) or type(error).__name__
        try:
            finish(self.record, self.folder, "unfinished" if was_asked else "failed", text)
        except OSError as trouble:
            print(f"the failed run's record could not be written ({trouble.strerror})", file=sys.stderr)
