"""Tables and a figure from the records of many runs.

    python scripts/make_table.py                    every run under results/
    python scripts/make_table.py results/my_sweep --metric validation_loss

Runs that differ in their seed alone are averaged; any other difference is a row of its own. Prints
the table and writes ``table.md``, ``table.csv`` and ``loss.png`` beside the runs.
"""

import argparse
import csv
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_one.config import result_settings
from lora_one.errors import UserError
from lora_one.plots import smoothed
from lora_one.records import read_record
from lora_one.tables import markdown_table
from lora_one.tracking import read_metrics

Record = dict[str, Any]
HEADER = ["dataset", "method", "settings", "learning rate", "n", "{metric}", "loss", "init s", "train s"]


@dataclass(frozen=True)
class Row:
    """Runs that differ in the seed alone."""

    dataset: str
    method: str
    settings: str
    finished: list[Record]
    unfinished: list[Record]

    @property
    def name(self) -> str:
        """How the row is called in notes."""
        return " ".join(part for part in (self.dataset, self.method, self.settings) if part)

    def cells(self, metric: str) -> list[str]:
        """One cell for each column of ``HEADER``."""
        runs = self.finished
        rate = f"{(runs or self.unfinished)[0]['config']['model']['learning_rate']:g}"
        return [
            self.dataset,
            self.method,
            self.settings,
            rate,
            str(len(runs)),
            spread(
                [metric_value(run, metric) for run in runs],
                "{:.1%}" if metric != "validation_loss" else "{:.4f}",
            ),
            spread([metric_value(run, "validation_loss") for run in runs], "{:.4f}"),
            spread([init_seconds(run) for run in runs], "{:.1f}"),
            spread([run["training"]["seconds"] for run in runs], "{:.1f}"),
        ]


def load_records(root: Path) -> list[tuple[Path, Record]]:
    """All runs below ``root``, with their folders.

    Raises:
        UserError: If there is none.
    """
    found = [(path.parent, read_record(path.parent)) for path in sorted(root.rglob("record.json"))]
    records = list(
        {record["run_id"]: (folder, record) for folder, record in found if record is not None}.values()
    )
    if not records:
        raise UserError(f"{root}: no record.json below it; run an experiment, or name another folder")
    return records


def group(records: list[Record]) -> list[Row]:
    """Rows of the table, sorted by dataset and method."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        settings = result_settings(record["config"])
        settings.pop("seed")
        settings["data"] = record["data"].get("fingerprint")
        groups[json.dumps(settings, sort_keys=True)].append(record)
    labels = distinguishing_settings([runs[0] for runs in groups.values()])
    rows = [
        Row(
            dataset=part[0]["config"]["dataset"]["name"],
            method=part[0]["method"],
            settings=", ".join(filter(None, (label, test_size))),
            finished=[run for run in part if run["status"] == "finished"],
            unfinished=[run for run in part if run["status"] != "finished"],
        )
        for runs, label in zip(groups.values(), labels, strict=True)
        for test_size, part in by_test_size(runs)
    ]
    return sorted(rows, key=lambda row: (row.dataset, row.method, row.settings))


def by_test_size(runs: list[Record]) -> list[tuple[str, list[Record]]]:
    """Splits runs that were tested on different numbers of problems: those are not averaged."""
    parts: dict[int | None, list[Record]] = defaultdict(list)
    unfinished = [run for run in runs if run["status"] != "finished"]
    for run in runs:
        if run["status"] == "finished":
            parts[(run["metrics"].get("test") or {}).get("n")].append(run)
    if len(parts) <= 1:
        return [("", runs)]
    named = [(f"test n={n}", part) for n, part in parts.items()]
    return [*named, ("", unfinished)] if unfinished else named


def distinguishing_settings(records: list[Record]) -> list[str]:
    """For each record the settings that tell it from others of the same dataset and method."""
    flat = [flatten(result_settings(record["config"])) for record in records]
    kinds = [(record["config"]["dataset"]["name"], record["method"]) for record in records]
    labels = []
    for mine, kind in zip(flat, kinds, strict=True):
        peers = [other for other, other_kind in zip(flat, kinds, strict=True) if other_kind == kind]
        keys = sorted({key for peer in peers for key in peer if key not in {"seed", "model.learning_rate"}})
        varying = [key for key in keys if len({repr(peer.get(key)) for peer in peers}) > 1]
        labels.append(", ".join(f"{key}={mine.get(key)}" for key in varying))
    return labels


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a nested dictionary."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def notes(rows: list[Row]) -> list[str]:
    """What is missing: runs that did not end, and seeds that other rows of the dataset have."""
    lines = []
    for row in rows:
        for run in row.unfinished:
            reason = f": {run['error']}" if run.get("error") else ""
            lines.append(f"missing: {row.name} seed {run['seed']} is {run['status']}{reason}")
        peers = [
            run for peer in rows if peer.dataset == row.dataset for run in peer.finished + peer.unfinished
        ]
        have = {run["seed"] for run in row.finished + row.unfinished}
        lines += [
            f"missing: {row.name} seed {seed} was not run"
            for seed in sorted({run["seed"] for run in peers} - have)
        ]
    return lines


def metric_value(run: Record, metric: str) -> float | None:
    """A figure of a finished run, or None where it was not measured."""
    value = run["metrics"].get(metric)
    return value["value"] if isinstance(value, dict) else value


def init_seconds(run: Record) -> float:
    """Seconds from the pretrained model to the first training step.

    A gradient that was read from the cache counts with what it took to make.
    """
    seconds = {name: run["stages"].get(name, {"seconds": 0.0})["seconds"] for name in ("gradient", "init")}
    gradient = run.get("gradient") or {}
    if gradient.get("cache_file"):
        seconds["gradient"] = gradient["seconds"]
    return sum(seconds.values())


def spread(values: list[float | None], form: str) -> str:
    """Mean ± standard deviation; a dash where nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = form.format(mean(known))
    return text if len(known) == 1 else f"{text} ± {form.format(stdev(known))}"


