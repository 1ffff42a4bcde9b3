"""Tables for people."""

from collections.abc import Sequence


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; rows may be shorter than it."""
    head, *body = rows
    full = (list(row) + [""] * (len(head) - len(row)) for row in (head, ["---"] * len(head), *body))
    return "\n".join("| " + " | ".join(row) + " |" for row in full)
