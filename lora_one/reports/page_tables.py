"""The tables of a page."""

from collections import Counter
from collections.abc import Sequence
from typing import Any
from xml.etree.ElementTree import Element

from lora_one.config import result_settings
from lora_one.reports.elements import element, notes, table
from lora_one.reports.paper_layout import interval, ours, published, table_notes, title
from lora_one.reports.papers import Filled, FilledTable
from lora_one.reports.reading import Record, Records, flatten, init_seconds, value_at
from lora_one.reports.rows import HEADER, Row, form_of

# More rows than that are not all shown side by side at first.
_FIRST_SIDE_BY_SIDE = 5
_READING = "Ours with its 95 % interval and number of runs; below it what was published, and by whom."


def rows_table(rows: Sequence[Row], metric: str) -> list[Element]:
    """Rows that can be sorted by any column, without columns that say nothing."""
    if not rows:
        return []
    shown = [
        name
        for name in HEADER
        if not (name == "dataset" and len({row.dataset for row in rows}) == 1)
        and not (name == "settings" and not any(row.settings for row in rows))
        and not (name == "loss" and metric == "validation_loss")
    ]
    body = [
        element("tr", element("td", str(number), class_="number"), *_row_cells(row, metric, shown))
        for number, row in enumerate(rows, 1)
    ]
    return [table(["#", *(name.format(metric=metric) for name in shown)], body, "sortable")]


def _row_cells(row: Row, metric: str, shown: Sequence[str]) -> list[Element]:
    numbers, texts = row.numbers(metric), dict(zip(HEADER, row.cells(metric), strict=True))
    keys = {
        "learning rate": "learning_rate",
        "n": "n",
        "{metric}": metric,
        "95 % interval": f"{metric}_low95",
    }
    keys |= {"loss": "validation_loss", "init s": "init_seconds", "train s": "train_seconds"}
    return [
        _cell(
            texts[name],
            numbers[keys[name]] if name in keys else texts[name],
            "words" if name == "settings" else "number",
        )
        for name in shown
    ]


def _cell(text: str, value: Any, kind: str) -> Element:
    # What was not measured is sorted below all numbers.
    return element("td", text, class_=kind, data_value="" if value is None else value)


def papers_table(filled: FilledTable) -> list[Element]:
    """A published table in the papers' shape: ours, then what was published and by whom."""
    columns = filled.table.columns
    body = [
        element(
            "tr",
            element("th", line.method, scope="row"),
            *(
                element("td", *_papers_cell(cell, ours(cell, column), interval(cell, column)))
                for cell, column in zip(cells, columns, strict=True)
            ),
        )
        for line, cells in zip(filled.table.lines, filled.cells, strict=True)
    ]
    return [
        element("p", f"Settings: {filled.table.source}. {_READING}", class_="faint small"),
        table(["method", *(title(column) for column in columns)], body, "paper first-fixed"),
        *notes([*table_notes(filled), *filled.remarks]),
        *_to_fill(filled),
    ]


def _to_fill(filled: FilledTable) -> list[Element]:
    if not (filled.missing or filled.commands):
        return []
    commands = [element("pre", "\n".join(filled.commands))] if filled.commands else []
    summary = element("summary", "What is missing, and what would fill it")
    return [element("details", summary, *notes(filled.missing), *commands)]


def _papers_cell(cell: Filled, text: str, bounds: str) -> list[Element]:
    parts = []
    if text:
        parts.append(element("div", text, class_="ours" if cell.values else "missing"))
    if cell.values:
        n, wanted = len(cell.values), len(cell.values) + len(cell.missing)
        runs = f"{n} of {wanted} runs" if cell.missing else f"{n} run{'s' * (n > 1)}"
        parts.append(element("div", ", ".join(filter(None, (bounds, runs))), class_="small"))
    theirs = [f"{published(one)} {one.source}" for one in cell.published]
    return parts + [element("div", text, class_="faint small") for text in theirs]


def settings_tables(rows: Sequence[Row]) -> list[Element]:
    """What differs between the rows, marked where most have something else; and what is the same in all."""
    if not rows:
        return []
    flat = [flatten(result_settings(row.runs[0]["config"])) for row in rows]
    keys = sorted({key for settings in flat for key in settings} - {"seed"})
    varying = [key for key in keys if len({repr(settings.get(key)) for settings in flat}) > 1]
    same = [
        element("div", element("code", f"{key}={flat[0].get(key)}")) for key in keys if key not in varying
    ]
    common = element(
        "details",
        element("summary", f"{len(same)} settings are the same in all"),
        element("div", *same, class_="pairs"),
    )
    if not varying:
        return [common]
    counts = {key: Counter(repr(settings.get(key)) for settings in flat) for key in varying}
    first = min(len(rows), _FIRST_SIDE_BY_SIDE)
    body = [
        element(
            "tr",
            element("th", key, scope="row"),
            *(
                _setting(value, 2 * counts[key][repr(value)] <= len(flat), number >= first)
                for number, value in enumerate(settings.get(key) for settings in flat)
            ),
        )
        for key in varying
    ]
    names = [_short_name(number, row) for number, row in enumerate(rows, 1)]
    boxed = table(["setting", *names], body, "first-fixed", id="settings-table")
    for cell in list(boxed.iter("th"))[1 + first : 1 + len(rows)]:
        cell.set("class", "hidden")
    hint = "Marked is what most rows do not have; # is the row's number in the comparison."
    return [element("p", hint, class_="faint small"), *_chooser(names, first), boxed, common]