def as_text(header: list[str], cells: list[list[str]]) -> str:
    """An aligned table for the terminal."""
    widths = [max(len(row[column]) for row in [header, *cells]) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in [header, *cells]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def as_markdown(header: list[str], cells: list[list[str]], remarks: list[str]) -> str:
    """The same in Markdown, with the remarks below."""
    below = [""] * bool(remarks) + [f"- {remark}" for remark in remarks]
    return "\n".join([markdown_table([header, *cells]), *below]) + "\n"


def plot(rows: list[Row], folders: dict[str, Path], path: Path) -> None:
    """Smoothed training loss against step, one curve a row: mean over its seeds, band min to max."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for row in rows:
        curves = [dict(smoothed(losses(folders[run["run_id"]]))) for run in row.finished]
        steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        if not steps:
            continue
        values = [[curve[step] for curve in curves] for step in steps]
        rate = row.finished[0]["config"]["model"]["learning_rate"]
        (line,) = axis.plot(
            steps, [mean(at) for at in values], label=f"{row.name}, lr {rate:g}, n = {len(curves)}"
        )
        axis.fill_between(
            steps, [min(at) for at in values], [max(at) for at in values], alpha=0.15, color=line.get_color()
        )
    axis.set(xlabel="optimiser step", ylabel="training loss, smoothed", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def losses(folder: Path) -> list[tuple[int, float]]:
    """Training loss of every step of a run."""
    return [(row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", nargs="?", type=Path, default=Path("results"), help="folder of runs")
    parser.add_argument("--metric", default="test", choices=["test", "test_before", "validation_loss"])
    arguments = parser.parse_args()
    try:
        records = load_records(arguments.root)
    except UserError as error:
        sys.exit(f"error: {error}")
    rows = group([record for _, record in records])
    header = [name.format(metric=arguments.metric) for name in HEADER]
    cells = [row.cells(arguments.metric) for row in rows]
    remarks = notes(rows)
    print(as_text(header, cells), *remarks, sep="\n")
    (arguments.root / "table.md").write_text(as_markdown(header, cells, remarks), encoding="utf-8")
    with (arguments.root / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *cells])
    plot(rows, {record["run_id"]: folder for folder, record in records}, arguments.root / "loss.png")
    print(f"written: {arguments.root}/table.md, table.csv, loss.png")


if __name__ == "__main__":
    main()
