"""The runs of a table: which there are, which are finished, and the commands that make the rest."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_one.config import ExperimentConfig
from lora_one.costs import Cost, Machine, estimate_cost
from lora_one.errors import UserError
from lora_one.experiments import command_of, compose_experiment
from lora_one.published import Table
from lora_one.records import read_record, run_id
from lora_one.tables import markdown_table


@dataclass(frozen=True)
class Experiment:
    """An experiment of a table, for all its seeds.

    Attributes:
        name: As in the table: the file, and overrides behind it.
        overrides: What was added on the command line.
        config: That of the first seed.
        seeds: All that are asked for.
        finished: Those that are trained and tested already.
        cost: Of one run.
    """

    name: str
    overrides: tuple[str, ...]
    config: ExperimentConfig
    seeds: tuple[int, ...]
    finished: tuple[int, ...]
    cost: Cost

    @property
    def missing(self) -> tuple[int, ...]:
        """Seeds that are still to run."""
        return tuple(seed for seed in self.seeds if seed not in self.finished)

    def arguments(self) -> list[str]:
        """Those of ``run_exp.py``, but for the seed."""
        return command_of(self.name, self.overrides)


def plan_table(table: Table, overrides: Sequence[str], machine: Machine) -> list[Experiment]:
    """The experiments of a table, each once.

    Args:
        table: One of ``read_tables``.
        overrides: For every experiment, as on the command line; ``seed=0,1`` replaces the table's seeds.
        machine: For the estimate.

    Raises:
        UserError: If there is nothing to run, an override is wrong, or a record is damaged.
    """
    if not table.experiments():
        raise UserError(f"table {table.name}: there is no experiment in it, only published values")
    seeds, rest = _seeds(table, overrides)
    plan: dict[str, Experiment] = {}
    for name in table.experiments():
        config = compose_experiment(name, rest).model_copy(update={"seed": seeds[0]})
        finished = tuple(seed for seed in seeds if is_done(config.model_copy(update={"seed": seed})))
        cost = estimate_cost(config, machine)
        # Overrides can make two of them one.
        plan.setdefault(run_id(config), Experiment(name, tuple(rest), config, seeds, finished, cost))
    return list(plan.values())


def is_done(config: ExperimentConfig) -> bool:
    """Whether a run is finished, with a figure of each benchmark that is asked for."""
    record = read_record(Path(config.results_dir) / run_id(config))
    if record is None or record["status"] != "finished":
        return False
    return all(task in record["metrics"] for task in config.eval.tasks)


def sweep_commands(plan: Sequence[Experiment]) -> list[list[str]]:
    """Arguments of ``run_exp.py`` for all missing runs: one sweep for experiments with the same overrides.

    A sweep's runs share a process; those that are finished end at once.
    """
    sweeps: dict[tuple[str, ...], list[Experiment]] = {}
    for experiment in plan:
        if experiment.missing:
            sweeps.setdefault(tuple(experiment.arguments()[1:]), []).append(experiment)
    commands = []
    for rest, group in sweeps.items():
        files = ",".join(experiment.arguments()[0].removeprefix("experiment=") for experiment in group)
        wanted = sorted({seed for experiment in group for seed in experiment.missing})
        commands.append(["-m", f"experiment={files}", *rest, f"seed={','.join(map(str, wanted))}"])
    return commands


def single_commands(plan: Sequence[Experiment]) -> list[list[str]]:
    """Arguments of ``run_exp.py`` of each missing run."""
    return [[*experiment.arguments(), f"seed={seed}"] for experiment in plan for seed in experiment.missing]


def sweep_file(plan: Sequence[Experiment]) -> str:
    """The missing runs as ``scripts/slurm_array.sh`` reads them, one a line."""
    return "".join(shlex.join(arguments) + "\n" for arguments in single_commands(plan))


def describe(plan: Sequence[Experiment], machine: Machine) -> str:
    """The estimate: a row for each experiment, the sum, and what it assumes."""
    rows = [["experiment", "finished", "missing", "GPU h a run", "GPU h missing", "GB"]]
    for experiment in plan:
        cost, missing = experiment.cost, experiment.missing
        left = None if cost.hours is None else cost.hours * len(missing)
        rows.append(
            [
                experiment.name,
                ", ".join(map(str, experiment.finished)),
                ", ".join(map(str, missing)),
                _number(cost.hours, "{:.2f}"),
                _number(left, "{:.1f}"),
                _number(None if cost.gpu_bytes is None else cost.gpu_bytes / 1e9, "{:.1f}"),
            ]
        )
    n_missing = sum(len(experiment.missing) for experiment in plan)
    n_finished = sum(len(experiment.finished) for experiment in plan)
    known = [e.cost.hours * len(e.missing) for e in plan if e.cost.hours is not None]
    total = f"{sum(known):.1f} GPU hours" + " and what is not known" * (len(known) < len(plan))
    largest = max((e.cost.gpu_bytes for e in plan if e.cost.gpu_bytes is not None), default=None)
    lines = [
        markdown_table(rows),
        f"{n_missing} runs missing, {n_finished} finished and skipped: about {total}, "
        f"up to {_number(None if largest is None else largest / 1e9, '{:.0f}')} GB on a GPU",
        assumptions(machine),
    ]
    return "\n".join(lines)


def assumptions(machine: Machine) -> str:
    """What the estimate takes for granted, in a sentence."""
    mean = "rough mean lengths of lora_one/costs.py"
    if machine.mean_tokens is not None:
        mean = f"{machine.mean_tokens:g} tokens an example"
    return (
        f"assumed: {machine.tflops:g} TFLOP/s in 16 bits and {machine.fp32_tflops:g} in float32, of which "
        f"{machine.utilisation:.0%} are reached; {mean}; training and gradient only, without tests; "
        "memory with the smallest micro-batch"
    )


def _seeds(table: Table, overrides: Sequence[str]) -> tuple[tuple[int, ...], list[str]]:
    """The seeds that are asked for, and the other overrides."""
    rest = [override for override in overrides if override.lstrip("+").split("=", 1)[0] != "seed"]
    asked = [override for override in overrides if override not in rest]
    if not asked:
        return table.seeds, rest
    parts = asked[-1].split("=", 1)[1].split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"{asked[-1]}: give whole numbers with commas between them, such as seed=0,1,2")
    return tuple(dict.fromkeys(map(int, parts))), rest


def _number(value: float | None, form: str) -> str:
    return "unknown" if value is None else form.format(value)
