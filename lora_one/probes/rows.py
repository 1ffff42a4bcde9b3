"""The figures of one look, by layer, and what they make over all layers."""

from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any

from lora_one.probes.changes import Alignment


class Rows:
    """Collects figures under ``family/name``.

    Attributes:
        totals: Figures of the whole model that belong to no layer.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._figures: dict[str, dict[str, Any]] = {name: {} for name in names}
        self._alignments: dict[str, dict[str, Alignment]] = {}
        self.totals: dict[str, float | None] = {}

    def add(self, name: str, family: str, figures: Mapping[str, Any]) -> None:
        """Figures of one layer."""
        self._figures[name] |= {f"{family}/{key}": value for key, value in figures.items()}

    def align(self, name: str, key: str, part: Alignment) -> None:
        """A cosine of one layer, whose parts are added up over the layers."""
        self._figures[name][key] = part.cosine
        self._alignments.setdefault(key, {})[name] = part

    def is_still(self, key: str) -> bool:
        """Whether the first of the compared vectors is zero in every layer that was compared."""
        parts = self._alignments.get(key, {}).values()
        return bool(parts) and all(part.first_sq == 0 for part in parts)

    def over_layers(self) -> dict[str, float | None]:
        """Cosines of all layers together, and the other numbers' means over the layers that have one."""
        found = {key: self._over_layers(key) for figures in self._figures.values() for key in figures}
        numbers = {key: value for key, value in found.items() if value is not ...}
        return {key: short(value) for key, value in (numbers | self.totals).items()}

    def by_layer(self) -> dict[str, dict[str, Any]]:
        """Every layer's figures, of those that have any."""
        return {
            name: {key: short(value) for key, value in figures.items()}
            for name, figures in self._figures.items()
            if figures
        }

    def _over_layers(self, key: str) -> Any:
        """``...`` where the layers have no numbers but lists."""
        if key in self._alignments:
            return Alignment.of_all(self._alignments[key].values()).cosine
        values = [figures[key] for figures in self._figures.values() if key in figures]
        numbers = [value for value in values if isinstance(value, float)]
        if numbers:
            return mean(numbers)
        return ... if any(isinstance(value, list) for value in values) else None


def short(value: Any) -> Any:
    """Floats with six digits."""
    if isinstance(value, list):
        return [short(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
