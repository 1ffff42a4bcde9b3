"""The papers' tables: their rows, the experiment that makes each cell, and the published values.

One YAML file of ``lora_one/assets/published/`` a table; ``docs/reproducing.md`` says which there are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from lora_one.errors import UserError, nearest

FOLDER = Path(__file__).parent / "assets" / "published"


@dataclass(frozen=True)
class Cell:
    """A published value.

    Attributes:
        value: As printed: shares in percent.
        std: Over seeds, where it is published.
        source: Who published it.
    """

    value: float
    std: float | None
    source: str


@dataclass(frozen=True)
class Column:
    """What is compared.

    Attributes:
        name: Key of a line's cells.
        title: Heading.
        metric: Where a record's metrics have it; None where no run measures it, ``note`` says why.
        percent: Whether the published value is 100 times the record's.
        mean_of: The columns that it is the mean of, where it is one.
        note: For the reader of the table.
    """

    name: str
    title: str
    metric: str | None
    percent: bool
    mean_of: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A method.

    Attributes:
        method: As the source calls it.
        experiments: Column name: experiment file of ``conf/experiment`` and overrides, as on the command
            line, such as ``glue_t5/lora dataset=mnli``. Empty for a value that is only quoted.
        published: Column name: published cells, from one source or several.
        note: For the reader of the table.
    """

    method: str
    experiments: dict[str, str]
    published: dict[str, tuple[Cell, ...]]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table of a paper.

    Attributes:
        name: On the command line.
        title: Heading.
        source: Whose settings the experiments have.
        seeds: Seeds that each experiment is run with.
        columns: By column.
        lines: By row.
        note: For the reader of the table.
    """

    name: str
    title: str
    source: str
    seeds: tuple[int, ...]
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    note: str = ""

    def experiments(self) -> tuple[str, ...]:
        """Every experiment once, in the order of the lines."""
        return tuple(dict.fromkeys(name for line in self.lines for name in line.experiments.values()))


def read_tables(folder: Path = FOLDER) -> dict[str, Table]:
    """All tables by name.

    Args:
        folder: With one YAML file a table.

    Raises:
        UserError: For a file that is none of a table.
    """
    return {path.stem: _read_table(path) for path in sorted(folder.glob("*.yaml"))}


def find_table(name: str) -> Table:
    """One of the tables.

    Raises:
        UserError: If there is none of that name.
    """
    tables = read_tables()
    if name not in tables:
        raise UserError(
            f"no such table: {name!r}{nearest(name, list(tables))}; there are {', '.join(tables)}"
        )
    return tables[name]


def printed_mean(line: Line, column: Column, source: str) -> float | None:
    """The mean of one source's published cells that a column is the mean of; None where one is missing."""
    found = [
        cell.value
        for name in column.mean_of
        for cell in line.published.get(name, ())
        if cell.source == source
    ]
    return mean(found) if found and len(found) == len(column.mean_of) else None


def _read_table(path: Path) -> Table:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        columns, own = _columns(tree["columns"])
        return Table(
            name=path.stem,
            title=tree["title"],
            source=tree["source"],
            seeds=tuple(int(seed) for seed in tree["seeds"]),
            columns=columns,
            lines=tuple(_line(line, columns, own) for line in tree["lines"]),
            note=tree.get("note", ""),
        )
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{path}: not a table ({reason}); see lora_one/published.py") from None


def _columns(tree: Mapping[str, Any]) -> tuple[tuple[Column, ...], dict[str, str]]:
    """The columns, and the overrides that each adds to a line's experiment."""
    columns = tuple(
        Column(
            name=name,
            title=of_column["title"],
            metric=of_column.get("metric"),
            percent=of_column.get("percent", True),
            mean_of=tuple(of_column.get("mean_of", ())),
            note=of_column.get("note", ""),
        )
        for name, of_column in tree.items()
    )
    return columns, {name: of_column.get("overrides", "") for name, of_column in tree.items()}


def _line(tree: Mapping[str, Any], columns: tuple[Column, ...], own: Mapping[str, str]) -> Line:
    asked = tree.get("experiments", {})
    if "experiment" in tree:
        asked = {column.name: tree["experiment"] for column in columns if not column.mean_of}
    published: dict[str, tuple[Cell, ...]] = {}
    for source, cells in tree.get("published", {}).items():
        for name, value in cells.items():
            published[name] = (*published.get(name, ()), _cell(value, source))
    unknown = sorted({*asked, *published} - {column.name for column in columns})
    if unknown:
        raise ValueError(f"line {tree['method']}: there is no column {unknown[0]}")
    return Line(
        method=tree["method"],
        experiments={name: f"{text} {own[name]}".strip() for name, text in asked.items()},
        published=published,
        note=tree.get("note", ""),
    )


def _cell(value: float | list[float], source: str) -> Cell:
    """A number, or a pair of mean and standard deviation."""
    number, std = value if isinstance(value, list) else (value, None)
    return Cell(float(number), None if std is None else float(std), source)
