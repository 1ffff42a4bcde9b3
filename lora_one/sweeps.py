"""The jobs of a sweep, in whatever process they run: what became of each, and the table at the end.

Hydra's launchers start jobs here, in workers, or on a cluster, and Hydra keeps what they return to itself.
So each job leaves a small file in ``results_dir/sweeps/<time>-<process>/``, and the program that a person
started reads them.
"""

import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lora_one.errors import UserError
from lora_one.files import write_text
from lora_one.records import RunRecord
from lora_one.tables import figure_text, markdown_table


@dataclass(frozen=True)
class _Engine:
    """A launcher or sweeper of another package.

    Attributes:
        plugin: Its module below ``hydra_plugins``.
        defaults: Where we differ from its own.
    """

    plugin: str
    defaults: tuple[str, ...]


_LOGS = "hydra.launcher.submitit_folder=${hydra.sweep.dir}/sweeps/submitit/%j"
_ENGINES = {
    # Each process holds a model, and shares the cores by the number of processes; a run is no small task.
    ("hydra/launcher", "joblib"): _Engine(
        "hydra_joblib_launcher", ("hydra.launcher.n_jobs=2", "hydra.launcher.batch_size=1")
    ),
    # It would kill them after an hour.
    ("hydra/launcher", "submitit_local"): _Engine(
        "hydra_submitit_launcher",
        (_LOGS, "hydra.launcher.name=lora-one", "hydra.launcher.timeout_min=525600"),
    ),
    # A job whose time is up keeps a checkpoint and is started again; its own default is to give up.
    ("hydra/launcher", "submitit_slurm"): _Engine(
        "hydra_submitit_launcher",
        (_LOGS, "hydra.launcher.name=lora-one", "hydra.launcher.max_num_timeout=100"),
    ),
    # One failed trial would end the search; trials that are drawn together know nothing of each other.
    ("hydra/sweeper", "optuna"): _Engine(
        "hydra_optuna_sweeper", ("hydra.sweeper.max_failure_rate=1.0", "hydra.sweeper.n_jobs=1")
    ),
}
# Their jobs are processes of this machine, and end with a signal to them.
_LOCAL_LAUNCHERS = ("joblib", "submitit_local")


@dataclass
class Outcome:
    """What became of one job.

    Attributes:
        number: Of the job in its sweep; 0 where there is none.
        overrides: Those of the command line, with this job's choices.
        state: ``running``, ``planned`` (a dry run), ``busy`` (another program makes it), or the status of
            its record at the end.
        exit_code: What the program would exit with if it had run this job alone.
        run_id: None where the configuration was refused.
        objective: What a sweeper is told: the validation loss, infinite where the run was pruned or its loss
            was no number, None where there is none (a NaN would end Optuna's sweeper).
        error: One line, where something went wrong or ended early.
        process: Its host and number.
    """

    number: int
    overrides: list[str]
    state: str = "running"
    exit_code: int = 0
    run_id: str | None = None
    results_dir: str = ""
    objective: float | None = None
    validation_loss: float | None = None
    test: str = ""
    error: str | None = None
    process: tuple[str, int] = field(default_factory=lambda: _this_process())

    def end(self, record: RunRecord) -> None:
        """Takes over what the record says."""
        self.state, self.error = record.status, record.error
        self.validation_loss = record.metrics.get("validation_loss")
        self.objective = float("inf") if record.status == "pruned" else self.validation_loss
        test = record.metrics.get("test")
        self.test = figure_text(test) if test else ""

    def fail(self, error: str, exit_code: int, objective: float | None = None) -> None:
        """The job ended with an error."""
        self.state, self.error, self.exit_code, self.objective = "failed", error, exit_code, objective

    def stop(self, reason: str, exit_code: int, state: str = "unfinished") -> None:
        """The job was asked to stop, or not to begin; or is another program's (``busy``)."""
        self.state, self.error, self.exit_code = state, reason, exit_code


