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
from lora_one.reproduction import (
    Experiment,
    describe,
    plan_table,
    single_commands,
    sweep_commands,
    sweep_file,
)
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
        environment, shown = self.environments[place], shlex.join(command[1:])
        output: Any = None
        where = ""
        if self.logs is not None:
            self.logs.mkdir(parents=True, exist_ok=True)
            path = self.logs / f"{number}.log"
            output = path.open("ab")  # what an earlier launch said stays
            output.write(f"{shown}\n".encode())
            output.flush()
            where = f" on GPU {environment['CUDA_VISIBLE_DEVICES']}, {path}"
        print(f"[{number}/{n}]{where}: {shown}", flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=output, stderr=output
        )
        self._running[place] = (process, command)
        if self._is_stopping:  # asked while it was started
            process.send_signal(signal.SIGTERM)
        if output is not None:
            output.close()  # the child has its own

    def _ended(self) -> list[int]:
        codes = []
        for place, (process, command) in list(self._running.items()):
            if (code := process.poll()) is not None:
                del self._running[place]
                code = code if code >= 0 else 128 - code  # killed by a signal
                codes.append(code)
                if code:
                    complain(f"exit code {code}: {shlex.join(command[1:])}")
        return codes

    def _stop(self, number: int, _: object = None) -> None:
        self._is_stopping = True
        for process, _command in self._running.values():
            if number != signal.SIGINT:
                process.send_signal(signal.SIGTERM)


def slurm_command(path: Path, options: Sequence[str]) -> list[str]:
    """What submits the array of a sweep file."""
    return ["scripts/slurm_array.sh", *options, str(path)]


def submit(plan: Sequence[Experiment], path: Path, options: Sequence[str]) -> int:
    """Hands the missing runs to ``scripts/slurm_array.sh``; its exit code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, sweep_file(plan))
    environment = {"PYTHON": sys.executable} | os.environ
    return subprocess.run(slurm_command(path, options), cwd=ROOT, env=environment).returncode


def shown_commands(plan: Sequence[Experiment], place: str, path: Path, options: Sequence[str]) -> str:
    """What would be started, for a shell; the lines of a Slurm array's file as remarks."""
    if place != "slurm":
        commands = sweep_commands(plan) if place == "one" else single_commands(plan)
        return "\n".join(shlex.join(["python", "run_exp.py", *words]) for words in commands)
    lines = [str(path), *sweep_file(plan).splitlines()]
    return "\n".join([*(f"# {line}" for line in lines), shlex.join(slurm_command(path, options))])


def launch(plan: Sequence[Experiment], place: str, logs: Path) -> int:
    """Makes the missing runs on this machine; the exit code: a failure's before that of being unfinished."""
    if place == "one":
        workers, commands = Workers([{}], None), sweep_commands(plan)
    else:
        each = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible_gpus()]
        workers, commands = Workers(each, logs), single_commands(plan)
    codes = workers.run([[sys.executable, "run_exp.py", *words] for words in commands])
    failures = [code for code in codes if code not in (0, UNFINISHED)]
    return max(failures or codes, default=0)


def reproduce(options: argparse.Namespace) -> int:
    """Estimate, then commands or runs; the exit code.

    Raises:
        UserError: For bad input.
    """
    machine = Machine(options.tflops, options.fp32_tflops, options.utilisation, options.mean_tokens)
    plan = plan_table(find_table(options.table), options.overrides, machine)
    place = place_of(options.on, len(visible_gpus()))
    # The commands alone can go to a file, or to bash.
    print(describe(plan, machine), file=sys.stderr if options.dry_run else sys.stdout, flush=True)
    folder = (Path(plan[0].config.results_dir) / "tables").absolute()
    path, for_sbatch = folder / f"{options.table}.txt", shlex.split(options.sbatch)
    if not any(experiment.missing for experiment in plan):
        return 0
    if options.dry_run:
        print(shown_commands(plan, place, path, for_sbatch))
        return 0
    return submit(plan, path, for_sbatch) if place == "slurm" else launch(plan, place, folder / options.table)


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