def _short_name(number: int, row: Row) -> str:
    return f"#{number} {row.method}, lr {row.rate:g}"


def _setting(value: Any, is_marked: bool, is_hidden: bool) -> Element:
    content = element("mark", str(value)) if is_marked else str(value)
    return element("td", content, class_="hidden" if is_hidden else None)


def _chooser(names: Sequence[str], first: int) -> list[Element]:
    if len(names) <= first:
        return []
    boxes = []
    for column, name in enumerate(names, 1):
        checked = "checked" if column <= first else None
        box = element("input", type="checkbox", data_column=column, checked=checked)
        boxes.append(element("label", box, f" {name}"))
    summary = element("summary", f"Choose among {len(names)} rows")
    return [element("details", summary, element("div", *boxes, class_="chooser"))]


def troubles(records: Records, states: dict[str, str]) -> list[Element]:
    """Every run that has no result, with its error and the command that started it."""
    parts = []
    for _, record in records.found:
        state = states[record["run_id"]]
        if state == "finished":
            continue
        error = record.get("error") or ("its program is gone" if state == "dead" else "")
        parts += [
            element("h3", record["run_id"], " is ", element("span", state, class_=f"state {state}")),
            *([element("pre", error)] if error else []),
        ]
        command = record.get("code", {}).get("command")
        if command and state != "running":
            parts.append(
                element(
                    "p", "The same command goes on: ", element("code", f"python {command}"), class_="small"
                )
            )
    for line in records.damaged:
        parts += [element("h3", element("span", "damaged", class_="state damaged")), element("pre", line)]
    return parts


def runs_table(records: Records, states: dict[str, str], metric: str) -> list[Element]:
    """Every run, to be sorted and searched."""
    if not records.found:
        return []
    header = ["run", "state", "method", "dataset", "learning rate", "seed", metric, "loss"]
    header += ["minutes", "init s", "peak GB", "started", "machine", "code"]
    body = [_run_row(record, states[record["run_id"]], metric) for record in records.all]
    boxed = table(header, body, "sortable", id="runs-table")
    boxed.set("class", "scroll tall")
    search = element(
        "input",
        type="search",
        data_filter="runs-table",
        placeholder="words to look for",
        aria_label="filter runs",
    )
    return [search, boxed]


def _run_row(record: Record, state: str, metric: str) -> Element:
    config, value, loss = record["config"], value_at(record, metric), value_at(record, "validation_loss")
    stages = record.get("stages", {})
    seconds = sum(stage["seconds"] for stage in stages.values())
    hardware = record.get("hardware", {})
    machine = ", ".join(hardware.get("gpus") or [f"{hardware.get('cpu_cores', '?')} cores"])
    commit = str(record.get("code", {}).get("commit") or "")[:8]
    changed = " with changes" * bool(record.get("code", {}).get("dirty"))
    rate = config["model"]["learning_rate"]
    return element(
        "tr",
        element("td", record["run_id"], class_="words"),
        element("td", state, class_=f"state {state}"),
        element("td", record["method"]),
        element("td", config["dataset"]["name"]),
        _cell(f"{rate:g}", rate, "number"),
        _cell(str(record["seed"]), record["seed"], "number"),
        _cell("" if value is None else form_of([record], metric).format(value), value, "number"),
        _cell("" if loss is None else f"{loss:.4f}", loss, "number"),
        _cell(f"{seconds / 60:.1f}", seconds, "number"),
        _cell(f"{init_seconds(record):.1f}", init_seconds(record), "number"),
        _peak_cell(stages),
        element("td", str(record.get("started", ""))[:16].replace("T", " "), class_="number"),
        element("td", machine),
        element("td", commit + changed, class_="number"),
    )


def _peak_cell(stages: dict[str, dict[str, float]]) -> Element:
    """Of the GPU where there is one, else of the process."""
    for kind in ("peak_gpu_bytes", "peak_resident_bytes"):
        peak = max((stage[kind] for stage in stages.values() if kind in stage), default=0)
        if peak:
            return _cell(f"{peak / 1e9:.2f}", peak, "number")
    return _cell("", None, "number")