class Journal(Callback):
    """Hydra's callback that knows the sweep in every process: launchers send it to their jobs."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.launcher = "basic"
        self.home, self.command = _this_process(), list(sys.argv)
        self.is_dry_run = False
        self.last_words = ""  # printed after the table
        self.takes_divergence = False  # a run that diverges is a result of the sweep, no failure
        self.outcomes: list[Outcome] = []

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Names the sweep's folder; the first job makes it."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.folder = Path(config.results_dir).absolute() / "sweeps" / name
        self.launcher = config.hydra.runtime.choices["hydra/launcher"]
        self.is_dry_run = bool(config.dry_run)
        set_journal(self)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """In the job's own process, whose record is to name the command that a person gave."""
        set_journal(self)
        if self.is_elsewhere:
            sys.argv[:] = self.command

    @property
    def is_elsewhere(self) -> bool:
        """Whether this is not the process that a person started."""
        return self.home != _this_process()

    def begin(self) -> Outcome:
        """Notes that this process's job has begun."""
        hydra = HydraConfig.get()
        overrides: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
        number = 0 if OmegaConf.is_missing(hydra.job, "num") else int(hydra.job.num)
        outcome = Outcome(number, [override.lstrip("+") for override in overrides])
        self.outcomes.append(outcome)
        self.keep(outcome)
        return outcome

    def keep(self, outcome: Outcome) -> None:
        """Writes an outcome where the program that was started finds it."""
        if self.folder is None or not _is_main():
            return
        # A place that cannot be written is the job's own error, which says so.
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / f"{outcome.number}.json", json.dumps(asdict(outcome), indent=2) + "\n")

    @property
    def is_stopping(self) -> bool:
        """Whether the sweep has been asked to stop, so that no further job begins."""
        return self.folder is not None and (self.folder / "stop").exists()

    def pass_on(self) -> bool:
        """Asks jobs in other processes of this machine to stop; whether there may be such."""
        if self.folder is None or self.is_elsewhere or self.launcher not in _LOCAL_LAUNCHERS:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "stop").touch()
        for outcome in self.collect():
            if outcome.state == "running" and outcome.process[0] == self.home[0]:
                with suppress(ProcessLookupError):
                    os.kill(outcome.process[1], signal.SIGUSR1)
        return True

    def collect(self) -> list[Outcome]:
        """The outcomes of all jobs that have begun, in order."""
        found = {outcome.number: outcome for outcome in self.outcomes}
        for path in self.folder.glob("*.json") if self.folder else ():
            stored = json.loads(path.read_text(encoding="utf-8"))
            stored["process"] = tuple(stored["process"])
            found.setdefault(stored["number"], Outcome(**stored))
        return [found[number] for number in sorted(found)]

    def close(self) -> list[Outcome]:
        """Prints the table of a sweep and keeps it beside the outcomes, which it returns."""
        outcomes = self._close()
        if self.last_words:
            print(self.last_words, flush=True)
        return outcomes

    def _close(self) -> list[Outcome]:
        outcomes = self.collect()
        for outcome in outcomes:
            if self.takes_divergence and outcome.state == "failed" and outcome.objective == math.inf:
                outcome.state, outcome.exit_code = "diverged", 0
            if outcome.state == "running" and _is_gone(outcome.process):
                outcome.state = "died"
                outcome.error = outcome.error or "its process is gone; the same command goes on"
        if self.folder is None or not outcomes or not _is_main():
            return outcomes
        if self.is_dry_run:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):
                self.folder.parent.rmdir()
            return outcomes
        table = sweep_table(outcomes)
        print(table, flush=True)
        with suppress(OSError):
            write_text(self.folder / "table.md", table + "\n")
        return outcomes


def sweep_table(outcomes: Sequence[Outcome]) -> str:
    """Every job with its own choices, its run, state, figures and error."""
    common = set.intersection(*(set(outcome.overrides) for outcome in outcomes))
    places = {outcome.results_dir for outcome in outcomes if outcome.run_id}
    rows = [["job", "choices", "run", "state", "validation loss", "test", "remark"]]
    for outcome in outcomes:
        loss = outcome.validation_loss
        own = outcome.overrides if len(outcomes) == 1 else [o for o in outcome.overrides if o not in common]
        run = outcome.run_id or ""
        rows.append(
            [
                str(outcome.number),
                " ".join(own),
                run if len(places) == 1 else str(Path(outcome.results_dir) / run),
                outcome.state,
                f"{loss:.4f}" if loss is not None else "",
                outcome.test,
                (outcome.error or "").replace("|", "\\|"),
            ]
        )
    # A column that says nothing is left out.
    used = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    table = markdown_table([[row[column] for column in used] for row in rows])
    where = f"\nfolders: {Path(places.pop()) / '<run>'}" if len(places) == 1 else ""
    return table + where


