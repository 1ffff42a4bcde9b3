"""A filled table laid out: in the papers' shape, as a list, and as numbers for programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_one.published import Cell, Column
from lora_one.reports.formats import as_csv, as_latex, as_markdown, as_text
from lora_one.reports.papers import Filled, FilledTable

_LIST_HEADER = ("method", "column", "ours", "n", "95 % interval", "published", "source")


@dataclass(frozen=True)
class Layout:
    """A header, rows of text, and lines below."""

    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def in_every_format(filled: FilledTable, remarks: Sequence[str] = ()) -> dict[str, str]:
    """The table as text, Markdown, LaTeX and CSV, with what is missing and the commands that fill it.

    Args:
        filled: The table.
        remarks: On how the runs were read.
    """
    table, wide, below = filled.table, papers_shape(filled), [*remarks, *_below(filled)]
    head = f"{table.title}. Settings: {table.source}. Ours: mean ± standard deviation [95 % interval] (runs)."
    sources = "; ".join(f"[{number}] {source}" for source, number in _sources(filled).items())
    return {
        "text": "\n".join(
            [head, "", as_text(_LIST_HEADER, _as_list(filled)), "", *table_notes(filled), *below]
        ),
        "markdown": f"{head}\n\n{as_markdown(wide.header, wide.rows, [*wide.notes, *below])}",
        "latex": as_latex(wide.header, wide.rows, f"{head} Published: {sources}.", [*wide.notes, *below]),
        "csv": as_csv(_as_numbers(filled)),
    }


def papers_shape(filled: FilledTable) -> Layout:
    """A line for each method; in a cell ours with its interval and n, below it what was published."""
    sources = _sources(filled)
    columns = filled.table.columns
    rows = [
        [line.method, *(_cell(cell, column, sources) for cell, column in zip(cells, columns, strict=True))]
        for line, cells in zip(filled.table.lines, filled.cells, strict=True)
    ]
    notes = [f"[{number}] {source}" for source, number in sources.items()]
    return Layout(["method", *(title(column) for column in columns)], rows, notes + table_notes(filled))


def title(column: Column) -> str:
    """A column's heading with its unit."""
    return f"{column.title}, %" if column.percent else column.title


def ours(cell: Filled, column: Column) -> str:
    """Mean ± standard deviation in the column's unit; ``missing`` where a run would give it."""
    summary, factor = cell.summary, _factor(column)
    if summary is None:
        return "missing" if cell.missing else ""
    text = f"{factor * summary.mean:.2f}"
    return text if summary.std is None else f"{text} ± {factor * summary.std:.2f}"


def interval(cell: Filled, column: Column) -> str:
    """The 95 % interval in the column's unit; empty of fewer than two runs."""
    summary, factor = cell.summary, _factor(column)
    if summary is None or summary.low is None or summary.high is None:
        return ""
    return f"{factor * summary.low:.2f} … {factor * summary.high:.2f}"


def published(one: Cell) -> str:
    """As printed."""
    return f"{one.value:.2f}" + (f" ± {one.std:.2f}" if one.std is not None else "")


def _sources(filled: FilledTable) -> dict[str, int]:
    """The numbers that published values are marked with."""
    all_sources = (one.source for cells in filled.cells for cell in cells for one in cell.published)
    return {source: number for number, source in enumerate(dict.fromkeys(all_sources), 1)}


def _factor(column: Column) -> float:
    return 100.0 if column.percent else 1.0


def _cell(cell: Filled, column: Column, sources: dict[str, int]) -> str:
    lines = [ours(cell, column)]
    if cell.values:
        lines[0] += f" [{interval(cell, column)}]" * (len(cell.values) > 1) + f" ({len(cell.values)})"
    lines += [f"published {published(one)} [{sources[one.source]}]" for one in cell.published]
    return "\n".join(line for line in lines if line)


def _as_list(filled: FilledTable) -> list[list[str]]:
    """A row for each cell: narrow enough for a terminal, however many columns there are."""
    rows = []
    for line, cells in zip(filled.table.lines, filled.cells, strict=True):
        name = line.method
        for cell, column in zip(cells, filled.table.columns, strict=True):
            if cell.is_blank:
                continue
            # A method's name stands once.
            row = [
                name,
                title(column),
                ours(cell, column),
                str(len(cell.values)) * bool(cell.values or cell.missing),
            ]
            row += [interval(cell, column), "\n".join(published(one) for one in cell.published)]
            rows.append([*row, "\n".join(one.source for one in cell.published)])
            name = ""
    return rows


def _as_numbers(filled: FilledTable) -> list[dict[str, Any]]:
    """A row for each cell and each published value of it, unrounded, in the published unit."""
    rows = []
    for line, cells in zip(filled.table.lines, filled.cells, strict=True):
        for cell, column in zip(cells, filled.table.columns, strict=True):
            of_cell = {"table": filled.table.name, "method": line.method, **_numbers(cell, column)}
            for one in [] if cell.is_blank else cell.published or (None,):
                theirs = {
                    "published": one and one.value,
                    "published_std": one and one.std,
                    "source": one and one.source,
                }
                rows.append(of_cell | theirs)
    return rows


def _numbers(cell: Filled, column: Column) -> dict[str, Any]:
    summary = cell.summary

    def scaled(value: float | None) -> float | None:
        return None if value is None else _factor(column) * value

    return {
        "column": column.name,
        "unit": "%" if column.percent else "",
        "ours": scaled(summary.mean) if summary else None,
        "std": scaled(summary.std) if summary else None,
        "low95": scaled(summary.low) if summary else None,
        "high95": scaled(summary.high) if summary else None,
        "n": len(cell.values),
        "seeds": _joined(cell.values),
        "missing_seeds": _joined(cell.missing),
        "n_items": cell.n_items,
    }


def _joined(seeds: Sequence[int] | dict[int, float]) -> str:
    return " ".join(str(seed) for seed in seeds)


def table_notes(filled: FilledTable) -> list[str]:
    """The published table's own notes."""
    table = filled.table
    notes = [table.note] if table.note else []
    notes += [f"{column.title}: {column.note}" for column in table.columns if column.note]
    return notes + [f"{line.method}: {line.note}" for line in table.lines if line.note]


def _below(filled: FilledTable) -> list[str]:
    commands = [f"to fill: {command}" for command in filled.commands]
    return [*filled.remarks, *filled.missing, *commands]
