"""A sweep of eight runs, whole, from the command to its end: four ways of starting it, in one run.

    python scripts/bench_sweep.py                     # the array only where there is sbatch
    python scripts/bench_sweep.py --rounds 3 model.max_steps=50

    loop    a program for each run, one after another
    sweep   run_exp.py -m, all runs in one process
    joblib  the same with two processes (hydra/launcher=joblib), a thread each
    array   scripts/slurm_array.sh: a Slurm task for each run, as many at a time as the node takes

Every way begins with an empty results folder, so it computes the gradient that the runs share. The runs
are LoRA-One on the embedded model with eight learning rates and ``debug=short``; overrides come after the
flags. Seconds by the clock, medians of the rounds, each round beginning with another way. A Slurm node of
one's own: ``python tests/slurm_node.py start FOLDER``.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_one.errors import UserError
from lora_one.records import read_record
from lora_one.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
RATES = tuple(f"{n}e-3" for n in range(1, 9))
THREADS = str(os.cpu_count() or 1)


def overrides(results: Path, given: Sequence[str]) -> list[str]:
    """What all runs of a way have in common."""
    return ["debug=short", *given, f"results_dir={results}"]


def execute(command: Sequence[str], threads: str) -> None:
    """Runs a command to its end.

    Raises:
        UserError: If it fails; with the last lines that it printed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        said = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise UserError(f"{' '.join(map(str, command))}: exit code {done.returncode}: {said}")


def loop(results: Path, given: Sequence[str]) -> None:
    """A program for each run."""
    for rate in RATES:
        command = [sys.executable, "run_exp.py", *overrides(results, given), f"model.learning_rate={rate}"]
        execute(command, THREADS)


def sweep(results: Path, given: Sequence[str], launcher: str = "basic", threads: str = THREADS) -> None:
    """Hydra's own loop, in one process unless the launcher has more."""
    rates = f"model.learning_rate={','.join(RATES)}"
    command = [sys.executable, "run_exp.py", "-m", f"hydra/launcher={launcher}", rates]
    execute([*command, *overrides(results, given)], threads)


def joblib(results: Path, given: Sequence[str]) -> None:
    """Two processes with a thread each."""
    sweep(results, given, "joblib", "1")


def array(results: Path, given: Sequence[str]) -> None:
    """A Slurm array, waited for."""
    file = results.with_suffix(".txt")
    file.write_text("".join(f"model.learning_rate={rate}\n" for rate in RATES), encoding="utf-8")
    options = ["--wait", "--cpus-per-task=1", "--mem=2G", f"--output={results}-%a.log"]
    execute(["scripts/slurm_array.sh", *options, str(file), *overrides(results, given)], "1")


def check_runs(results: Path) -> None:
    """Raises UserError unless all eight are finished and share one gradient."""
    records = [read_record(path.parent) for path in results.rglob("record.json")]
    finished = sum(record is not None and record["status"] == "finished" for record in records)
    gradients = len(list((results / "gradients").glob("*.safetensors")))
    if (finished, gradients) != (len(RATES), 1):
        raise UserError(f"{results}: {finished} of {len(RATES)} runs are finished, {gradients} gradients")


def measure(
    ways: dict[str, Callable[[Path, Sequence[str]], None]], rounds: int, given: Sequence[str]
) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for n in range(rounds):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            with tempfile.TemporaryDirectory() as folder:
                results = Path(folder) / "results"
                began = time.perf_counter()
                ways[name](results, given)
                seconds[name].append(time.perf_counter() - began)
                check_runs(results)
            print(f"round {n + 1}, {name}: {seconds[name][-1]:.1f} s", file=sys.stderr)
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """Medians, and the ratios to the loop of the same round."""
    rows = [["way", "seconds", "loop / way"]]
    for name, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["loop"], taken, strict=True))
        rows.append([name, f"{statistics.median(taken):.1f}", f"{ratio:.2f}"])
    return markdown_table(rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="of every run")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be at least 1")
    ways: dict[str, Callable[[Path, Sequence[str]], None]] = {"loop": loop, "sweep": sweep, "joblib": joblib}
    if shutil.which("sbatch"):
        ways["array"] = array
    else:
        print("no sbatch here: without the array", file=sys.stderr)
    try:
        print(table(measure(ways, options.rounds, options.overrides)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
