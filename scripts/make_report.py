"""One HTML page from the records of many runs.

    python scripts/make_report.py                         every run under results/, to results/report.html
    python scripts/make_report.py results/my_sweep -o /tmp/report.html --metric validation_loss
    python scripts/make_report.py results --table math model=tinyllama       with a paper's table in it

Tables that can be sorted, curves with their values, settings side by side, and runs that failed with their
errors. The file holds all it needs and loads nothing, so that it can be sent or kept. --table may be given
several times; overrides are those that the tables' runs were started with beside the experiment.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_one.errors import UserError
from lora_one.experiments import compose_experiment
from lora_one.files import write_text
from lora_one.published import find_table
from lora_one.reports.page import Contents, make_page
from lora_one.reports.papers import fill_table
from lora_one.reports.reading import chosen_metric, load_records
from lora_one.reports.rows import group
from lora_one.reports.words import folder_and_overrides


def make_report(options: argparse.Namespace) -> Path:
    """Writes the page.

    Returns:
        Its file.

    Raises:
        UserError: For bad input, for nothing to show, and for runs that must not be averaged.
    """
    root, overrides = folder_and_overrides(options.words, bool(options.table))
    records = load_records(root)
    if not (records.found or records.damaged or options.table):
        raise UserError(f"{root}: no record.json below it; run an experiment, or name another folder")
    papers = [
        fill_table(find_table(name), records.all, compose_experiment, overrides, str(root))
        for name in dict.fromkeys(options.table)
    ]
    metric = chosen_metric(records, options.metric)
    page = make_page(Contents(root, records, group(records.all, metric), metric, papers))
    path: Path = options.output or root / "report.html"
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it, or name another file with -o")
    try:
        write_text(path, page)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file with -o") from None
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", metavar="results | override", help="folder of runs (results), and overrides"
    )
    parser.add_argument("--table", action="append", default=[], help="a paper's table by name")
    parser.add_argument("--metric", help="of the tables, as for make_table.py")
    parser.add_argument("-o", "--output", type=Path, help="the file (report.html beside the runs)")
    try:
        path = make_report(parser.parse_intermixed_args())
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
