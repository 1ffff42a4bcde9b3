"""Rows of texts, from local files and from the Hub."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one.errors import UserError
from lora_one.hub import offline_hint

Row = dict[str, str]
Columns = tuple[str, ...]


@dataclass(frozen=True)
class HubSource:
    """A split of a Hub dataset."""

    path: str
    split: str
    config: str | None = None


def file_rows(path: Path, columns: Columns, optional: Columns = ()) -> Iterator[Row]:
    """The rows of a local file, each with ``columns``, and with those of ``optional`` that it has.

    Raises:
        UserError: For a file that cannot be read, or a row that is broken or lacks a column: with its place.
    """
    try:
        is_folder = path.is_dir()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a .jsonl or .json file") from None
    if is_folder:
        raise UserError(f"{path}: is a folder; give the path of a .jsonl or .json file")
    if not path.is_file():
        raise UserError(f"{path}: no such data file; give the path of a .jsonl or .json file")
    if path.suffix not in {".jsonl", ".json"}:
        raise UserError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; give .jsonl or .json")
    rows = _json_lines(path) if path.suffix == ".jsonl" else _json_array(path)
    for place, row in rows:
        yield _read_row(row, columns, optional, f"{path}, {place}")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8", errors="strict") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not valid JSON ({error.msg}); mend or remove it"
            ) from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text (byte {error.start}); convert it") from None


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); mend it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); convert it") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds a {type(rows).__name__}; give a list of rows, or a .jsonl file")
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def hub_rows(
    source: HubSource, columns: Columns, optional: Columns = (), remedy: str = "give a local file"
) -> Iterator[Row]:
    """The rows of a split on the Hub, like ``file_rows``.

    Raises:
        UserError: If the Hub cannot be reached, or a row lacks a column.
    """
    import datasets  # slow to import, and not needed for generated or local data

    name = source.path if source.config is None else f"{source.path} ({source.config})"
    try:
        rows = datasets.load_dataset(source.path, source.config, split=source.split)
    except Exception as error:
        raise UserError(f"dataset {name}: {offline_hint(error)}; or {remedy}") from error
    for number, row in enumerate(rows, start=1):
        yield _read_row(row, columns, optional, f"{name}, row {number}")


def _read_row(row: Any, columns: Columns, optional: Columns, place: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{place}: is a {type(row).__name__}; expected an object with {', '.join(columns)}")
    missing = [column for column in columns if row.get(column) is None]
    if missing and missing[0] in row:
        raise UserError(f"{place}: column {missing[0]!r} is null; fill it in, or remove the row")
    if missing:
        raise UserError(f"{place}: no column {missing[0]!r}; it has: {', '.join(map(str, row))}")
    given = [column for column in optional if row.get(column) is not None]
    return {column: _text(row[column]) for column in (*columns, *given)}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
