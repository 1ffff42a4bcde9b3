"""Tables and figures from the records of many runs.

    python scripts/make_table.py                              every run under results/, side by side
    python scripts/make_table.py results/my_sweep --metric validation_loss --format latex
    python scripts/make_table.py --table math                 a paper's table, filled as far as there are runs
    python scripts/make_table.py --table math results model=tinyllama       the same of a stand-in

Runs that differ in the seed alone are averaged. Any other difference is a row of its own, and in a cell of a
paper's table an error. Overrides are those that the table's runs were started with beside the experiment.
Beside the runs it leaves table*.md, .tex and .csv, and figures: loss and accuracy against step and against
seconds, and the final figure against the learning rate.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_one.errors import UserError
from lora_one.experiments import compose_experiment
from lora_one.files import write_text
from lora_one.published import find_table
from lora_one.reports import paper_layout, row_layout
from lora_one.reports.figures import write_figures
from lora_one.reports.formats import FORMATS
from lora_one.reports.papers import fill_table
from lora_one.reports.reading import chosen_metric, load_records, load_some
from lora_one.reports.rows import group
from lora_one.reports.words import folder_and_overrides

_ENDINGS = {"markdown": "md", "latex": "tex", "csv": "csv"}


def table_of_all(root: Path, asked: str | None) -> tuple[dict[str, str], list[str]]:
    """The table of all runs in every format, and the names of the figures it wrote."""
    records = load_some(root)
    metric = chosen_metric(records, asked)
    rows = group(records.all, metric)
    figures = write_figures(rows, records.folders, root, metric)
    return row_layout.in_every_format(rows, metric, records.remarks), figures


def papers_table(name: str, root: Path, overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """One of the papers' tables, likewise."""
    table = find_table(name)
    records = load_records(root)
    records.check_whole()
    filled = fill_table(table, records.all, compose_experiment, overrides, str(root))
    metric = next((column.metric for column in table.columns if column.metric), "test")
    figures = write_figures(
        group(filled.used, metric), records.folders, root, metric, prefix=f"table_{name}_"
    )
    return paper_layout.in_every_format(filled, records.remarks), figures


def make_table(options: argparse.Namespace) -> None:
    """Prints a table and writes it.

    Raises:
        UserError: For bad input, and for runs that must not be averaged.
    """
    root, overrides = folder_and_overrides(options.words, options.table is not None)
    if options.table is not None and options.metric is not None:
        raise UserError(f"--metric {options.metric}: a paper's table has its own figures; leave it out")
    if options.table is None:
        texts, figures = table_of_all(root, options.metric)
    else:
        texts, figures = papers_table(options.table, root, overrides)
    print(texts[options.format])
    stem = "table" if options.table is None else f"table_{options.table}"
    if not root.is_dir():
        return  # no runs yet: what the table lacks is all there is to say
    for form, ending in _ENDINGS.items():
        write_text(root / f"{stem}.{ending}", texts[form])
    names = [*(f"{stem}.{ending}" for ending in _ENDINGS.values()), *figures]
    print(f"written: {root}/{', '.join(names)}", file=sys.stderr if options.format != "text" else sys.stdout)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", metavar="results | override", help="folder of runs (results), and overrides"
    )
    parser.add_argument("--table", help="a paper's table by name; docs/reproducing.md lists them")
    parser.add_argument(
        "--metric",
        help="of the table of all runs: test (default), validation_loss, gsm8k, humaneval.others.NAME, …",
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="of what is printed")
    try:
        make_table(parser.parse_intermixed_args())
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
