"""Tables for people."""

from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; rows may be shorter than it."""
    head, *body = rows
    full = (list(row) + [""] * (len(head) - len(row)) for row in (head, ["---"] * len(head), *body))
    return "\n".join("| " + " | ".join(row) + " |" for row in full)


def figure_text(figure: Mapping[str, Any]) -> str:
    """A recorded evaluation's figure with its error and n: shares of rights as percentages."""
    form = ".1%" if figure.get("is_share", True) else ".2f"
    return f"{figure['value']:{form}} ± {figure['standard_error']:{form}} (n = {figure['n']})"
