"""The run's folder and its record.

``results/<run_id>/`` is a function of the config: the same on every rank, on every start. Its
``record.json`` is written when the run starts, when it fails and when it ends.
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from lora_one import __version__
from lora_one.config import ExperimentConfig, Section, result_identity
from lora_one.errors import BusyError, UserError
from lora_one.files import write_text

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "hydra-core", "numpy")


@dataclass
class RunRecord:
    """Everything needed to read a result without its log.

    Attributes:
        run_id: Name of the run's folder.
        method: What is compared in tables.
        status: ``running``, ``finished``, ``failed``, ``unfinished`` where somebody asked it to stop, or
            ``pruned`` where its validation loss was too high.
        job: Number of the cluster's job that makes it, where there is one.
        doing: The stage under way.
        stages: Seconds and peak resident bytes of each stage.
        metrics: Figures by name; those of an evaluation hold value, standard error and n.
    """

    run_id: str
    method: str
    config: dict[str, Any]
    seed: int
    status: str = "running"
    error: str | None = None
    started: str = ""
    ended: str | None = None
    job: str | None = None
    doing: str | None = None
    code: dict[str, Any] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    gradient: dict[str, Any] | None = None
    init: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes ``record.json`` in one piece."""
        write_text(folder / "record.json", json.dumps(asdict(self), indent=2) + "\n")

    def figures(self) -> dict[str, float]:
        """The metrics as name and number."""
        return {
            name: metric["value"] if isinstance(metric, dict) else metric
            for name, metric in self.metrics.items()
        }

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage and notes the process's peak memory during it."""
        self.doing = name
        _reset_peak_memory()
        start = time.perf_counter()
        yield
        seconds = round(time.perf_counter() - start, 3)
        self.doing = None
        self.stages[name] = {"seconds": seconds, "peak_resident_bytes": _peak_resident_bytes()}
        if torch.cuda.is_available():
            self.stages[name]["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()


def run_id(config: ExperimentConfig) -> str:
    """Readable stem and identity of the result, for example ``tiny-LoRA-One-s0-1a2b3c4d``."""
    model = Path(config.model.name).name.lower()
    return f"{config.dataset.name}-{model}-{config.method}-s{config.seed}-{result_identity(config)[:8]}"


def new_record(config: ExperimentConfig) -> RunRecord:
    """A record with what is known before anything is loaded."""
    return RunRecord(
        run_id=run_id(config),
        method=config.method,
        config=config.model_dump(),
        seed=config.seed,
        started=_now(),
        job=_cluster_job(),
        code={"version": __version__, **_code_version()},
        packages=_package_versions(),
        hardware={
            "host": socket.gethostname(),
            "cpu_cores": os.cpu_count(),
            "machine": platform.machine(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
        },
    )


def read_record(folder: Path) -> dict[str, Any] | None:
    """The stored record of a run folder, or None.

    Raises:
        UserError: If the file is damaged.
    """
    path = folder / "record.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path}: damaged; remove the run folder, or restore the file") from None
    if not isinstance(record, dict) or "status" not in record:
        raise UserError(f"{path}: not a run record; remove the run folder, or restore the file")
    record["config"] = with_defaults(record.get("config", {}))
    return record


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A recorded config with the keys that are younger than it, at their defaults: what it was run with."""
    filled = dict(config)
    for name, entry in ExperimentConfig.model_fields.items():
        section = entry.annotation
        if isinstance(section, type) and issubclass(section, Section):
            keys = section.model_fields.items()
            defaults = {key: of_key.default for key, of_key in keys if not of_key.is_required()}
            filled[name] = defaults | filled.get(name, {})
        elif not entry.is_required():
            filled.setdefault(name, entry.default)
    return filled


def add_figure(folder: Path, name: str, figure: dict[str, Any]) -> bool:
    """Adds what was measured after a run to its record.

    Returns:
        Whether the folder has a record.

    Raises:
        UserError: If the record is damaged.
        BusyError: If a program is at work in the folder.
    """
    if not (folder / "record.json").exists():
        return False
    lock = RunLock(folder)
    try:
        record = read_record(folder)
        assert record is not None
        record["metrics"][name] = figure
        write_text(folder / "record.json", json.dumps(record, indent=2) + "\n")
    finally:
        lock.release()
    return True


class RunLock:
    """Keeps two programs out of one run folder; the system frees it when its holder dies."""

    def __init__(self, folder: Path) -> None:
        """Takes the lock.

        Raises:
            BusyError: If another live program holds it.
        """
        self._file: IO[str] = (folder / "run.lock").open("a+")
        if not _take(self._file):
            self._file.seek(0)
            holder = self._file.read().strip() or "another program"
            self._file.close()
            raise BusyError(
                f"{folder}: this run is being made by {holder}; wait for it, or stop it"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Frees the lock."""
        self._file.close()


def _take(file: IO[str], seconds: float = 1.0) -> bool:
    """Whether the lock could be had; ``scripts/status.py`` looks at it for a moment now and then."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > end:
                return False
            time.sleep(0.1)


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # Linux forgets the high-water mark on request; elsewhere it is that of the whole process so far.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_resident_bytes() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def finish(record: RunRecord, folder: Path, status: str = "finished", error: str | None = None) -> None:
    """Closes the record, with the error that ended the run early."""
    record.status = status
    record.error = error
    record.ended = _now()
    record.write(folder)


def _cluster_job() -> str | None:
    """Slurm's number of this job, as its commands write it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _code_version() -> dict[str, Any]:
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "command": " ".join(sys.argv),
    }


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
