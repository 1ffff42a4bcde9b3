"""Whatever runs there are, side by side; those that differ in the seed alone are averaged, no others."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_one.config import result_settings
from lora_one.reports.reading import Record, figure_at, flatten, init_seconds, settings_key, value_at
from lora_one.reports.summary import interval, spread, summarise

HEADER = (
    *("dataset", "method", "settings", "learning rate", "n", "{metric}", "95 % interval"),
    *("loss", "init s", "train s"),
)
# Of so many settings each row names all; of more, those in which it differs from most of its peers.
_FEW = 3


@dataclass(frozen=True)
class Row:
    """Runs that differ in the seed alone."""

    dataset: str
    method: str
    settings: str
    finished: list[Record]
    unfinished: list[Record]

    @property
    def runs(self) -> list[Record]:
        """All of them."""
        return self.finished + self.unfinished

    @property
    def rate(self) -> float:
        """The learning rate."""
        rate: float = self.runs[0]["config"]["model"]["learning_rate"]
        return rate

    @property
    def name(self) -> str:
        """How the row is called in notes."""
        return " ".join(part for part in (self.dataset, self.method, self.settings) if part)

    def label(self, among: Sequence["Row"]) -> str:
        """A short name: without the dataset where all have the same."""
        several = len({row.dataset for row in among}) > 1
        parts = (self.dataset * several, self.method, self.settings)
        return " ".join(part for part in parts if part)

    def values(self, metric: str) -> list[float | None]:
        """A figure of each finished run."""
        return [value_at(run, metric) for run in self.finished]

    def cells(self, metric: str) -> list[str]:
        """One cell for each column of ``HEADER``."""
        form = form_of(self.finished, metric)
        return [
            self.dataset,
            self.method,
            self.settings,
            f"{self.rate:g}",
            str(len(self.finished)),
            spread(self.values(metric), form),
            interval(self.values(metric), form),
            spread(self.values("validation_loss"), "{:.4f}"),
            spread([init_seconds(run) for run in self.finished], "{:.1f}"),
            spread([train_seconds(run) for run in self.finished], "{:.1f}"),
        ]

    def numbers(self, metric: str) -> dict[str, Any]:
        """The same for programs, unrounded: shares as shares, empty where nothing was measured."""
        numbers: dict[str, Any] = {
            "dataset": self.dataset,
            "method": self.method,
            "settings": self.settings,
            "learning_rate": self.rate,
            "n": len(self.finished),
        }
        measured = {metric: self.values(metric), "validation_loss": self.values("validation_loss")}
        measured["init_seconds"] = [init_seconds(run) for run in self.finished]
        measured["train_seconds"] = [train_seconds(run) for run in self.finished]
        for name, values in measured.items():
            summary = summarise(values)
            numbers |= {
                name: summary and summary.mean,
                f"{name}_std": summary and summary.std,
                f"{name}_low95": summary and summary.low,
                f"{name}_high95": summary and summary.high,
            }
        return numbers


def form_of(runs: Sequence[Record], metric: str) -> str:
    """How a figure is written: shares of rights as percentages, losses with four digits."""
    figures = [figure for run in runs if (figure := figure_at(run, metric)) is not None]
    if any("n" not in figure for figure in figures) or metric.endswith("loss"):
        return "{:.4f}"
    return "{:.1%}" if all(figure.get("is_share", True) for figure in figures) else "{:.2f}"


def train_seconds(run: Record) -> float | None:
    """Seconds of the training steps, validation included."""
    return run.get("training", {}).get("seconds")


def group(records: Sequence[Record], metric: str = "test") -> list[Row]:
    """Rows of a table, sorted by dataset, method, settings and learning rate."""
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[(settings_key(record["config"]), *_sources(record))].append(record)
    labels = _labels([runs[0] for runs in groups.values()])
    rows = [
        Row(
            dataset=part[0]["config"]["dataset"]["name"],
            method=part[0]["method"],
            settings=", ".join(filter(None, (label, test))),
            finished=[run for run in part if run["status"] == "finished"],
            unfinished=[run for run in part if run["status"] != "finished"],
        )
        for runs, label in zip(groups.values(), labels, strict=True)
        for test, part in _by_test(runs, metric)
    ]
    return sorted(rows, key=lambda row: (row.dataset, row.method, row.settings, row.rate))


def _sources(record: Record) -> tuple[str, str]:
    # A run that failed before it read them is counted with those that have none.
    data, model = (str((record.get(part) or {}).get("fingerprint", "")) for part in ("data", "model"))
    return data, model


def _labels(records: Sequence[Record]) -> list[str]:
    """What tells each row from others; data and weights where settings do not."""
    labels = distinguishing_settings(records)
    rates = [record["config"]["model"]["learning_rate"] for record in records]
    names = [
        (record["config"]["dataset"]["name"], record["method"], rate, label)
        for record, rate, label in zip(records, rates, labels, strict=True)
    ]
    for number, (record, name) in enumerate(zip(records, names, strict=True)):
        twins = [_sources(other) for other, peer in zip(records, names, strict=True) if peer == name]
        differing = [
            f"{what} {mine or 'unread'}"
            for what, mine, all_ in zip(
                ("data", "weights"), _sources(record), zip(*twins, strict=True), strict=True
            )
            if len(set(all_)) > 1
        ]
        labels[number] = ", ".join(filter(None, (labels[number], *differing)))
    return labels


def _by_test(runs: list[Record], metric: str) -> list[tuple[str, list[Record]]]:
    """Splits runs that were tested on different problems: those are not averaged."""
    parts: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    unfinished = [run for run in runs if run["status"] != "finished"]
    for run in runs:
        if run["status"] == "finished":
            figure = figure_at(run, metric) or {}
            parts[(figure.get("n"), figure.get("data"))].append(run)
    if len(parts) <= 1:
        return [("", runs)]
    named = [(f"{metric} n={n}" + (f" of {data}" if data else ""), part) for (n, data), part in parts.items()]
    return [*named, ("", unfinished)] if unfinished else named


def distinguishing_settings(records: Sequence[Record]) -> list[str]:
    """For each record the settings that tell it from others of the same dataset and method.

    Where more than a few settings vary, a label names only those in which its record differs from most of
    the others; ``usual_settings`` says what the rest is.
    """
    labels = []
    for flat, (varying, usual) in _with_peers(records):
        named = (
            varying if len(varying) <= _FEW else [key for key in varying if repr(flat.get(key)) != usual[key]]
        )
        labels.append(", ".join(f"{key}={flat.get(key)}" for key in named))
    return labels


def usual_settings(records: Sequence[Record]) -> list[str]:
    """A line for each dataset and method of which ``distinguishing_settings`` leaves out what is usual."""
    lines = {}
    for record, (_, (varying, usual)) in zip(records, _with_peers(records), strict=True):
        if len(varying) > _FEW:
            name = f"{record['config']['dataset']['name']} {record['method']}"
            said = ", ".join(f"{key}={usual[key].strip(chr(39))}" for key in varying)
            lines[name] = f"{name}: where a row does not say otherwise, {said}"
    return [lines[name] for name in sorted(lines)]


def _with_peers(records: Sequence[Record]) -> list[tuple[dict[str, Any], tuple[list[str], dict[str, str]]]]:
    """Flat settings of each record; the keys that vary among its kind, and their commonest values."""
    flat = [flatten(result_settings(record["config"])) for record in records]
    kinds = [(record["config"]["dataset"]["name"], record["method"]) for record in records]
    of_kind = {
        kind: _varying([other for other, peer in zip(flat, kinds, strict=True) if peer == kind])
        for kind in set(kinds)
    }
    return [(mine, of_kind[kind]) for mine, kind in zip(flat, kinds, strict=True)]


def _varying(peers: Sequence[dict[str, Any]]) -> tuple[list[str], dict[str, str]]:
    keys = sorted({key for peer in peers for key in peer if key not in {"seed", "model.learning_rate"}})
    counts = {key: Counter(repr(peer.get(key)) for peer in peers) for key in keys}
    usual = {key: count.most_common(1)[0][0] for key, count in counts.items()}
    return [key for key in keys if len(counts[key]) > 1], usual


def notes(rows: Sequence[Row]) -> list[str]:
    """What is missing: runs that did not end, and seeds that other rows of the dataset have."""
    lines = [
        f"missing: {row.name} seed {run['seed']} is {run['status']}"
        + (f": {' '.join(run['error'].split())}" if run.get("error") else "")
        for row in rows
        for run in row.unfinished
    ]
    for row in rows:
        peers = [run for peer in rows if peer.dataset == row.dataset for run in peer.runs]
        have = {run["seed"] for run in row.runs}
        lines += [
            f"missing: {row.name} seed {seed} was not run"
            for seed in sorted({run["seed"] for run in peers} - have)
        ]
    return lines
