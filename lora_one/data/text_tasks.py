"""Reading comprehension and plain text: SQuAD and WikiText."""

import json
import re

from lora_one.data.example import DatasetSpec, Example, RowError
from lora_one.data.rows import HubSource, Row

_HEADING = re.compile(r"^\s*=.*=\s*$")
_WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1", "b08601e04326c79dfdd32d625aee71d232d685c3")
_SQUAD = ("rajpurkar/squad", "7b6d24c440a36b6815f21b70d25016731768db1f")


def _squad_row(row: Row) -> Example:
    """All its answers are the target, as published; the answer for graders is their list, as JSON.

    Questions on one passage stay in one split.
    """
    try:
        texts = [str(text) for text in json.loads(row["answers"])["text"]]
    except (ValueError, TypeError, KeyError):
        raise RowError('column \'answers\': expected {"text": [...], "answer_start": [...]}') from None
    if not texts:
        raise RowError("column 'answers': has no text")
    prompt = f"answer the question: {row['question']}\ncontext: {row['context']}\nresult: "
    return Example(prompt, ", ".join(texts), json.dumps(texts), group=row["context"])


def _wikitext_row(row: Row) -> Example | None:
    """A paragraph without a prompt; empty lines and headings are left out."""
    text = row["text"].strip()
    if not text or _HEADING.match(text):
        return None
    return Example("", text, text, group=text)


TEXTS: dict[str, DatasetSpec] = {
    "squad": DatasetSpec(
        columns=("context", "question", "answers"),
        to_example=_squad_row,
        sources={
            "train": HubSource(_SQUAD[0], "train", revision=_SQUAD[1]),
            "test": HubSource(_SQUAD[0], "validation", revision=_SQUAD[1]),
        },
    ),
    "wikitext": DatasetSpec(
        columns=("text",),
        to_example=_wikitext_row,
        sources={
            split: HubSource(_WIKITEXT[0], split, *_WIKITEXT[1:]) for split in ("train", "validation", "test")
        },
        joiner="",
    ),
}
