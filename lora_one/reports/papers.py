"""A published table filled with our runs: figures, intervals, and what is missing.

A run belongs to a line where its settings, the seed aside, are those of the line's experiment: it does not
matter who started it, or how.
"""

import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_one.config import ExperimentConfig
from lora_one.experiments import command_of
from lora_one.progress import progress_bar
from lora_one.published import Cell, Column, Line, Table
from lora_one.reports.alike import check_alike, provenance
from lora_one.reports.reading import COST, Record, devices_of, figure_at, limit_of, settings_key, value_at
from lora_one.reports.summary import summarise
from lora_one.summaries import Summary

Compose = Callable[[str, Sequence[str]], ExperimentConfig]


@dataclass(frozen=True)
class Filled:
    """One cell.

    Attributes:
        values: Our figure of each seed, as recorded.
        published: What the papers print there.
        n_items: Problems that each figure is of; None where there is no figure, or it has no n.
        missing: Seeds of the table without a figure.
        experiment: The experiment file and its overrides that give the figure; None where there is none.
    """

    values: dict[int, float] = field(default_factory=dict)
    published: tuple[Cell, ...] = ()
    n_items: int | None = None
    missing: tuple[int, ...] = ()
    experiment: str | None = None

    @property
    def summary(self) -> Summary | None:
        """Of ours."""
        return summarise(list(self.values.values()))

    @property
    def is_blank(self) -> bool:
        """Whether neither the papers nor we have anything there, nor ever will."""
        return not (self.values or self.published or self.experiment)


@dataclass(frozen=True)
class FilledTable:
    """A published table with ours.

    Attributes:
        cells: One list for each line, one entry for each column.
        used: The runs that a figure was taken from.
        missing: What is missing, and why as far as known; a line each.
        commands: What fills the missing cells.
        remarks: What a reader should know about the figures.
    """

    table: Table
    cells: list[list[Filled]]
    used: list[Record]
    missing: list[str]
    commands: list[str]
    remarks: list[str]


def fill_table(
    table: Table,
    records: Sequence[Record],
    compose: Compose,
    overrides: Sequence[str] = (),
    results_dir: str = "results",
) -> FilledTable:
    """Finds the runs of each cell.

    Args:
        table: The published one.
        records: Of all runs there are.
        compose: ``lora_one.experiments.compose_experiment``, or what stands in for it.
        overrides: Applied to every experiment, after its own.
        results_dir: Where the commands are to leave their runs.

    Raises:
        UserError: If an experiment cannot be composed, or runs of one cell differ in more than the seed.
    """
    return _Filling(table, records, compose, overrides, results_dir).filled()


