"""Loading: rows from the Hub, from local files or from a generator, into disjoint splits."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one.config import DatasetConfig
from lora_one.data.specs import SPECS, DatasetSpec, Example, HubSource, Row
from lora_one.errors import UserError, nearest
from lora_one.hub import offline_hint

# One seed for every run: methods and seeds are compared on the same validation rows.
_SPLIT_SEED = 20240707
_MOST_GENERATED = 1_000_000


@dataclass(frozen=True)
class Splits:
    """The examples of one experiment.

    Attributes:
        train: Shuffled once, independently of the run's seed.
        validation: Disjoint from ``train`` and ``test`` by the examples' groups.
        test: Empty where the dataset has no test split.
        fingerprint: Hex digest of all texts in order.
        n_overlapping: Training rows left out because their group is in another split.
        n_too_long: Training rows left out by the dataset's token limit.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    fingerprint: str
    n_overlapping: int = 0
    n_too_long: int = 0


def dataset_spec(name: str) -> DatasetSpec:
    """The table entry of ``name``; UserError with the nearest name where there is none."""
    if name not in SPECS:
        raise UserError(f"dataset.name={name!r}: no such dataset{nearest(name, list(SPECS))}")
    return SPECS[name]


def load_splits(config: DatasetConfig, count_tokens: Callable[[list[str]], list[int]]) -> Splits:
    """Loads the three splits.

    Args:
        config: Names the dataset, local files and sizes.
        count_tokens: Number of tokens of each text, for the dataset's own length limit.

    Raises:
        UserError: For a missing or malformed file (with its line), a missing column, an
            unreachable Hub, or an empty split.
    """
    spec = dataset_spec(config.name)
    test = _split(config, spec, "test", config.test_size)
    rows = _split(config, spec, "train", None)
    random.Random(_SPLIT_SEED).shuffle(rows)
    train = _outside(rows, test)
    validation = _outside(_split(config, spec, "validation", config.validation_size), test)
    is_carved = not validation
    if is_carved:
        size = config.validation_size or max(1, len(train) // 20)
        validation, _ = _within_limit(train, spec, size, count_tokens)
    kept = _outside(train, validation)
    train, n_too_long = _within_limit(kept, spec, config.train_size, count_tokens)
    for name, examples in (("train", train), ("validation", validation)):
        if not examples:
            raise UserError(
                f"dataset {config.name}: of {len(rows)} rows none is left for the {name} split; "
                "give it more rows"
            )
    return Splits(
        train=tuple(train),
        validation=tuple(validation),
        test=tuple(test),
        fingerprint=_fingerprint(train, validation, test),
        n_overlapping=len(rows) - len(kept) - (len(validation) if is_carved else 0),
        n_too_long=n_too_long,
    )


def _outside(examples: list[Example], others: list[Example]) -> list[Example]:
    groups = {example.group for example in others}
    return [example for example in examples if example.group not in groups]


def _split(config: DatasetConfig, spec: DatasetSpec, split: str, size: int | None) -> list[Example]:
    reader = SPECS[spec.test] if split == "test" and spec.test else spec
    file = {"train": config.train_file, "validation": config.validation_file, "test": config.test_file}[split]
    examples: list[Example] = []
    if file is not None:
        origin = f"dataset.{split}_file={file}"
        rows = _read_file(Path(file), reader)
    elif config.train_file is not None:
        return []  # a local training file is never mixed with splits from elsewhere
    elif spec.generate is not None and spec.generated_rows is not None:
        origin = config.name
        if size is not None and size > _MOST_GENERATED:
            raise UserError(
                f"dataset.{split}_size={size}: {config.name} generates its rows, at most {_MOST_GENERATED:,}"
            )
        rows = iter(spec.generate(split, size or spec.generated_rows[split]))
    elif split in spec.sources:
        origin = spec.sources[split].path
        rows = _read_hub(spec.sources[split], reader)
    else:
        return []
    for row in rows:
        example = reader.to_example(row)
        if example is not None:
            examples.append(example)
            if size is not None and len(examples) == size:
                break
    if not examples:
        raise UserError(f"{origin}: the {split} split is empty; give it at least one usable row")
    return examples


def _within_limit(
    examples: list[Example],
    spec: DatasetSpec,
    size: int | None,
    count_tokens: Callable[[list[str]], list[int]],
) -> tuple[list[Example], int]:
    wanted = len(examples) if size is None else size
    if spec.max_tokens is None:
        return examples[:wanted], 0
    kept: list[Example] = []
    n_too_long = 0
    for start in range(0, len(examples), 1000):
        chunk = examples[start : start + 1000]
        lengths = count_tokens([example.prompt + spec.joiner + example.target for example in chunk])
        for example, length in zip(chunk, lengths, strict=True):
            if len(kept) == wanted:
                return kept, n_too_long
            if length < spec.max_tokens:
                kept.append(example)
            else:
                n_too_long += 1
    return kept, n_too_long


def _read_file(path: Path, spec: DatasetSpec) -> Iterator[Row]:
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
        yield _read_row(row, spec, f"{path}, {place}")


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


def _read_hub(source: HubSource, spec: DatasetSpec) -> Iterator[Row]:
    import datasets  # slow to import, and not needed for generated or local data

    name = source.path if source.config is None else f"{source.path} ({source.config})"
    try:
        rows = datasets.load_dataset(source.path, source.config, split=source.split)
    except Exception as error:
        raise UserError(f"dataset {name}: {offline_hint(error)}; or give dataset.train_file=…") from error
    for number, row in enumerate(rows, start=1):
        yield _read_row(row, spec, f"{name}, row {number}")


def _read_row(row: Any, spec: DatasetSpec, place: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(
            f"{place}: is a {type(row).__name__}; expected an object with {', '.join(spec.columns)}"
        )
    missing = [column for column in spec.columns if row.get(column) is None]
    if missing and missing[0] in row:
        raise UserError(f"{place}: column {missing[0]!r} is null; fill it in, or remove the row")
    if missing:
        raise UserError(f"{place}: no column {missing[0]!r}; it has: {', '.join(map(str, row))}")
    optional = [column for column in spec.optional_columns if row.get(column) is not None]
    return {column: _text(row[column]) for column in (*spec.columns, *optional)}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _fingerprint(*splits: list[Example]) -> str:
    digest = hashlib.sha256()
    for examples in splits:
        digest.update(f"{len(examples)}\n".encode())
        for example in examples:
            digest.update(json.dumps([example.prompt, example.target, example.answer]).encode())
    return digest.hexdigest()[:16]
