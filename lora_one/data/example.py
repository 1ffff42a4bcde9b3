"""What one row becomes, and what is particular to a dataset."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lora_one.data.rows import HubSource, Row


class RowError(ValueError):
    """A row that cannot become an example; who reads the rows adds the place."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, the text to learn after it, and the row's own answer for graders.

    Examples of one ``group`` never lie in two splits: the prompt itself, or what several prompts are
    rewritings of. ``turns`` are what a chat template is given before the target, as role and content;
    none: the prompt as the user's turn.
    """

    prompt: str
    target: str
    answer: str
    group: str
    turns: tuple[tuple[str, str], ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class DatasetSpec:
    """What is particular to one dataset.

    Attributes:
        columns: Columns that every row must have.
        optional_columns: Columns that are read where a row has them.
        aliases: Names that the same columns have in other published files of the dataset.
        headerless: Columns of its published CSV or TSV files that come without a header.
        to_example: Turns a row into an example, or into None where the papers leave the row out;
            RowError for a value that cannot be.
        sources: Split name to its source on the Hub. A split that is not here is carved from
            ``train`` (validation), or does not exist (test).
        labels: The words that a classification answers with, in the order of the label's numbers.
        generate: For generated data: split and number of rows to rows.
        generated_rows: Rows of each split where the config names no size.
        joiner: Put between prompt and target, as the published programs did.
        max_tokens: Training examples with this many tokens or more are left out.
        streamed: Whether its training rows are read from the Hub one by one until there are enough.
        test: Spec that reads the test split, where that is another dataset.
    """

    columns: tuple[str, ...]
    to_example: Callable[[Row], Example | None]
    sources: Mapping[str, HubSource]
    labels: tuple[str, ...] | None = None
    generate: Callable[[str, int], list[Row]] | None = None
    generated_rows: dict[str, int] | None = None
    joiner: str = " "
    max_tokens: int | None = None
    test: str | None = None
    optional_columns: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    headerless: tuple[str, ...] = ()
    streamed: bool = False
