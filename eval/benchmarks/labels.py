"""Classification by label words, as on GLUE: the highest logit among the first tokens of all labels."""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from math import sqrt

import torch
from torch import Tensor

from eval.engine.generation import Decoding
from eval.engine.scoring import choose
from eval.results import EvalResult, Figure, share
from eval.subject import Request, Subject
from lora_one.data.chat import Rendered
from lora_one.data.specs import Example
from lora_one.errors import UserError

# What the benchmark's own leaderboard also reports, by the word of the positive class.
_ALSO_F1 = ("equivalent", "duplicate")
_ALSO_MATTHEWS = ("acceptable",)


def label_words(examples: Iterable[Example]) -> tuple[str, ...]:
    """The words to choose from: every answer there is, sorted."""
    return tuple(sorted({example.answer for example in examples}))


def check_labels(examples: Sequence[Example]) -> None:
    """Raises UserError where there is nothing to choose from."""
    labels = label_words(examples)
    if len(labels) < 2:
        raise UserError(
            f"test split: every row has the label {', '.join(labels)!r}; a classification has at least two"
        )


def grade_labels(
    subject: Subject,
    examples: Sequence[Example],
    request: Request,
    decoding: Decoding = Decoding(),  # noqa: B008 frozen
) -> EvalResult:
    """Accuracy of the label whose first token is the likeliest after the prompt.

    With CoLA's labels Matthews correlation, with MRPC's and QQP's F1 of the positive class beside it.

    Args:
        subject: The model and who shares the work.
        examples: The whole test split; its targets are the labels where the request names none.
        request: Its limit, labels and joiner.
        decoding: Nothing is generated; graders have it in common.

    Raises:
        UserError: If there are fewer than two labels, or two start with the same token.
    """
    start = time.perf_counter()
    labels = request.labels or label_words(examples)
    if len(labels) < 2:
        check_labels(examples)
    chosen = list(examples[: request.limit])
    prompts = [_before_label(example) for example in chosen]
    scores = choose(subject, prompts, [request.joiner + label for label in labels], request)
    found = scores.chosen
    references = [labels.index(example.answer) for example in chosen]
    samples = tuple(
        {
            "prompt": example.prompt,
            "chosen": labels[answer],
            "reference": example.answer,
            "right": answer == reference,
            "logits": dict(zip(labels, logits, strict=True)),
        }
        for example, answer, reference, logits in zip(
            chosen, found, references, scores.logits.tolist(), strict=True
        )
    )
    return EvalResult(
        task="label",
        metric="accuracy",
        figure=share([answer == reference for answer, reference in zip(found, references, strict=True)]),
        decoding=f"argmax over the first tokens of {', '.join(labels)}",
        seconds=time.perf_counter() - start,
        samples=samples,
        others=further_figures(references, found, labels),
        counts={"prompts cut": scores.n_cut},
    )


def _before_label(example: Example) -> str:
    """The prompt, and what a chat template writes before every answer, such as an empty thought."""
    if not isinstance(example.prompt, Rendered):
        return example.prompt
    return Rendered(example.prompt + example.target.partition(example.answer)[0])


def further_figures(
    references: Sequence[int], found: Sequence[int], labels: Sequence[str]
) -> dict[str, Figure]:
    """What is reported beside the accuracy on a benchmark with these labels."""
    table = torch.zeros(len(labels), len(labels), dtype=torch.float64)
    for reference, answer in zip(references, found, strict=True):
        table[reference, answer] += 1
    figures: dict[str, Figure] = {}
    for index, label in enumerate(labels):
        if label in _ALSO_F1:
            figures["f1"] = jackknife(table, functools.partial(f1, positive=index))
        if label in _ALSO_MATTHEWS:
            figures["matthews_correlation"] = jackknife(table, matthews)
    return figures


def f1(table: Tensor, positive: int) -> float:
    """F1 of one class; 0 where it is neither there nor found.

    Args:
        table: Counts, reference × found.
        positive: The class.
    """
    total = (table[positive].sum() + table[:, positive].sum()).item()
    return 2 * table[positive, positive].item() / total if total else 0.0


def matthews(table: Tensor) -> float:
    """Matthews correlation of ``table``'s references and answers, for any number of classes.

    Zero where all references or all answers are the same. Gorodkin 2004.
    """
    n, there, found = table.sum(), table.sum(1), table.sum(0)
    covariance = n * table.trace() - there @ found
    spread = (n * n - there @ there) * (n * n - found @ found)
    return (covariance / spread.sqrt()).item() if spread > 0 else 0.0


def jackknife(table: Tensor, statistic: Callable[[Tensor], float]) -> Figure:
    """``statistic`` of a table of counts, with the error that leaving out one item at a time gives."""
    n = int(table.sum())
    if n < 2:
        return Figure(statistic(table) if n else 0.0, 0.0, n)
    without: list[tuple[float, float]] = []
    for row, column in table.nonzero().tolist():  # items of one cell are alike
        fewer = table.clone()
        fewer[row, column] -= 1
        without.append((table[row, column].item(), statistic(fewer)))
    mean = sum(count * value for count, value in without) / n
    variance = (n - 1) / n * sum(count * (value - mean) ** 2 for count, value in without)
    return Figure(statistic(table), sqrt(variance), n)
