"""The same table as aligned text, Markdown, LaTeX and CSV.

A cell may hold several lines; a table for programs has one number a cell, and goes to CSV.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from lora_one.tables import markdown_table

FORMATS = ("text", "markdown", "latex", "csv")
_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "…": r"\ldots{}",
    "γ": r"$\gamma$",
    "–": "--",
}


def as_text(header: Sequence[str], rows: Sequence[Sequence[str]], remarks: Sequence[str] = ()) -> str:
    """Aligned columns for the terminal, remarks below."""
    lines = [line for row in [header, *rows] for line in _physical_lines(row)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    table.insert(len(_physical_lines(header)), "  ".join("-" * width for width in widths))
    return "\n".join([*(line.rstrip() for line in table), *remarks])


def _physical_lines(row: Sequence[str]) -> list[list[str]]:
    parts = [cell.split("\n") for cell in row]
    height = max(len(part) for part in parts)
    return [[part[i] if i < len(part) else "" for part in parts] for i in range(height)]


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]], remarks: Sequence[str] = ()) -> str:
    """A Markdown table with the remarks as a list below."""
    table = markdown_table([[_markdown(cell) for cell in row] for row in [header, *rows]])
    below = [""] * bool(remarks) + [f"- {_markdown(remark)}" for remark in remarks]
    return "\n".join([table, *below]) + "\n"


def _markdown(text: str) -> str:
    # An error's text, or a folder's name, is not Markdown.
    for sign, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", "<br>")):
        text = text.replace(sign, written)
    return text


def as_latex(
    header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", remarks: Sequence[str] = ()
) -> str:
    """A LaTeX table for the package booktabs; remarks are comments."""
    body = [" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in [header, *rows]]
    comments = [f"% {' '.join(remark.split())}" for remark in remarks]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{_latex(caption)}}}",
            f"\\begin{{tabular}}{{{'l' * len(header)}}}",
            r"\toprule",
            body[0],
            r"\midrule",
            *body[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            *comments,
            "",
        ]
    )


def _latex_cell(text: str) -> str:
    lines = [_latex(line) for line in text.split("\n")]
    return lines[0] if len(lines) == 1 else r"\shortstack[l]{" + r" \\ ".join(lines) + "}"


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Comma-separated values with the keys of the first row as the head."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
