"""``dataset=custom``: examples of any columns, by templates or from conversations."""

import json
import string
from collections.abc import Callable

from lora_one.config import DatasetConfig
from lora_one.data.example import DatasetSpec, Example, RowError
from lora_one.data.rows import Row
from lora_one.data.specs import SPECS
from lora_one.errors import UserError, nearest

CUSTOM = "custom"
_ROLES = {"human": "user", "gpt": "assistant"}  # the other names that are common
_ESCAPES = {r"\n": "\n", r"\t": "\t"}  # on a command line a line break is hard to write


def spec_of(config: DatasetConfig) -> DatasetSpec:
    """The table's entry, or with ``custom`` the one that the config describes.

    Raises:
        UserError: For a name that the table does not have, with the nearest; for a template that is none.
    """
    if config.name == CUSTOM:
        return _custom_spec(config)
    if config.name not in SPECS:
        raise UserError(
            f"dataset.name={config.name!r}: no such dataset{nearest(config.name, [*SPECS, CUSTOM])}"
        )
    return SPECS[config.name]


def _custom_spec(config: DatasetConfig) -> DatasetSpec:
    if config.train_file is None and config.test_file is None:
        raise UserError("dataset.train_file: is required with dataset=custom; give a file of rows")
    if config.messages is not None:
        return _conversations(config)
    if config.prompt is None or config.target is None:
        key = "prompt" if config.prompt is None else "target"
        raise UserError(
            f"dataset.{key}: is required with dataset=custom, such as dataset.prompt='Q: {{question}}\\nA: ' "
            "dataset.target=answer; or dataset.messages for conversations"
        )
    prompt, prompt_fields = _template("dataset.prompt", config.prompt)
    is_column = "{" not in config.target
    target, target_fields = _template(
        "dataset.target", f"{{{config.target}}}" if is_column else config.target
    )
    answer = config.answer

    def to_example(row: Row) -> Example:
        asked, learned = prompt(row), target(row)
        return Example(asked, learned, row[answer] if answer else learned, group=asked)

    fields = [*prompt_fields, *target_fields, *([answer] if answer else [])]
    return DatasetSpec(tuple(dict.fromkeys(fields)), to_example, sources={}, joiner="")


def _template(key: str, text: str) -> tuple[Callable[[Row], str], list[str]]:
    """What fills a template in, and the columns that it names.

    Column names may hold spaces and signs, so this is not ``str.format``: only ``{name}`` means something.
    """
    for written, meant in _ESCAPES.items():
        text = text.replace(written, meant)
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UserError(f"{key}={text!r}: {error}; write {{column}}, and {{{{ for a brace") from None
    fields = [field for _, field, _, _ in parts if field is not None]
    if any(spec or conversion for _, _, spec, conversion in parts) or "" in fields:
        raise UserError(f"{key}={text!r}: only {{column}} can be filled in; write {{{{ for a brace")

    def fill(row: Row) -> str:
        return "".join(literal + (row[field] if field is not None else "") for literal, field, _, _ in parts)

    return fill, fields


def _conversations(config: DatasetConfig) -> DatasetSpec:
    column = config.messages
    assert column is not None
    if config.prompt is not None or config.target is not None:
        raise UserError(
            "dataset.messages: has the prompt and the target; leave out dataset.prompt and .target"
        )
    if not config.chat:
        raise UserError(
            f"dataset.messages={column}: conversations need a chat template; add dataset.chat=true"
        )

    def to_example(row: Row) -> Example:
        turns = _turns(row[column], column)
        if turns[-1][0] != "assistant" or len(turns) < 2:
            raise RowError(f"column {column!r}: the last of two or more turns must be the assistant's")
        asked = json.dumps(turns[:-1])
        answer = row[config.answer] if config.answer else turns[-1][1]
        return Example(asked, turns[-1][1], answer, group=asked, turns=tuple(turns[:-1]))

    return DatasetSpec(
        (column, *([config.answer] if config.answer else [])), to_example, sources={}, joiner=""
    )


def _turns(text: str, column: str) -> list[tuple[str, str]]:
    """Role and content of each turn, in the two common forms."""
    try:
        rows = json.loads(text)
        pairs = [
            (row["role"], row["content"])
            if "role" in row
            else (_ROLES.get(row["from"], row["from"]), row["value"])
            for row in rows
        ]
    except (ValueError, TypeError, KeyError):
        pairs = []
    if not pairs or not all(isinstance(part, str) for pair in pairs for part in pair):
        raise RowError(f'column {column!r}: expected a list of {{"role": …, "content": …}}')
    return pairs
