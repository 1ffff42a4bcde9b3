"""Digests of files, computed once."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_one.files import write_text


def file_digest(path: Path, store: Path | None = None) -> str:
    """SHA-256 of a file, in hexadecimal.

    Args:
        path: The file.
        store: A folder that keeps digests, found again by path, inode, size and times of the last change.
    """
    where = path.resolve()
    stat = where.stat()
    known: dict[str, Any] = {"path": str(where), "size": stat.st_size, "inode": stat.st_ino}
    known |= {"written_ns": stat.st_mtime_ns, "changed_ns": stat.st_ctime_ns}
    kept = store / f"{hashlib.sha256(str(where).encode()).hexdigest()[:24]}.json" if store else None
    if kept is not None:
        stored = _read(kept)
        if {key: stored.get(key) for key in known} == known and isinstance(stored.get("sha256"), str):
            return stored["sha256"]
    with where.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if kept is not None:
        with suppress(OSError):  # it only saves time
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps(known | {"sha256": digest}))
    return digest


def weights_fingerprint(folder: Path, store: Path | None = None) -> str:
    """Digest of a local model's weight files; ``store`` as in ``file_digest``."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(bytes.fromhex(file_digest(path, store)))
    return digest.hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    """A kept digest; nothing where there is none, or none that can be read."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}
