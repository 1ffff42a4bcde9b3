"""Checkpoints that appear whole, and of which a whole one is always left.

The Trainer writes one file after another, on several processes at once, and deletes an old checkpoint file by
file. So it writes into a folder beside the checkpoints; what is complete there is renamed, and what is old is
renamed before it is deleted.
"""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lora_one.errors import RunError, UserError
from lora_one.files import is_disk_full, to_disk
from lora_one.processes import Processes

_CONTENTS = "contents.json"  # names and sizes of all other files


def partial_folder(checkpoints: Path) -> Path:
    """Where checkpoints are while they are written or deleted."""
    return checkpoints / "partial"


@contextmanager
def whole_checkpoint(
    checkpoints: Path, step: int, processes: Processes, *, keep: int | None = None
) -> Iterator[None]:
    """Publishes what was written as ``partial/checkpoint-<step>`` within it; then the older ones go.

    But the one of step ``keep`` stays.

    Raises:
        RunError: If it could not be written; the last one is left as it was.
    """
    partial = partial_folder(checkpoints)
    if processes.is_main:
        shutil.rmtree(partial, ignore_errors=True)  # of a start that was killed
    processes.wait()
    try:
        yield
        processes.wait()
        if processes.is_main:
            _publish(checkpoints, f"checkpoint-{step}", f"checkpoint-{keep}")
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _why_not_written(error, checkpoints)  # before there is room again
        if processes.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        if reason is None:
            raise
        raise RunError(
            f"the checkpoint of step {step} could not be written: {reason}; the last complete one is "
            f"{name_last(checkpoints.parent)}; the same command goes on from there"
        ) from error
    processes.wait()


def last_checkpoint(folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest complete checkpoint of a run; ``say`` learns of a damaged newer one.

    Raises:
        UserError: If there are only damaged ones.
    """
    states = (folder / "checkpoints").glob("checkpoint-*/trainer_state.json")
    found = sorted((path.parent for path in states if _is_json(path)), key=step_of, reverse=True)
    damaged: list[Path] = []
    for checkpoint in found:
        broken = broken_file(checkpoint)
        if broken is None:
            for file in damaged:
                say(f"note: {file}: damaged; going on from the older {checkpoint.name}")
            return checkpoint
        damaged.append(broken)
    if damaged:
        raise UserError(f"{damaged[0]}: damaged; remove the folder {damaged[0].parent} and start again")
    return None


def name_last(folder: Path) -> str:
    """The folder of the last complete checkpoint of a run, for people."""
    try:
        return str(last_checkpoint(folder, lambda note: None) or "none yet")
    except UserError as error:
        return str(error)


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which it was written."""
    return int(checkpoint.name.split("-")[1])


def _publish(checkpoints: Path, name: str, kept: str) -> None:
    partial = partial_folder(checkpoints)
    written = partial / name
    files = sorted(file for file in written.rglob("*") if file.is_file())
    sizes = {str(file.relative_to(written)): file.stat().st_size for file in files}
    (written / _CONTENTS).write_text(json.dumps(sizes), encoding="utf-8")
    for path in (*files, written / _CONTENTS, written):
        to_disk(path)
    older = [folder for folder in checkpoints.glob("checkpoint-*") if folder.name != kept or kept == name]
    damaged = checkpoints / name  # else it would have been resumed
    if damaged.exists():
        older.remove(damaged)
        damaged.rename(partial / f"damaged-{name}")
    written.rename(checkpoints / name)
    to_disk(checkpoints)
    for checkpoint in older:
        checkpoint.rename(partial / f"old-{checkpoint.name}")
    shutil.rmtree(partial, ignore_errors=True)


def _why_not_written(error: Exception, checkpoints: Path) -> str | None:
    """One line for what a disk does; None for what is no matter of disks."""
    if is_disk_full(error, checkpoints):
        return f"no space is left on the disk of {checkpoints}, make room"
    # Torch's own writer tells the place in its source, and not what the system said.
    is_writer = isinstance(error, OSError | SafetensorError) or "PytorchStreamWriter" in str(error)
    return " ".join(str(error).split()) if is_writer else None


def broken_file(checkpoint: Path) -> Path | None:
    """A file of a checkpoint that is not as it was written; None where all are."""
    contents = checkpoint / _CONTENTS
    if not contents.exists():  # of an older version
        return next((file for file in sorted(checkpoint.iterdir()) if not _is_readable(file)), None)
    if not _is_json(contents):
        return contents
    for name, size in json.loads(contents.read_text(encoding="utf-8")).items():
        file = checkpoint / name
        if not file.exists() or file.stat().st_size != size or not _is_readable(file):
            return file
    return None


def _is_readable(file: Path) -> bool:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return True
        except (SafetensorError, OSError):
            return False
    if file.suffix in {".pt", ".pth"}:
        return zipfile.is_zipfile(file)
    return True


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    return True
