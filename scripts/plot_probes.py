"""The probes of several runs in one picture: a line a method, the mean over its seeds.

    python run_exp.py -m init.direction=LoRA-One,LoRA-GA seed=0,1 'probes=[update,spectrum]'
    python scripts/plot_probes.py results --out results/probes.png
    python scripts/plot_probes.py results --keys update/cosine_gradient spectrum/norm_moved

Runs whose settings differ in more than the seed are lines of their own.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_one.config import result_settings
from lora_one.errors import UserError, nearest
from lora_one.probes.callback import FILE
from lora_one.probes.figures import curve
from lora_one.records import read_record
from lora_one.tracking import read_metrics

Runs = dict[str, list[list[dict[str, Any]]]]


def read_runs(root: Path) -> Runs:
    """Rows of the probed runs below a folder, by method, those of all seeds together.

    Raises:
        UserError: If there are none.
    """
    found: dict[str, dict[str, list[list[dict[str, Any]]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(root.rglob(FILE)):
        record, rows = read_record(path.parent), read_metrics(path)
        if record is None or not rows:
            continue
        settings = result_settings(record["config"])
        settings.pop("seed")
        found[record["method"]][json.dumps(settings, sort_keys=True)].append(rows)
    if not found:
        raise UserError(f"{root}: no run with a {FILE} below it; train with probes=all")
    return {
        method if len(by_settings) == 1 else f"{method} ({number})": runs
        for method, by_settings in found.items()
        for number, runs in enumerate(by_settings.values(), start=1)
    }


def over_seeds(runs: list[list[dict[str, Any]]], key: str) -> list[tuple[int, float]]:
    """Mean of a figure over the runs that have it, at the steps that all of these have it at."""
    curves = [dict(points) for rows in runs if (points := curve(rows, key))]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return [(step, mean(points[step] for points in curves)) for step in steps]


def choose_keys(runs: Runs, asked: list[str]) -> list[str]:
    """The figures to draw: all that there are, or those asked for.

    Raises:
        UserError: If one is in no run.
    """
    known = list(
        dict.fromkeys(k for rs in runs.values() for rows in rs for row in rows for k in row["totals"])
    )
    for key in asked:
        if key not in known:
            raise UserError(
                f"--keys {key}: no run has it{nearest(key, known)}; there are: {', '.join(known)}"
            )
    return asked or known


def draw(runs: Runs, keys: list[str], path: Path, log: list[str]) -> None:
    """Writes the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    n_columns = min(3, len(keys))
    n_rows = -(-len(keys) // n_columns)
    size = (3.6 * n_columns, 2.7 * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, layout="constrained", squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=False):
        for number, (method, of_seeds) in enumerate(runs.items()):
            points = [point for point in over_seeds(of_seeds, key) if point[1] > 0 or key not in log]
            if points:
                axis.plot(*zip(*points, strict=True), ".-", color=f"C{number}", label=method)
            for rows in of_seeds if len(of_seeds) > 1 and key not in log else []:
                axis.plot(*zip(*curve(rows, key), strict=True), color=f"C{number}", alpha=0.3, linewidth=0.8)
        axis.set(title=key, xlabel="optimiser step", yscale="log" if key in log else "linear")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    legends = [axis.get_legend_handles_labels() for axis in axes.flat]
    shown = {name: line for lines, names in legends for line, name in zip(lines, names, strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    """Draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with runs")
    parser.add_argument("--out", type=Path, help="the picture; default: probes.png in the folder")
    parser.add_argument("--keys", nargs="+", default=[], help="figures; default: all")
    parser.add_argument("--log", nargs="+", default=[], help="figures with a logarithmic axis")
    arguments = parser.parse_args()
    try:
        runs = read_runs(arguments.root)
        keys = choose_keys(runs, arguments.keys)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    out = arguments.out or arguments.root / "probes.png"
    draw(runs, keys, out, arguments.log)
    print(f"{out}: {', '.join(f'{method} (n = {len(rows)})' for method, rows in runs.items())}")


if __name__ == "__main__":
    main()
