"""All missing runs of one of the papers' tables.

    scripts/reproduce.sh --list                          # the tables
    scripts/reproduce.sh math --dry-run                  # the commands; runs nothing
    scripts/reproduce.sh glue_t5 model=t5small seed=0    # overrides go to every run
    scripts/reproduce.sh math --sbatch='--gres=gpu:1 --time=24:00:00'

First it prints what is finished in the results folder, GPU hours and memory of the rest, and what that
estimate assumes. Then, without asking, it starts what is missing: as a Slurm array where a cluster answers,
else one run on each GPU of this machine, else one run after another in sweeps. A run that fails does not stop
the others. The same command makes what is still missing.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lora_one.quiet import quieten_libraries

quieten_libraries()  # they speak while they are imported

import torch

from lora_one.complaints import complain
from lora_one.costs import Machine
from lora_one.errors import UserError
from lora_one.files import write_text
from lora_one.interruption import UNFINISHED
from lora_one.published import find_table, read_tables
from lora_one.reproduction import describe, plan_table, single_commands, sweep_commands, sweep_file
from lora_one.tables import markdown_table

BAD_INPUT = 2
PLACES = ("auto", "one", "gpus", "slurm")


def command_line() -> argparse.ArgumentParser:
    """The options; what is left over are overrides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="?", help="its name; --list shows them")
    parser.add_argument("overrides", nargs="*", help="for every run, as run_exp.py takes them")
    parser.add_argument("--list", action="store_true", help="name the tables and end")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--on", choices=PLACES, default="auto", help="where the runs go (auto)")
    parser.add_argument("--sbatch", default="", help="sbatch's options, as --option=value")
    machine = Machine()
    parser.add_argument("--tflops", type=positive, default=machine.tflops, help="of the GPU, in 16 bits")
    parser.add_argument(
        "--fp32-tflops", type=positive, default=machine.fp32_tflops, help="of the GPU, in float32"
    )
    parser.add_argument(
        "--utilisation", type=positive, default=machine.utilisation, help="share of them that is reached"
    )
    parser.add_argument("--mean-tokens", type=positive, help="tokens of an example, for the estimate")
    return parser


def positive(text: str) -> float:
    """A number above zero, for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: not above zero")
    return value


def place_of(asked: str, n_gpus: int) -> str:
    """Where the runs go: ``one``, ``gpus`` or ``slurm``.

    Raises:
        UserError: If that is not here.
    """
    if asked == "slurm" and shutil.which("sbatch") is None:
        raise UserError("--on=slurm: there is no sbatch here; start it where Slurm's commands are")
    if asked == "gpus" and n_gpus == 0:
        raise UserError("--on=gpus: there is no GPU here; use --on=one")
    if asked != "auto":
        return asked
    if "SLURM_JOB_ID" not in os.environ and has_cluster():
        return "slurm"
    return "gpus" if n_gpus > 1 else "one"


def has_cluster() -> bool:
    """Whether Slurm answers: its commands may be installed without a cluster behind them."""
    if not (shutil.which("sbatch") and shutil.which("sinfo")):
        return False
    try:
        return subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def visible_gpus() -> list[str]:
    """As ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = [str(number) for number in range(torch.cuda.device_count())]
    return named.split(",")[: len(numbers)] if named else numbers