class _Filling:
    """What is shared by the cells of a table while they are filled."""

    def __init__(
        self,
        table: Table,
        records: Sequence[Record],
        compose: Compose,
        overrides: Sequence[str],
        results_dir: str,
    ) -> None:
        self.table, self.compose, self.overrides, self.results_dir = table, compose, overrides, results_dir
        self.runs: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            self.runs[settings_key(record["config"])].append(record)
        self.configs: dict[str, ExperimentConfig] = {}
        self.used: dict[str, Record] = {}
        self.matched: set[str] = set()
        self.remarks: list[str] = []
        self.seeds_to_run: dict[str, set[int]] = {}

    def filled(self) -> FilledTable:
        lines = progress_bar(self.table.lines, shown=sys.stderr.isatty(), desc="experiments", leave=False)
        cells = [self._line(line) for line in lines]
        missing = [
            text for line, own in zip(self.table.lines, cells, strict=True) for text in self._lacks(line, own)
        ]
        missing += _states(self.runs, self.matched)
        n_others = sum(len(runs) for key, runs in self.runs.items() if key not in self.matched)
        if n_others and self.configs:
            self.remarks.append(
                f"{n_others} runs have other settings than this table's experiments and are not in it; "
                "give the overrides that they were started with"
            )
        self.remarks += provenance(list(self.used.values()))
        commands = self._commands()
        if self.overrides:
            self.remarks.insert(0, f"ours are with {' '.join(self.overrides)}, which was not published")
        return FilledTable(
            self.table,
            cells,
            list(self.used.values()),
            missing,
            commands,
            list(dict.fromkeys(self.remarks)),
        )

    def _line(self, line: Line) -> list[Filled]:
        measured = {
            column.name: self._cell(line, column) for column in self.table.columns if not column.mean_of
        }
        return [
            self._mean(line, column, [measured[name] for name in column.mean_of])
            if column.mean_of
            else measured[column.name]
            for column in self.table.columns
        ]

    def _cell(self, line: Line, column: Column) -> Filled:
        published = tuple(line.published.get(column.name, ()))
        spec = line.experiments.get(column.name)
        if spec is None or column.metric is None:
            return Filled(published=published)
        config = self._config(spec)
        key = settings_key(config.model_dump())
        self.matched.add(key)
        name = f"{line.method}, {column.title}"
        runs = self._measured(name, column.metric, config, self.runs.get(key, []))
        check_alike(f"table {self.table.name}, {name}", runs, column.metric)
        values = {run["seed"]: value_at(run, column.metric) or 0.0 for run in runs}
        if runs and column.metric.startswith(f"{COST}."):
            self.remarks.append(f"{name}: on {'; '.join(sorted({devices_of(run) for run in runs}))}")
        judged = {str((figure_at(run, column.metric) or {}).get("decoding")) for run in runs}
        self.remarks += [f"{name}: {how}" for how in sorted(judged) if how.startswith("judged by ")]
        self.used |= {run["run_id"]: run for run in runs}
        missing = self._missing(values)
        if missing:
            self.seeds_to_run.setdefault(spec, set()).update(missing)
        n_items = (figure_at(runs[0], column.metric) or {}).get("n") if runs else None
        return Filled(values, published, n_items, missing, spec)

    def _measured(
        self, name: str, metric: str, config: ExperimentConfig, runs: Sequence[Record]
    ) -> list[Record]:
        """The finished runs that have the figure, on as many problems as are asked for."""
        measured = [run for run in runs if run["status"] == "finished" and figure_at(run, metric) is not None]
        measured.sort(key=lambda run: run["seed"])
        if metric.startswith(f"{COST}."):  # of the training, whatever was tested after it
            return measured
        if any(override.lstrip("+").startswith("eval.limit=") for override in self.overrides):
            left_out = [run for run in measured if limit_of(run, metric) != config.eval.limit]
            measured = [run for run in measured if run not in left_out]
            if left_out:
                self.remarks.append(f"{name}: {len(left_out)} runs with another eval.limit are left out")
        limits = {limit for run in measured if (limit := limit_of(run, metric)) is not None}
        if limits:
            self.remarks.append(f"{name}: tested on the first {max(limits)} problems only")
        return measured

    def _missing(self, values: dict[int, float]) -> tuple[int, ...]:
        # Other seeds are as good as the table's own.
        wanted = [seed for seed in self.table.seeds if seed not in values]
        return tuple(wanted[: max(0, len(self.table.seeds) - len(values))])

    def _lacks(self, line: Line, cells: Sequence[Filled]) -> list[str]:
        """What a line misses: columns that miss the same seeds in one text."""
        columns: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for cell, column in zip(cells, self.table.columns, strict=True):
            if cell.missing and not column.mean_of:
                columns[cell.missing].append(column.title)
        return [
            f"missing: {line.method}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
            f" of {'; '.join(titles)}"
            for seeds, titles in columns.items()
        ]

    def _mean(self, line: Line, column: Column, others: Sequence[Filled]) -> Filled:
        published = tuple(line.published.get(column.name, ()))
        if not all(cell.experiment for cell in others):
            return Filled(published=published)
        seeds = set.intersection(*(set(cell.values) for cell in others))
        values = {seed: sum(cell.values[seed] for cell in others) / len(others) for seed in sorted(seeds)}
        return Filled(values, published, None, self._missing(values))

    def _config(self, spec: str) -> ExperimentConfig:
        if spec not in self.configs:
            self.configs[spec] = self.compose(spec, self.overrides)
        return self.configs[spec]

    def _commands(self) -> list[str]:
        """One for each experiment file and set of seeds, where its overrides can be swept over."""
        sweeps: dict[tuple[Any, ...], list[list[str]]] = defaultdict(list)
        for spec, seeds in self.seeds_to_run.items():
            words = command_of(spec, self.overrides)
            keys = tuple(word.split("=", 1)[0] for word in words)
            sweeps[(words[0], keys, tuple(sorted(seeds)))].append(words)
        return [
            self._command(words, seeds)
            for (_, _, seeds), members in sweeps.items()
            for words in _swept(members)
        ]

    def _command(self, words: Sequence[str], seeds: Sequence[int]) -> str:
        words = [*words, f"seed={','.join(str(seed) for seed in seeds)}"]
        if self.results_dir != "results" and not any("results_dir=" in word for word in words):
            words.append(f"results_dir={self.results_dir}")
        is_sweep = any("," in word for word in words)
        return shlex.join(["python", "run_exp.py", *["-m"] * is_sweep, *words])


def _swept(members: Sequence[list[str]]) -> Sequence[list[str]]:
    """One command for all members, where these differ in the value of one key only."""
    columns = [list(dict.fromkeys(values)) for values in zip(*members, strict=True)]
    varying = [values for values in columns if len(values) > 1]
    if len(varying) > 1 or any("," in value for values in varying for value in values):
        return members
    return [[values[0] + "".join(f",{value.split('=', 1)[1]}" for value in values[1:]) for values in columns]]


def _states(runs: dict[str, list[Record]], matched: set[str]) -> list[str]:
    """Runs of the table that have not ended well."""
    lines = []
    for run in (run for key in sorted(matched) for run in runs.get(key, ())):
        if run["status"] != "finished":
            reason = f": {' '.join(run['error'].split())}" if run.get("error") else ""
            lines.append(f"{run['run_id']} is {run['status']}{reason}")
    return lines
