"""What an evaluation says: a figure with its error, how the answers were made, and every answer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A mean over ``n`` items.

    Attributes:
        value: The mean; of rights and wrongs, the share of rights.
        standard_error: Of ``value``.
        is_share: Whether it is shown as a percentage; a rating or a perplexity is not.
    """

    value: float
    standard_error: float
    n: int
    is_share: bool = True

    def __str__(self) -> str:
        return f"{self.shown(1)} (n = {self.n:,})"

    def shown(self, digits: int = 2) -> str:
        """The mean and its error as text."""
        form = f".{digits}%" if self.is_share else ".2f"
        return f"{self.value:{form}} ± {self.standard_error:{form}}"


def share(right: Sequence[bool]) -> Figure:
    """The share of rights, with its binomial error; 0 ± 0 of nothing."""
    n = len(right)
    value = sum(right) / n if n else 0.0
    return Figure(value, sqrt(value * (1 - value) / n) if n else 0.0, n)


@dataclass(frozen=True)
class EvalResult:
    """The result of one benchmark.

    Attributes:
        task: The benchmark.
        metric: What ``figure`` is.
        figure: The headline.
        others: Further figures by name: other graders, other k, subjects, categories.
        decoding: How the answers were made: ``greedy``, ``argmax of the label's first token``, …
        counts: What happened to how many: ``without an answer``, ``prompts cut``, …
        samples: Every item with what came of it; each can be written as JSON.
    """

    task: str
    metric: str
    figure: Figure
    decoding: str
    seconds: float
    samples: tuple[dict[str, Any], ...]
    others: Mapping[str, Figure] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        counted = "".join(f", {count:,} {what}" for what, count in self.counts.items() if count)
        return f"{self.metric} {self.figure}{counted}"

    def summary(self) -> dict[str, Any]:
        """What a record keeps."""
        return {
            "task": self.task,
            "metric": self.metric,
            **vars(self.figure),
            "decoding": self.decoding,
            "seconds": round(self.seconds, 3),
            "others": {name: dict(vars(figure)) for name, figure in self.others.items()},
            "counts": dict(self.counts),
        }

    def samples_jsonl(self) -> str:
        """Every item, one JSON object a line."""
        return "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in self.samples)