def prepare_engines(arguments: Sequence[str], conf_dir: Path | None = None) -> list[str]:
    """Looks at the launcher and the sweeper that are asked for, before Hydra does.

    Args:
        arguments: Flags, then overrides.
        conf_dir: The configuration folder: an experiment in it may be a sweep of itself.

    Returns:
        The arguments with our defaults before the overrides, which win.

    Raises:
        UserError: If one is not installed, or cannot be used here.
    """
    defaults: list[str] = []
    is_sweep = any(flag in ("-m", "--multirun", "hydra.mode=MULTIRUN") for flag in arguments) or (
        conf_dir is not None and any(_sweeps_by_itself(argument, conf_dir) for argument in arguments)
    )
    for argument in arguments:
        group, _, choice = argument.lstrip("+").partition("=")
        if group not in ("hydra/launcher", "hydra/sweeper") or choice == "basic":
            continue
        if not is_sweep:
            raise UserError(f"{argument}: has an effect only in a sweep; add -m")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"{argument}: not under accelerate launch or torchrun, whose processes sweep side by side; "
                "start without them, or leave it out"
            )
        if (engine := _ENGINES.get((group, choice))) is None:
            continue
        if not _is_installed(engine.plugin):
            raise UserError(f"{argument}: is not installed; pip install -e '.[sweeps]'")
        if choice == "submitit_slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
            raise UserError(f"{argument}: there is no sbatch here; start it where Slurm's commands are")
        defaults += engine.defaults
        if choice == "optuna":
            _check_search(argument, arguments)
            if "hydra/sweeper/sampler=grid" not in arguments:
                defaults.append("hydra.sweeper.sampler.seed=0")  # a repeated sweep asks the same again
    n_flags = next((i for i, a in enumerate(arguments) if "=" in a and not a.startswith("-")), len(arguments))
    return [*arguments[:n_flags], *defaults, *arguments[n_flags:]]


def _sweeps_by_itself(argument: str, conf_dir: Path) -> bool:
    group, _, choice = argument.lstrip("+").partition("=")
    path = conf_dir / "experiment" / f"{choice}.yaml"
    if group != "experiment" or not path.is_file():
        return False
    return bool(OmegaConf.select(OmegaConf.load(path), "hydra.mode") == "MULTIRUN")


def _check_search(argument: str, arguments: Sequence[str]) -> None:
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(overrides)
    if any(o.key_or_group == "dry_run" and o.value() is True for o in parsed):
        raise UserError(f"{argument}: a dry run has no losses to search by; leave one of them out")
    spaces = ("hydra.sweeper.params", "hydra.sweeper.search_space", "hydra.sweeper.custom_search_space")
    if not any(o.is_sweep_override() or o.key_or_group.startswith(spaces) for o in parsed):
        raise UserError(
            f"{argument}: there is nothing to search; give for example "
            "'model.learning_rate=tag(log, interval(1e-4, 1e-2))'"
        )


def make_importable(root: Path) -> None:
    """Lets processes that a launcher starts import this code, from whatever folder."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(root) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), *paths]))


def join_cluster_job() -> None:
    """Takes from submitit and Slurm what ``accelerate launch`` would say: the processes, and their cores."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return
    import submitit

    if submitit.JobEnvironment().num_tasks > 1:
        launch = submitit.helpers.TorchDistributedEnvironment()
        launch.export(set_cuda_visible_devices=False, overwrite=True)
    cores = os.environ.get("SLURM_CPUS_PER_TASK")
    if cores and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(int(cores))


def _this_process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _is_gone(process: tuple[str, int]) -> bool:
    host, number = process
    if host != socket.gethostname():
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _is_installed(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:
        return False


_journal = [Journal()]


def journal() -> Journal:
    """That of the sweep, or of the single run, that this process is in."""
    return _journal[0]


def set_journal(new: Journal) -> None:
    """Makes ``new`` this process's journal."""
    _journal[0] = new
