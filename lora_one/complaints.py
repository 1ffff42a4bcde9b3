"""What went wrong, said in one line."""

import os
import sys
import traceback
from pathlib import Path

from lora_one.errors import RunError
from lora_one.files import is_disk_full


def explain(error: Exception, folder: Path) -> str:
    """One line on what went wrong; before it the traceback of what nobody foresaw.

    Args:
        error: What a run or an evaluation ended with, no ``UserError``.
        folder: Where it was writing: a full disk is named, which libraries report in many ways.
    """
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, OSError):
        text = " ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    else:
        traceback.print_exc()
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if is_disk_full(error, folder):
        text += f" (the disk of {folder} is full; make room, the same command goes on)"
    return text


def complain(text: str) -> None:
    """One line on standard error, with the process's number where there are several."""
    rank = int(os.environ.get("RANK", "0"))
    where = f" (process {rank})" if rank else ""
    print(f"error{where}: {text}", file=sys.stderr, flush=True)
