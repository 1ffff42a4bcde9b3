"""The table of whatever runs there are, laid out in every format."""

from collections.abc import Sequence

from lora_one.reports.alike import provenance
from lora_one.reports.formats import as_csv, as_latex, as_markdown, as_text
from lora_one.reports.rows import HEADER, Row, notes, usual_settings

_SETTINGS = HEADER.index("settings")
# A terminal's table and its remarks are cut there; the files hold everything.
_WIDEST_SETTINGS = 72
_MOST_REMARKS = 20


def in_every_format(rows: Sequence[Row], metric: str, remarks: Sequence[str] = ()) -> dict[str, str]:
    """The rows as text for a terminal, Markdown, LaTeX and CSV.

    Args:
        rows: Of the table.
        metric: The figure beside the validation loss.
        remarks: On how the runs were read.
    """
    kept = [i for i, name in enumerate(HEADER) if not (name == "loss" and metric == "validation_loss")]
    header = [HEADER[i].format(metric=metric) for i in kept]
    cells = [[row.cells(metric)[i] for i in kept] for row in rows]
    records = [run for row in rows for run in row.runs]
    made_by = provenance([run for row in rows for run in row.finished])
    below = [*remarks, *usual_settings(records), *made_by, *notes(rows)]
    shown = below[:_MOST_REMARKS]
    if len(below) > len(shown):
        shown.append(f"… and {len(below) - len(shown)} more remarks in table.md")
    return {
        "text": as_text(header, [_narrow(row) for row in cells], shown),
        "markdown": as_markdown(header, cells, below),
        "latex": as_latex(header, cells, "Mean ± standard deviation over seeds.", below),
        "csv": as_csv([row.numbers(metric) for row in rows]),
    }


def _narrow(cells: Sequence[str]) -> list[str]:
    narrow = list(cells)
    if len(narrow[_SETTINGS]) > _WIDEST_SETTINGS:
        narrow[_SETTINGS] = narrow[_SETTINGS][: _WIDEST_SETTINGS - 1] + "…"
    return narrow
