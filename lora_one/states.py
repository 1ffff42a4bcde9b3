"""The state of a run, as seen from outside."""

import fcntl
import socket
import time
from pathlib import Path
from typing import Any

STATES = ("running", "dead", "failed", "unfinished", "pruned", "finished", "damaged")


def state_of(record: dict[str, Any], folder: Path, quiet_seconds: float) -> str:
    """The record's status, or ``dead`` where it says running and nobody is at work."""
    if record["status"] != "running":
        return str(record["status"])
    if is_locked(folder / "run.lock"):
        return "running"
    is_here = record.get("hardware", {}).get("host") == socket.gethostname()
    return "dead" if is_here or quiet_for(folder) > quiet_seconds else "running"


def is_locked(path: Path) -> bool:
    """Whether a live program holds the lock, as far as this machine can see."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def quiet_for(folder: Path) -> float:
    """Seconds since anything was written to the folder's record, metrics or answers."""
    files = [folder / "record.json", folder / "metrics.jsonl", *folder.glob("answers/*/*")]
    return time.time() - max((path.stat().st_mtime for path in files if path.exists()), default=0.0)
