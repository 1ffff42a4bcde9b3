"""Progress bars: lively on a terminal, a line now and then in a log file."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(rows: Iterable[Any] | None = None, *, shown: bool, **settings: Any) -> tqdm:
    """A tqdm bar on standard error.

    Args:
        rows: What to iterate over, or None for a bar that is moved by hand.
        shown: False on processes that must stay silent.
        settings: Further arguments of tqdm.
    """
    seconds = 0.1 if sys.stderr.isatty() else 15.0
    return tqdm(rows, disable=not shown, mininterval=seconds, maxinterval=seconds, **settings)
