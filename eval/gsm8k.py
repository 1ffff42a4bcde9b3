"""Exact match of the final number, for GSM8K and for datasets of its form."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from transformers import PreTrainedTokenizerBase

from eval.generation import generate
from eval.graders import gsm8k_answer
from lora_one.config import EvalConfig
from lora_one.data.specs import Example
from lora_one.errors import UserError
from lora_one.processes import Processes


@dataclass(frozen=True)
class EvalResult:
    """A share of ``n`` problems.

    Attributes:
        value: Share answered rightly.
        standard_error: Of ``value``, binomial.
        n_without_answer: Problems for which no answer was found; they count as wrong.
    """

    task: str
    metric: str
    value: float
    standard_error: float
    n: int
    n_without_answer: int
    seconds: float
    samples: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        share, error = f"{self.value:.1%}", f"{self.standard_error:.1%}"
        return f"{self.metric} {share} ± {error} (n = {self.n}, {self.n_without_answer} without an answer)"

    def summary(self) -> dict[str, Any]:
        """What the record keeps."""
        figures = {name: value for name, value in vars(self).items() if name != "samples"}
        return figures | {"seconds": round(self.seconds, 3)}

    def samples_jsonl(self) -> str:
        """Every problem with what was generated, one JSON object a line."""
        return "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in self.samples)


def evaluate_gsm8k(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: EvalConfig,
    processes: Processes,
    description: str,
) -> EvalResult:
    """Greedy exact match of the number after ``####``.

    Raises:
        UserError: If a reference answer has no number.
    """
    start = time.perf_counter()
    chosen = list(examples[: config.limit])
    references = [gsm8k_answer(example.answer) for example in chosen]
    for example, reference in zip(chosen, references, strict=True):
        if reference is None:
            raise UserError(f"test split: no number after '####' in the answer to {example.prompt[:60]!r}")
    texts = generate(
        model,
        tokenizer,
        [example.prompt for example in chosen],
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        processes=processes,
        description=description,
    )
    found = [gsm8k_answer(text) for text in texts]
    right = [answer == reference for answer, reference in zip(found, references, strict=True)]
    share = sum(right) / len(right)
    samples = tuple(
        {"prompt": example.prompt, "generated": text, "reference": str(reference), "right": ok}
        for example, text, reference, ok in zip(chosen, texts, references, right, strict=True)
    )
    return EvalResult(
        task="gsm8k",
        metric="exact_match",
        value=share,
        standard_error=sqrt(share * (1 - share) / len(right)),
        n=len(right),
        n_without_answer=sum(answer is None for answer in found),
        seconds=time.perf_counter() - start,
        samples=samples,
    )
