"""One HTML file with everything there is to say about a folder of runs; it loads nothing from anywhere."""

import base64
import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element

from lora_one.reports.alike import provenance
from lora_one.reports.curves import figures_of
from lora_one.reports.elements import data_block, element, notes, serialised
from lora_one.reports.page_data import figure_data
from lora_one.reports.page_tables import papers_table, rows_table, runs_table, settings_tables, troubles
from lora_one.reports.papers import FilledTable
from lora_one.reports.reading import Records
from lora_one.reports.rows import Row, usual_settings
from lora_one.reports.rows import notes as missing_runs
from lora_one.states import STATES, state_of

_ASSETS = Path(__file__).resolve().parent.parent / "assets" / "report"
# As scripts/status.py has it: a run elsewhere that says running and has written nothing for so long is dead.
_QUIET_SECONDS = 600.0
_READING = "Means are over seeds, ± one standard deviation."
_CURVES = (
    "A curve is the mean of its seeds, the band reaches from the lowest to the highest. "
    "Point at a curve for its values; click on a name to hide or show it."
)


@dataclass(frozen=True)
class Contents:
    """What a page shows.

    Attributes:
        root: The folder of the runs.
        records: Its runs.
        rows: Those that differ in the seed alone taken together.
        metric: The figure of the tables beside the validation loss.
        papers: Published tables, filled.
    """

    root: Path
    records: Records
    rows: Sequence[Row]
    metric: str
    papers: Sequence[FilledTable] = ()


def make_page(contents: Contents) -> str:
    """The page as text."""
    style, program = ((_ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    drawn = figures_of(contents.rows, contents.records.folders, contents.metric)
    # A curve without one finite number is left out.
    figures = [data for data in map(figure_data, drawn) if data["curves"]]
    states = {
        record["run_id"]: state_of(record, folder, _QUIET_SECONDS)
        for folder, record in contents.records.found
    }
    name = f"Runs in {contents.root}"
    sections = _sections(contents, states, [str(figure["title"]) for figure in figures])
    head = element(
        "head",
        element("meta", charset="utf-8"),
        _policy(style, program),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", name),
        element("style", style),
    )
    body = element(
        "body",
        element("main", *_top(name, contents, states, sections), *sections),
        data_block("figures", figures),
        element("script", program),
    )
    return serialised(element("html", head, body, lang="en"))


def _policy(style: str, program: str) -> Element:
    """Forbids the browser everything but this very style and program."""
    allowed = {"style-src": style, "script-src": program}
    rules = [f"{kind} 'sha256-{_digest(text)}'" for kind, text in allowed.items()]
    content = "; ".join(["default-src 'none'", *rules, "base-uri 'none'", "form-action 'none'"])
    return element("meta", http_equiv="Content-Security-Policy", content=content)


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _top(name: str, contents: Contents, states: dict[str, str], sections: Sequence[Element]) -> list[Element]:
    counts = Counter(states.values()) + Counter({"damaged": len(contents.records.damaged)})
    badges: list[Element | str] = [f"{sum(counts.values()):,} runs: "]
    for state in STATES:
        if counts[state]:
            badges += [
                ", " * (len(badges) > 1),
                element("span", f"{counts[state]:,} {state}", class_=f"state {state}"),
            ]
    links = [element("a", section[0].text or "", href=f"#{section.get('id')}") for section in sections]
    return [
        element("h1", name),
        element("p", *badges),
        element("p", f"Made {time.strftime('%Y-%m-%d %H:%M %Z')}. {_READING}", class_="faint small"),
        element("nav", *links),
    ]  # fmt: skip


def _sections(contents: Contents, states: dict[str, str], titles: Sequence[str]) -> list[Element]:
    """The parts that have something to show, each with a heading first."""
    finished = [run for row in contents.rows for run in row.finished]
    remarks = [*contents.records.remarks, *provenance(finished), *usual_settings(contents.records.all)]
    parts = [
        *(
            (f"table-{filled.table.name}", filled.table.title, papers_table(filled))
            for filled in contents.papers
        ),
        ("comparison", "Comparison", [
            *rows_table(contents.rows, contents.metric), *notes(remarks), *_missing(contents.rows)
        ]),
        ("curves", "Curves", _charts(titles)),
        ("settings", "Settings side by side", settings_tables(contents.rows)),
        ("troubles", "Runs without a result", troubles(contents.records, states)),
        ("runs", "All runs", runs_table(contents.records, states, contents.metric)),
    ]  # fmt: skip
    return [
        element("section", element("h2", title), *content, id=name)
        for name, title, content in parts
        if content
    ]


def _missing(rows: Sequence[Row]) -> list[Element]:
    lines = missing_runs(rows)
    if not lines:
        return []
    return [element("details", element("summary", f"{len(lines)} runs are missing"), *notes(lines))]


def _charts(titles: Sequence[str]) -> list[Element]:
    if not titles:
        return []
    charts: list[Element] = [element("p", _CURVES, class_="faint small")]
    for number, title in enumerate(titles):
        charts += [
            element("h3", title[0].upper() + title[1:]),
            element("div", class_="chart", data_figure=number),
        ]
    return [*charts, element("noscript", "The curves need JavaScript; the program is in this file.")]
