"""What the programs' command lines have in common."""

from collections.abc import Sequence
from pathlib import Path

from lora_one.errors import UserError

DEFAULT_ROOT = Path("results")


def folder_and_overrides(words: Sequence[str], has_table: bool) -> tuple[Path, list[str]]:
    """Tells the folder of runs from overrides, which hold a ``=``.

    Args:
        words: The command line without its flags.
        has_table: Whether a paper's table is asked for; overrides go with one only.

    Raises:
        UserError: If there are several folders, or overrides that nothing can use.
    """
    overrides = [word for word in words if "=" in word]
    folders = [Path(word) for word in words if "=" not in word]
    if len(folders) > 1:
        raise UserError(f"{folders[1]}: a second folder beside {folders[0]}; name the one above both")
    if overrides and not has_table:
        raise UserError(f"{overrides[0]}: overrides go with --table, whose experiments they change")
    if folders and not folders[0].is_dir():
        raise UserError(f"{folders[0]}: no such folder; run an experiment, or name the folder of your runs")
    return (folders or [DEFAULT_ROOT])[0], overrides
