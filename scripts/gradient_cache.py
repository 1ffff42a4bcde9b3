"""Lists the gradient estimates that runs have kept, and removes those that nobody needs.

    python scripts/gradient_cache.py results/gradients
    python scripts/gradient_cache.py results/gradients --prune --unused-days 30 --max-gb 20
    python scripts/gradient_cache.py results/gradients --prune --all

Pruning removes damaged files and what killed programs left, then entries that were not used for so many
days, then the least recently used until the rest fits. What a running program is computing stays.
"""

import argparse
import fcntl
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_one.errors import UserError
from lora_one.gradient_cache import DamagedEntryError, read_entry

HEADER = ["entry", "made", "last used", "model", "dataset", "estimator", "triplets", "targets", "examples"]
HEADER += ["took s", "MB"]
DAY = 86400.0


@dataclass(frozen=True)
class Kept:
    """A file of the cache; ``about`` is None where it is damaged."""

    path: Path
    size: int
    used: float
    about: dict[str, Any] | None
    trouble: str = ""


def entries(folder: Path) -> list[Kept]:
    """All entries, the least recently used first."""
    found = []
    for path in folder.glob("*.safetensors"):
        stat = path.stat()
        try:
            entry, estimate = read_entry(path)
            about = entry.about | {"n_examples": estimate.n_examples, "seconds": estimate.seconds}
            found.append(Kept(path, stat.st_size, stat.st_mtime, about))
        except DamagedEntryError as error:
            found.append(Kept(path, stat.st_size, stat.st_mtime, None, str(error)))
    return sorted(found, key=lambda kept: kept.used)


def to_prune(found: Sequence[Kept], arguments: argparse.Namespace) -> list[tuple[Kept, str]]:
    """What goes, and why."""
    going = [(kept, "damaged") for kept in found if kept.about is None]
    whole = [kept for kept in found if kept.about is not None]
    if arguments.all:
        return going + [(kept, "all") for kept in whole]
    if arguments.unused_days is not None:
        limit = time.time() - arguments.unused_days * DAY
        going += [(kept, "unused") for kept in whole if kept.used < limit]
        whole = [kept for kept in whole if kept.used >= limit]
    if arguments.max_gb is not None:
        total = sum(kept.size for kept in whole)
        for kept in whole:
            if total <= arguments.max_gb * 1e9:
                break
            going.append((kept, "over the limit"))
            total -= kept.size
    return going


def prune(folder: Path, arguments: argparse.Namespace) -> None:
    """Removes entries, and what killed programs have left."""
    for kept, reason in to_prune(entries(folder), arguments):
        with unused(kept.path.with_suffix(".lock")) as is_free:
            if is_free:
                kept.path.unlink(missing_ok=True)
        print(f"{'removed' if is_free else 'in use, left'}: {kept.path} ({reason})")
    for path in (*folder.glob("*.partial"), *folder.glob("*.lock")):
        entry = folder / f"{path.name.split('.')[0]}.safetensors"
        with unused(entry.with_suffix(".lock")) as is_free:
            if is_free and (path.suffix == ".partial" or not entry.exists()):
                path.unlink(missing_ok=True)


@contextmanager
def unused(lock: Path) -> Iterator[bool]:
    """Whether no program holds the lock; holds it meanwhile."""
    if not lock.exists():
        yield True
        return
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def table(found: Sequence[Kept]) -> str:
    """One line an entry, the most recently used last, and the sum."""
    rows = [HEADER, *(row(kept) for kept in found)]
    widths = [max(len(line[column]) for line in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in rows]
    total = sum(kept.size for kept in found)
    return "\n".join([*(line.rstrip() for line in lines), f"{len(found)} entries, {total / 1e6:,.1f} MB"])


def row(kept: Kept) -> list[str]:
    """The cells of one entry."""
    used, size = time.strftime("%Y-%m-%d %H:%M", time.localtime(kept.used)), f"{kept.size / 1e6:,.1f}"
    if kept.about is None:
        return [kept.path.stem, f"damaged: {kept.trouble}", used, *[""] * (len(HEADER) - 4), size]
    about = kept.about
    names = ("model", "dataset", "estimator", "n_triplets", "n_targets", "n_examples")
    made = about["made"][:16].replace("T", " ")
    return [
        kept.path.stem,
        made,
        used,
        *(str(about[name]) for name in names),
        f"{about['seconds']:.1f}",
        size,
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("results/gradients"), help="cache_dir")
    parser.add_argument("--prune", action="store_true", help="remove entries, as the other options say")
    parser.add_argument("--unused-days", type=float, help="with --prune: entries not used for so many days")
    parser.add_argument("--max-gb", type=float, help="with --prune: the oldest, until the rest is no larger")
    parser.add_argument("--all", action="store_true", help="with --prune: every entry")
    arguments = parser.parse_args()
    try:
        if not arguments.folder.is_dir():
            raise UserError(f"{arguments.folder}: no such folder; give the cache_dir of your runs")
        asks = arguments.all or arguments.unused_days is not None or arguments.max_gb is not None
        if asks and not arguments.prune:
            raise UserError("--all, --unused-days, --max-gb: they go with --prune, which removes entries")
        if arguments.prune:
            prune(arguments.folder, arguments)
        print(table(entries(arguments.folder)))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()
