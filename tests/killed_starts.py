"""Starts ``run_exp.py`` again and again, and kills it where a plan says.

    python tests/killed_starts.py

reads a JSON object a line, ``{"arguments": [...], "log": file, "death": ...}``, and answers with the start's
exit status, negative for a signal. Every start is a fork of this program, which has paid for the imports
once. ``death`` is null, or ``[function, n, when]``: the n-th call of the function ends the process with
SIGKILL, "before" it, "after" it, or "half" way, with a file it writes cut in two or a folder it deletes half
deleted. Or ``["seconds", s, ""]``: killed from outside after so long.
"""

import importlib
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Serves standard input."""
    with tempfile.TemporaryDirectory() as place:
        # Once for the imports that the stages do themselves.
        run(["debug=short", "model.max_steps=1", f"results_dir={place}"], os.devnull, None)
    print(json.dumps(0), flush=True)
    for line in sys.stdin:
        print(json.dumps(start(**json.loads(line))), flush=True)


def start(arguments: list[str], log: str, death: list[Any] | None) -> int:
    """One start, to its end; its exit status."""
    child = os.fork()
    if child == 0:
        os._exit(run(arguments, log, death))
    if death and death[0] == "seconds":
        time.sleep(death[1])
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(arguments: list[str], log: str, death: list[Any] | None) -> int:
    """The program; its exit code."""
    import run_exp

    answers, errors = os.dup(1), os.dup(2)
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if death and death[0] != "seconds":
        arm(*death)
    sys.argv = ["run_exp.py", *arguments]
    try:
        run_exp.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.stdout.flush()
        os.dup2(answers, 1)
        os.dup2(errors, 2)
    raise AssertionError("main returned")


def arm(function: str, n: int, when: str) -> None:
    """Replaces ``function`` by one whose n-th call is the last."""
    owner, name = resolve(function)
    original, calls = getattr(owner, name), itertools.count(1)

    def deadly(*values: Any, **named: Any) -> Any:
        is_last = next(calls) == n
        if is_last and when == "half" and "rmtree" in function:
            delete_half(Path(values[0]))
        elif is_last and when != "before":
            original(*values, **named)
            if when == "half":
                cut(values, named)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*values, **named)

    setattr(owner, name, deadly)


def resolve(function: str) -> tuple[Any, str]:
    """The module or class that holds a function, and its name there."""
    *path, name = function.split(".")
    for depth in range(len(path), 0, -1):
        try:
            owner = importlib.import_module(".".join(path[:depth]))
        except ImportError:
            continue
        for part in path[depth:]:
            owner = getattr(owner, part)
        return owner, name
    raise AssertionError(function)


def cut(values: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Leaves the first half of the file that was written, or of the line that was added to it."""
    paths = [getattr(value, "path", value) for value in (*values, *named.values())]
    file = next(Path(path) for path in paths if isinstance(path, str | os.PathLike) and Path(path).is_file())
    size = file.stat().st_size
    os.truncate(file, size - 20 if file.suffix == ".jsonl" else size // 2)


def delete_half(folder: Path) -> None:
    """What an interrupted deletion leaves at worst: everything but the weights and the optimiser."""
    for file in [path for path in folder.rglob("*") if path.suffix in (".pt", ".safetensors")]:
        file.unlink()


if __name__ == "__main__":
    main()
