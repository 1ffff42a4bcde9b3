"""Rows of texts, from local files and from the Hub."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one.data.readers import read_file
from lora_one.errors import UserError, nearest
from lora_one.hub import offline_hint

# Values that are no texts (numbers, lists, …) are kept as JSON.
Row = dict[str, str]
Columns = tuple[str, ...]
PlacedRow = tuple[str, Row]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHUFFLED_AT_ONCE = 10_000
_SECONDS = 10.0


@dataclass(frozen=True)
class HubSource:
    """A split of a Hub dataset.

    Attributes:
        path: The repository.
        split: Its split.
        config: Its configuration, where it has several.
        revision: A commit, tag or branch; None: the newest.
        data_files: Pattern of the files to read, where that is not all of them.
    """

    path: str
    split: str
    config: str | None = None
    revision: str | None = None
    data_files: str | None = None

    def __str__(self) -> str:
        return self.path if self.config is None else f"{self.path} ({self.config})"


@dataclass(frozen=True)
class Wanted:
    """What is read of each row: the arguments of the same names of ``file_rows``."""

    columns: Columns
    optional: Columns = ()
    aliases: Mapping[str, str] | None = None
    headerless: Columns = ()


def file_rows(path: Path, columns: Columns, optional: Columns = ()) -> Iterator[Row]:
    """The rows of a local file, each with ``columns``, and with those of ``optional`` that it has.

    Raises:
        UserError: For a file that cannot be read, or a row that is broken or lacks a column: with its place.
    """
    return (row for _, row in placed_file_rows(path, Wanted(columns, optional)))


def placed_file_rows(path: Path, wanted: Wanted) -> Iterator[PlacedRow]:
    """``file_rows`` with the place of each row: ``file, line 3``."""
    lines_as = wanted.columns[0] if len(wanted.columns) == 1 else None
    for place, row in read_file(path, wanted.headerless, lines_as):
        yield f"{path}, {place}", _read_row(row, wanted, f"{path}, {place}")


def hub_rows(
    source: HubSource, columns: Columns, optional: Columns = (), remedy: str = "give a local file"
) -> Iterator[Row]:
    """The rows of a split on the Hub, like ``file_rows``.

    Raises:
        UserError: If the Hub cannot be reached, or a row lacks a column.
    """
    rows, _ = open_hub(source, Wanted(columns, optional), remedy)
    return (row for _, row in rows)


def open_hub(
    source: HubSource, wanted: Wanted, remedy: str, *, stream_seed: int | None = None
) -> tuple[Iterator[PlacedRow], dict[str, Any]]:
    """The placed rows of a split on the Hub, and where they are from, with the commit where it is known.

    Args:
        source: The split.
        wanted: What is read of each row.
        remedy: What to do without the Hub, for the error.
        stream_seed: If set, rows are fetched as they are asked for, in an order shuffled with this seed:
            files among each other, and rows within a buffer.

    Raises:
        UserError: If the Hub cannot be reached; or, while reading, if a row lacks a column.
    """
    import datasets  # slow to import, and not needed for generated or local data

    revision = source.revision or _newest_commit(source.path)
    settings: dict[str, Any] = {"split": source.split, "revision": revision}
    if source.data_files is not None:
        settings["data_files"] = {source.split: source.data_files}
    try:
        rows = datasets.load_dataset(
            source.path, source.config, streaming=stream_seed is not None, **settings
        )
    except Exception as error:
        raise UserError(f"dataset {source}: {offline_hint(error)}; or {remedy}") from error
    if stream_seed is not None:
        rows = rows.shuffle(seed=stream_seed, buffer_size=_SHUFFLED_AT_ONCE)
    origin = {
        "hub": source.path,
        "config": source.config,
        "split": source.split,
        "revision": source.revision,
        "commit": revision if _COMMIT.fullmatch(revision or "") else _commit_of(rows),
    }
    return _placed(rows, source, wanted, remedy), origin


def _placed(rows: Any, source: HubSource, wanted: Wanted, remedy: str) -> Iterator[PlacedRow]:
    number, rows = 0, iter(rows)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # a stream may break at any row
            raise UserError(f"dataset {source}: {offline_hint(error)}; or {remedy}") from error
        number += 1
        place = f"{source}, row {number}"
        yield place, _read_row(row, wanted, place)


def _newest_commit(path: str) -> str | None:
    """The commit to read, so that the record means what was read; None where it cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(path, timeout=_SECONDS).sha
    except Exception:
        return None  # without a network a copy in the cache may still do; loading it says what is wrong


def _commit_of(rows: Any) -> str | None:
    """The commit in the addresses that ``datasets`` kept of what it downloaded."""
    found = re.search("@" + _COMMIT.pattern, " ".join(rows.info.download_checksums or {}))
    return found.group()[1:] if found else None


def _read_row(row: Any, wanted: Wanted, place: str) -> Row:
    if not isinstance(row, dict):
        expected = ", ".join(wanted.columns)
        raise UserError(f"{place}: is a {type(row).__name__}; expected an object with {expected}")
    for theirs, ours in (wanted.aliases or {}).items():
        if theirs in row and row.get(ours) is None:
            row = {**row, ours: row[theirs]}
    missing = [column for column in wanted.columns if row.get(column) is None]
    if missing and missing[0] in row:
        raise UserError(f"{place}: column {missing[0]!r} is null; fill it in, or remove the row")
    if missing:
        names = ", ".join(map(repr, missing))
        has = list(map(str, row))
        hint = nearest(missing[0], has) if len(missing) == 1 else ""
        raise UserError(
            f"{place}: no column{'s' * (len(missing) > 1)} {names}; it has: {', '.join(has)}{hint}"
        )
    given = [column for column in wanted.optional if row.get(column) is not None]
    return {column: _text(row[column], place, column) for column in (*wanted.columns, *given)}


def _text(value: Any, place: str, column: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value)
    except TypeError:
        raise UserError(
            f"{place}: column {column!r} holds a {type(value).__name__}; make it text or numbers"
        ) from None
