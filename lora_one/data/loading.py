"""Loading: rows from the Hub, from local files or from a generator, into disjoint splits."""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_one.config import DatasetConfig
from lora_one.data.rows import file_rows, hub_rows
from lora_one.data.specs import SPECS, DatasetSpec, Example
from lora_one.errors import UserError, nearest

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


def held_out_examples(name: str, file: Path | None, limit: int | None = None) -> list[Example]:
    """The test split of a dataset alone, from a local file or from the Hub.

    Raises:
        UserError: As ``load_splits``; or if the dataset has no test split.
    """
    config = DatasetConfig(name=name, test_file=None if file is None else str(file))
    examples = _split(config, dataset_spec(name), "test", limit)
    if not examples:
        raise UserError(f"dataset {name}: has no test split")
    return examples


def _outside(examples: list[Example], others: list[Example]) -> list[Example]:
    groups = {example.group for example in others}
    return [example for example in examples if example.group not in groups]


def _split(config: DatasetConfig, spec: DatasetSpec, split: str, size: int | None) -> list[Example]:
    reader = SPECS[spec.test] if split == "test" and spec.test else spec
    file = {"train": config.train_file, "validation": config.validation_file, "test": config.test_file}[split]
    examples: list[Example] = []
    if file is not None:
        origin = f"dataset.{split}_file={file}"
        rows = file_rows(Path(file), reader.columns, reader.optional_columns)
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
        rows = hub_rows(
            spec.sources[split], reader.columns, reader.optional_columns, f"give dataset.{split}_file=…"
        )
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


def _fingerprint(*splits: list[Example]) -> str:
    digest = hashlib.sha256()
    for examples in splits:
        digest.update(f"{len(examples)}\n".encode())
        for example in examples:
            digest.update(json.dumps([example.prompt, example.target, example.answer]).encode())
    return digest.hexdigest()[:16]
