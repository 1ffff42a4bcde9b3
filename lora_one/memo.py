"""What one run of a sweep has read, kept for the next run in the same process."""

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Memo:
    """Holds the last thing only, so that it takes no more memory than one run does."""

    def __init__(self) -> None:
        self._key: object = None
        self._value: Any = None

    def get(self, key: object, make: Callable[[], T]) -> T:
        """The last value if it was made for an equal key, else a new one.

        Args:
            key: Everything that the value depends on; None: nothing is kept.
            make: Makes it. The last one is forgotten before.
        """
        if key is None or key != self._key:
            self.forget()
            value = make()
            if key is None:
                return value
            self._key, self._value = key, value
        result: T = self._value
        return result

    def forget(self) -> None:
        """Holds nothing."""
        self._key = self._value = None
