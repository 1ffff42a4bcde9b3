"""Reading the formats of local files, each row with its place."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lora_one.errors import UserError

Placed = Iterator[tuple[str, Any]]
FORMATS = ".jsonl, .json, .csv, .tsv (each also with .gz) or .parquet"
_LARGEST_CELL = 2**31 - 1


def read_file(path: Path, headerless: tuple[str, ...] = (), lines_as: str | None = None) -> Placed:
    """The rows of a file with their places, ``line 3`` or ``row 3``; its name says the format.

    Args:
        path: The file.
        headerless: Columns of a CSV or TSV file that may come without a header.
        lines_as: Where set, .txt files can be read: a row a line, under this column.

    Raises:
        UserError: For a file that is not there, is of another format, or is broken: with the place.
    """
    try:
        is_folder = path.is_dir()
        is_file = path.is_file()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a {FORMATS} file") from None
    if is_folder:
        raise UserError(f"{path}: is a folder; give the path of a {FORMATS} file")
    if not is_file:
        raise UserError(f"{path}: no such data file; give the path of a {FORMATS} file")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix == ".parquet" and path.suffix.lower() != ".gz":
        return _parquet(path)
    if suffix in {".csv", ".tsv"}:
        return _table(path, headerless, is_tsv=suffix == ".tsv")
    if suffix in {".jsonl", ".json"}:
        return _json_lines(path) if suffix == ".jsonl" else _json_array(path)
    if suffix == ".txt" and lines_as is not None:
        return _text_lines(path, lines_as)
    raise UserError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; give {FORMATS}")


def _open(path: Path) -> IO[str]:
    # A byte order mark, as some of GLUE's files have, is no part of the first column's name.
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _unreadable(path: Path, error: Exception) -> UserError:
    """What a broken encoding or compression means."""
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"{path}: not UTF-8 text (byte {error.start}); convert it")
    if isinstance(error, PermissionError):
        return UserError(f"{path}: {error.strerror}; make it readable")
    return UserError(f"{path}: not a whole gzip file ({error}); fetch it again")


_UNREADABLE = (UnicodeDecodeError, PermissionError, gzip.BadGzipFile, EOFError, zlib.error)


def _json_lines(path: Path) -> Placed:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not valid JSON ({error.msg}); mend or remove it") from None
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None


def _json_array(path: Path) -> Placed:
    try:
        with _open(path) as file:
            rows = json.load(file)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); mend it") from None
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds a {type(rows).__name__}; give a list of rows, or a .jsonl file")
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def _table(path: Path, headerless: tuple[str, ...], *, is_tsv: bool) -> Placed:
    """Rows of a CSV file, or of a TSV file, where a quote is a character like any other."""
    csv.field_size_limit(_LARGEST_CELL)
    line = 0
    try:
        with _open(path) as file:
            rows = (
                csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
                if is_tsv
                else csv.reader(file, strict=True)
            )
            columns: list[str] = []
            for cells in rows:
                line = rows.line_num
                if not columns:
                    columns = _header(path, cells, headerless)
                    if columns == cells:
                        continue
                if not cells:
                    continue
                if len(cells) != len(columns):
                    quote = "" if is_tsv else "; a cell with a comma or a line break wants quotes"
                    raise UserError(
                        f"{path}, line {line}: has {len(cells)} cells where the header has {len(columns)}"
                        + (quote or "; mend or remove it")
                    )
                yield f"line {line}", dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {line + 1}: not valid CSV ({error}); mend or remove it") from None
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None


def _header(path: Path, cells: list[str], headerless: tuple[str, ...]) -> list[str]:
    """The names of the columns: those of the first line, or the known ones of a file that has no header."""
    if len(cells) == len(headerless) and not set(cells) & set(headerless):
        return list(headerless)
    twice = {name for name in cells if cells.count(name) > 1}
    if twice:
        raise UserError(f"{path}, line 1: column {min(twice)!r} is there twice; rename one")
    return cells


def _text_lines(path: Path, column: str) -> Placed:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                yield f"line {number}", {column: line}
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None


def _parquet(path: Path) -> Placed:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a whole Parquet file ({reason}); fetch or write it again") from None
