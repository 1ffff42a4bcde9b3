"""Loading: rows from the Hub, from local files or from a generator, into disjoint splits."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from lora_one.config import DatasetConfig
from lora_one.data.chat import Rendered
from lora_one.data.custom import spec_of
from lora_one.data.example import DatasetSpec, Example, RowError
from lora_one.data.rows import HubSource, PlacedRow, Wanted, open_hub, placed_file_rows
from lora_one.data.specs import SPECS
from lora_one.errors import UserError

# One seed for every run: methods and seeds are compared on the same validation rows.
_SPLIT_SEED = 20240707
_MOST_GENERATED = 1_000_000
CHUNK = 1000

CountTokens = Callable[[list[str]], list[int]]
Render = Callable[[Example], Example]


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
        sources: For each split from the Hub: repository, revision, and the commit where it is known.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    fingerprint: str
    n_overlapping: int = 0
    n_too_long: int = 0
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)


def load_splits(config: DatasetConfig, count_tokens: CountTokens, render: Render | None = None) -> Splits:
    """Loads the three splits.

    Args:
        config: Names the dataset, local files and sizes.
        count_tokens: Number of tokens of each text, for the dataset's own length limit.
        render: Writes each example in a chat template's form.

    Raises:
        UserError: For a missing or malformed file (with its line), a missing column, an
            unreachable Hub, or an empty split.
    """
    reader = _Reader(config, spec_of(config), render)
    test = list(reader.examples("test", config.test_size))
    rows, n_rows = _shuffled(reader, test)
    sieve = _Sieve(rows, reader.spec, count_tokens, test)
    given = list(reader.examples("validation", config.validation_size))
    validation = _outside(given, test)
    if given and not validation:
        raise UserError(
            f"dataset {config.name}: every row of the validation split is in the test split too; give others"
        )
    if not given:
        validation = sieve.take(config.validation_size or max(1, n_rows // 20))
    sieve.leave_out(validation)
    train = sieve.take(config.train_size)
    for name, examples in (("train", train), ("validation", validation)):
        if not examples:
            raise UserError(
                f"dataset {config.name}: of {sieve.n_read} rows none is left for the {name} split; "
                "give it more rows"
            )
    return Splits(
        train=tuple(train),
        validation=tuple(validation),
        test=tuple(test),
        fingerprint=_fingerprint(train, validation, test),
        n_overlapping=sieve.n_overlapping,
        n_too_long=sieve.n_too_long,
        sources=reader.sources,
    )


def held_out_examples(name: str, file: Path | None, limit: int | None = None) -> list[Example]:
    """The test split of a dataset alone, from a local file or from the Hub.

    Raises:
        UserError: As ``load_splits``; or if the dataset has no test split.
    """
    config = DatasetConfig(name=name, test_file=None if file is None else str(file))
    examples = list(_Reader(config, spec_of(config), None).examples("test", limit))
    if not examples:
        raise UserError(f"dataset {name}: has no test split")
    return examples


def _outside(examples: list[Example], others: list[Example]) -> list[Example]:
    groups = {example.group for example in others}
    return [example for example in examples if example.group not in groups]


def _shuffled(reader: "_Reader", test: list[Example]) -> tuple[Iterator[Example], int]:
    """The training rows in their order, and how many of them there are to choose from."""
    if reader.is_streamed:
        if reader.config.train_size is None:
            raise UserError(
                f"dataset.train_size: is required where rows are streamed (dataset {reader.config.name}); "
                "give a number of rows, or dataset.streaming=false"
            )
        return reader.examples("train", None), reader.config.train_size
    rows = list(reader.examples("train", None))
    random.Random(_SPLIT_SEED).shuffle(rows)
    groups = {example.group for example in test}
    return iter(rows), sum(example.group not in groups for example in rows)


class _Reader:
    """The one way from a row, wherever it comes from, to an example."""

    def __init__(self, config: DatasetConfig, spec: DatasetSpec, render: Render | None) -> None:
        self.config = config
        self.spec = spec
        self.render = render
        self.sources: dict[str, dict[str, Any]] = {}
        is_remote = config.train_file is None and "train" in spec.sources
        self.is_streamed = is_remote and (spec.streamed if config.streaming is None else config.streaming)

    def examples(self, split: str, size: int | None) -> Iterator[Example]:
        """The examples of a split, the first ``size`` of them; nothing where there is no such split."""
        spec = SPECS[self.spec.test] if split == "test" and self.spec.test else self.spec
        opened = self._open(split, size, spec)
        if opened is None:
            return
        origin, rows = opened
        n_read, groups = 0, dict[str, str]()
        for place, row in rows:
            try:
                example = spec.to_example(row)
                if example is None:
                    continue
                if self.render is not None:
                    example = self.render(example)
            except RowError as error:
                raise UserError(f"{place}: {error}") from None
            n_read += 1
            # Many rows rewrite the same question: one copy of it is enough.
            group = groups.setdefault(example.group, example.group)
            yield Example(example.prompt, example.target, example.answer, group)
            if n_read == size:
                break
        if n_read == 0:
            raise UserError(f"{origin}: the {split} split is empty; give it at least one usable row")

    def _open(
        self, split: str, size: int | None, spec: DatasetSpec
    ) -> tuple[str, Iterator[PlacedRow]] | None:
        config = self.config
        file = {"train": config.train_file, "validation": config.validation_file, "test": config.test_file}[
            split
        ]
        wanted = Wanted(spec.columns, spec.optional_columns, spec.aliases, spec.headerless)
        if file is not None:
            return f"dataset.{split}_file={file}", placed_file_rows(Path(file), wanted)
        if config.train_file is not None:
            return None  # a local training file is never mixed with splits from elsewhere
        if self.spec.generate is not None and self.spec.generated_rows is not None:
            if size is not None and size > _MOST_GENERATED:
                raise UserError(
                    f"dataset.{split}_size={size}: {config.name} generates its rows, "
                    f"at most {_MOST_GENERATED:,}"
                )
            rows = self.spec.generate(split, size or self.spec.generated_rows[split])
            return config.name, ((f"{config.name}, row {number}", row) for number, row in enumerate(rows, 1))
        if split not in self.spec.sources:
            return None
        source = self._pinned(self.spec.sources[split])
        streams = self.is_streamed and split == "train"
        rows_, self.sources[split] = open_hub(
            source,
            wanted,
            f"give dataset.{split}_file=…",
            stream_seed=_SPLIT_SEED if streams else None,
        )
        return source.path, rows_

    def _pinned(self, source: HubSource) -> HubSource:
        """``dataset.revision`` is a revision of the repository that is trained on."""
        train = self.spec.sources.get("train")
        if self.config.revision is None or train is None or source.path != train.path:
            return source
        return replace(source, revision=self.config.revision)


class _Sieve:
    """Training rows one after another, without those that are too long or lie in another split."""

    def __init__(
        self, rows: Iterator[Example], spec: DatasetSpec, count_tokens: CountTokens, test: list[Example]
    ) -> None:
        self.n_read = self.n_overlapping = self.n_too_long = 0
        self._groups = {example.group for example in test}
        self._kept = self._run(rows, spec, count_tokens)

    def leave_out(self, examples: list[Example]) -> None:
        """From now on nothing of the groups of ``examples``."""
        self._groups |= {example.group for example in examples}

    def take(self, size: int | None) -> list[Example]:
        """The next ``size``, or all that are left."""
        return list(islice(self._kept, size))

    def _run(
        self, rows: Iterator[Example], spec: DatasetSpec, count_tokens: CountTokens
    ) -> Iterator[Example]:
        while chunk := list(islice(rows, CHUNK if spec.max_tokens else 1)):
            lengths = [0] * len(chunk)
            if spec.max_tokens is not None:
                joiner = "" if isinstance(chunk[0].prompt, Rendered) else spec.joiner
                lengths = count_tokens([example.prompt + joiner + example.target for example in chunk])
            for example, length in zip(chunk, lengths, strict=True):
                self.n_read += 1
                if example.group in self._groups:
                    self.n_overlapping += 1
                elif spec.max_tokens is not None and length >= spec.max_tokens:
                    self.n_too_long += 1
                else:
                    yield example


def _fingerprint(*splits: list[Example]) -> str:
    digest = hashlib.sha256()
    for examples in splits:
        digest.update(f"{len(examples)}\n".encode())
        for example in examples:
            digest.update(json.dumps([example.prompt, example.target, example.answer]).encode())
    return digest.hexdigest()[:16]
