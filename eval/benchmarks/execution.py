"""Running many programs: contained, side by side, and their outcomes kept as they end."""

import argparse
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from eval.command import positive
from eval.sandbox.outside import Limits, Outcome, Sandbox, SandboxError
from lora_one.errors import UserError
from lora_one.processes import Processes
from lora_one.progress import progress_bar


@dataclass(frozen=True)
class Trial:
    """A program and its test.

    Attributes:
        name: For messages.
        program: Generated.
        test: Run after it, in the same interpreter.
    """

    name: str
    program: str
    test: str


def add_execution_flags(parser: argparse.ArgumentParser) -> None:
    """The flags about running programs."""
    usual = Limits()
    parser.add_argument(
        "--timeout",
        type=float,
        default=usual.cpu_seconds,
        help=f"processor seconds of a program, and half of its seconds by the clock ({usual.cpu_seconds:g})",
    )
    parser.add_argument(
        "--memory", type=positive, default=usual.memory >> 20, help=f"MiB of a program ({usual.memory >> 20})"
    )
    parser.add_argument(
        "--workers", type=positive, help="programs side by side on a machine; default: as many as cores"
    )
    parser.add_argument(
        "--unsafe_execution",
        action="store_true",
        help="if programs cannot be contained here, run them all the same, as you, with resource limits only",
    )


def chosen_limits(options: argparse.Namespace) -> Limits:
    """What the flags allow a program."""
    if options.timeout <= 0:
        raise UserError(f"--timeout={options.timeout:g}: must be above 0")
    return Limits(options.timeout, 2 * options.timeout, options.memory << 20)


def run_trials(
    trials: Sequence[Trial],
    sandbox: Sandbox,
    kept: Path | None,
    workers: int | None = None,
    *,
    shown: bool,
    processes: Processes | None = None,
) -> list[Outcome]:
    """The outcome of every trial, in their order.

    Args:
        trials: What to run; the same on all processes.
        sandbox: Where.
        kept: File that holds one line for each that has ended: those are not run again. Processes
            other than the main one write to files of their own beside it.
        workers: Side by side on a machine; None: as many as there are processor cores.
        shown: Whether there is a progress bar.
        processes: Who shares the trials, so that none waits long for the others; None: this one runs all.

    Raises:
        UserError: If a container cannot be made any more, or ``kept`` cannot be written.
    """
    keys = [_key(number, trial, sandbox) for number, trial in enumerate(trials)]
    outcomes = _read_kept(kept) if kept is not None else {}
    rank, world_size = 0, 1
    if processes is not None:
        rank, world_size = processes.rank, processes.world_size
        outcomes = processes.from_main(outcomes)
    mine = [number for number, key in enumerate(keys) if key not in outcomes][rank::world_size]
    own_file = kept if kept is None or rank == 0 else _kept_by(kept, rank)
    with _appending(own_file) as append, ThreadPoolExecutor(_threads(workers, world_size)) as pool:
        futures = {pool.submit(_run, sandbox, trials[number]): number for number in mine}
        with progress_bar(shown=shown, desc="run", unit="program", total=len(mine)) as bar:
            try:
                for future in as_completed(futures):
                    key = keys[futures[future]]
                    outcomes[key] = future.result()
                    append(json.dumps({"key": key, **vars(outcomes[key])}) + "\n")
                    bar.update()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    if processes is not None:
        outcomes |= dict(processes.gather([(keys[number], outcomes[keys[number]]) for number in mine]))
    return [outcomes[key] for key in keys]


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads(workers: int | None, world_size: int) -> int:
    """Of this process, when all those of its machine are to run ``workers`` programs together."""
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size > 1 else 1
    return max(1, (workers or cores()) // neighbours)


def _run(sandbox: Sandbox, trial: Trial) -> Outcome:
    try:
        return sandbox.run(trial.program, trial.test)
    except (SandboxError, OSError):  # such as too many processes on the machine, at this moment
        try:
            return sandbox.run(trial.program, trial.test)
        except (SandboxError, OSError) as error:
            raise UserError(
                f"{trial.name}: its program could not be started ({error}); the same command goes on"
            ) from error


def _key(number: int, trial: Trial, sandbox: Sandbox) -> str:
    """Of all that an outcome depends on; the number tells apart samples that are the same text."""
    parts = [number, trial.program, trial.test, sandbox.mechanism, vars(sandbox.limits)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _kept_by(path: Path, rank: int | str) -> Path:
    return path.with_name(f"{path.stem}-{rank}{path.suffix}")


def _read_kept(path: Path) -> dict[str, Outcome]:
    """What all processes have kept, of this launch or of a killed one that may have had more of them."""
    outcomes = {}
    pattern = _kept_by(Path(glob.escape(path.name)), "*").name
    texts = [
        place.read_text(encoding="utf-8") for place in (path, *path.parent.glob(pattern)) if place.is_file()
    ]
    for line in "\n".join(texts).split("\n"):
        try:
            row = json.loads(line)
            key = row.pop("key")
            outcomes[key] = Outcome(**row)
        except (ValueError, TypeError, KeyError, AttributeError):  # a line that a kill has cut
            continue
    return outcomes


@contextmanager
def _appending(path: Path | None) -> Iterator[Callable[[str], None]]:
    if path is None:
        yield lambda line: None
        return
    try:
        with path.open("ab+") as file:
            file.seek(0)
            is_cut = bool(text := file.read()) and not text.endswith(b"\n")

            def append(line: str) -> None:
                file.write(line.encode())
                file.flush()

            append("\n" * is_cut)
            yield append
    except OSError as error:
        raise UserError(f"{path}: cannot write outcomes there ({error.strerror})") from error
