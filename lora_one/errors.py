"""The exceptions that are meant for the person at the keyboard."""

from difflib import get_close_matches


class UserError(ValueError):
    """Bad input. The message is one line that names what, where and the remedy."""


class BusyError(UserError):
    """Another program is making this run; trying again later is all there is to do."""


class DivergedError(UserError):
    """A training whose loss or gradient is no number any more: to a sweep, the worst of settings."""


class PrunedError(Exception):
    """No error: a run that ``model.prune_above`` ended."""


class RunError(RuntimeError):
    """A run that the machine could not carry on, whatever the input; one line too, and its record is kept."""


def nearest(word: str, choices: list[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` for the choice closest to ``word``, or an empty string."""
    close = get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
