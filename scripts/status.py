"""Every run below a results folder: state, progress, time left, last loss, where it runs.

    python scripts/status.py                 # results/
    python scripts/status.py /data/results --state running,dead,failed

It only reads, so it can be used while runs are under way. A run that its record calls running is dead when
nobody holds its lock any more; on another host, whose locks may not be visible here, when it has also written
nothing for ``--quiet`` minutes. Dead, failed and unfinished runs go on with the command that started them.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_one.errors import UserError
from lora_one.records import read_record
from lora_one.states import STATES, state_of
from lora_one.tables import markdown_table
from lora_one.tracking import read_metrics

HEAD = ["run", "state", "progress", "left", "loss", "host", "job", "since", "remark"]


def describe(folder: Path, quiet_seconds: float) -> list[str]:
    """The table's row of one run."""
    try:
        record = read_record(folder)
    except UserError as error:
        return [folder.name, "damaged", "", "", "", "", "", "", str(error)]
    if record is None:  # removed since it was found
        return [folder.name, "damaged", "", "", "", "", "", "", "no record.json"]
    points = read_metrics(folder / "metrics.jsonl")
    state = state_of(record, folder, quiet_seconds)
    return [
        folder.name,
        state,
        progress(record, points),
        time_left(record, points) if state == "running" else "",
        last_loss(points),
        str(record.get("hardware", {}).get("host", "")),
        record.get("job") or "",
        str(record.get("started", ""))[:16].replace("T", " "),
        remark(record, state),
    ]


def progress(record: dict[str, Any], points: list[dict[str, Any]]) -> str:
    """Steps trained of all, and the stage that is under way."""
    n_steps = record.get("training", {}).get("n_steps")
    steps = f"{points[-1]['step']:,}/{n_steps:,}" if points and n_steps else ""
    doing = record.get("doing") if record["status"] != "finished" else None
    return ", ".join(part for part in (steps, doing) if part)


def time_left(record: dict[str, Any], points: list[dict[str, Any]]) -> str:
    """Time that the rest of the training takes at the pace of its last steps."""
    n_steps = record.get("training", {}).get("n_steps")
    steps = [point for point in points if "loss" in point][-50:]
    if not n_steps or len(steps) < 2 or steps[-1]["step"] == steps[0]["step"]:
        return ""
    pace = (steps[-1]["seconds"] - steps[0]["seconds"]) / (steps[-1]["step"] - steps[0]["step"])
    seconds = round(max(0.0, pace * (n_steps - steps[-1]["step"])))
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def last_loss(points: list[dict[str, Any]]) -> str:
    """The newest training loss."""
    losses = [point["loss"] for point in points if "loss" in point]
    return f"{losses[-1]:.4f}" if losses else ""


def remark(record: dict[str, Any], state: str) -> str:
    """Why it is not running, or what came of it."""
    if state in ("failed", "unfinished", "pruned"):
        return str(record.get("error") or "")[:120]
    if state == "dead":
        return "its program is gone; the same command goes on"
    test = record.get("metrics", {}).get("test") if state == "finished" else None
    return f"test {test['metric']} {test['value']:.1%}" if test else ""


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="?", default="results", type=Path)
    parser.add_argument("--state", help=f"only these, separated by commas: {', '.join(STATES)}")
    parser.add_argument("--quiet", type=float, default=10.0, help="minutes of silence of a dead run (10)")
    options = parser.parse_args(arguments)
    wanted = options.state.split(",") if options.state else list(STATES)
    unknown = sorted(set(wanted) - set(STATES))
    if unknown:
        print(f"error: --state {unknown[0]}: not one of {', '.join(STATES)}", file=sys.stderr)
        return 2
    folders = [path.parent for path in sorted(options.results.rglob("record.json"))]
    if not folders:
        print(f"error: {options.results}: no record.json below it; name a results folder", file=sys.stderr)
        return 2
    rows = [describe(folder, 60 * options.quiet) for folder in folders]
    shown = sorted((row for row in rows if row[1] in wanted), key=lambda row: STATES.index(row[1]))
    if shown:
        print(markdown_table([HEAD, *shown]))
    counts = Counter(row[1] for row in rows)
    print(
        f"{len(rows):,} runs: " + ", ".join(f"{counts[state]:,} {state}" for state in STATES if counts[state])
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