class Workers:
    """Commands in processes of their own, side by side in places; stops all of them when asked to.

    Attributes:
        environments: What each place adds to the environment.
        logs: Folder of one log for each command, or None for this program's own output.
    """

    def __init__(self, environments: Sequence[dict[str, str]], logs: Path | None) -> None:
        self.environments, self.logs = list(environments), logs
        self._running: dict[int, tuple[subprocess.Popen[bytes], list[str]]] = {}
        self._is_stopping = False

    def run(self, commands: Sequence[list[str]]) -> list[int]:
        """Exit codes, in the order in which the commands ended; those not begun have none."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
        waiting, codes = list(commands), []
        try:
            while self._running or (waiting and not self._is_stopping):
                for place in range(len(self.environments)):
                    if place not in self._running and waiting and not self._is_stopping:
                        self._start(place, waiting.pop(0), len(commands) - len(waiting), len(commands))
                codes += self._ended()
                time.sleep(0.1)
        except KeyboardInterrupt:  # the terminal has told the others too
            self._stop(signal.SIGINT)
            codes += [process.wait() for process, _ in self._running.values()]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return [*codes, UNFINISHED] if self._is_stopping else codes

    def _start(self, place: int, command: list[str], number: int, n: int) -> None:
        environment = os.environ | self.environments[place]
        output: Any = None
        where = ""
        if self.logs is not None:
            self.logs.mkdir(parents=True, exist_ok=True)
            path = self.logs / f"{number}.log"
            output = path.open("wb")
            where = f" on GPU {self.environments[place]['CUDA_VISIBLE_DEVICES']}, {path}"
        print(f"[{number}/{n}]{where}: {shlex.join(command[1:])}", flush=True)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        self._running[place] = (process, command)
        if output is not None:
            output.close()  # the child has its own

    def _ended(self) -> list[int]:
        codes = []
        for place, (process, command) in list(self._running.items()):
            if (code := process.poll()) is not None:
                del self._running[place]
                codes.append(code)
                if code:
                    complain(f"exit code {code}: {shlex.join(command[1:])}")
        return codes

    def _stop(self, number: int, _: object = None) -> None:
        self._is_stopping = True
        for process, _command in self._running.values():
            if number != signal.SIGINT:
                process.send_signal(signal.SIGTERM)


def submit(text: str, name: str, results: Path, options: Sequence[str]) -> int:
    """Hands the runs to ``scripts/slurm_array.sh``."""
    path = sweep_path(results, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    environment = {"PYTHON": sys.executable} | os.environ
    return subprocess.run(slurm_command(path, options), cwd=ROOT, env=environment).returncode


def slurm_command(path: Path, options: Sequence[str]) -> list[str]:
    """What submits the array."""
    return ["scripts/slurm_array.sh", *options, str(path)]


def sweep_path(results: Path, name: str) -> Path:
    """The file of a table's missing runs."""
    return (results / "tables" / f"{name}.txt").absolute()


def reproduce(options: argparse.Namespace) -> int:
    """Estimate, then commands or runs; the exit code.

    Raises:
        UserError: For bad input.
    """
    machine = Machine(options.tflops, options.fp32_tflops, options.utilisation, options.mean_tokens)
    plan = plan_table(find_table(options.table), options.overrides, machine)
    gpus = visible_gpus()
    place = place_of(options.on, len(gpus))
    # The commands alone can go to a file, or to bash.
    print(describe(plan, machine), file=sys.stderr if options.dry_run else sys.stdout, flush=True)
    results = Path(plan[0].config.results_dir)
    arguments = sweep_commands(plan) if place == "one" else single_commands(plan)
    if options.dry_run:
        if place == "slurm":
            path = sweep_path(results, options.table)
            print(
                f"# {path}:\n{sweep_file(plan)}{shlex.join(slurm_command(path, shlex.split(options.sbatch)))}"
            )
        else:
            print("\n".join(shlex.join(["python", "run_exp.py", *words]) for words in arguments))
        return 0
    if not arguments:
        return 0
    if place == "slurm":
        return submit(sweep_file(plan), options.table, results, shlex.split(options.sbatch))
    commands = [[sys.executable, "run_exp.py", *words] for words in arguments]
    if place == "one":
        codes = Workers([{}], None).run(commands)
    else:
        each = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
        codes = Workers(each, results / "tables" / options.table).run(commands)
    bad = [code for code in codes if code not in (0, UNFINISHED)]
    return max((abs(code) for code in bad or codes), default=0)


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = command_line()
    options = parser.parse_intermixed_args(arguments)
    try:
        if options.list:
            print(markdown_table([["table", "what"], *([t.name, t.title] for t in read_tables().values())]))
            return 0
        if options.table is None:
            raise UserError("no table; give one of " + ", ".join(read_tables()))
        return reproduce(options)
    except UserError as error:
        complain(str(error))
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
