"""GSM8K and datasets of its form: the number after ``####``."""

import time
from collections.abc import Sequence

from eval.generation import Decoding, generate
from eval.graders import gsm8k_answer
from eval.results import EvalResult, share
from eval.subject import Request, Subject
from lora_one.data.loading import held_out_examples
from lora_one.data.specs import Example
from lora_one.errors import UserError


def gsm8k(subject: Subject, request: Request, decoding: Decoding = Decoding()) -> EvalResult:  # noqa: B008 frozen
    """Exact match on GSM8K's 1,319 test problems, with the prompt that the papers train on."""
    return grade_numbers(subject, held_out_examples("gsm8k", request.data, request.limit), request, decoding)


def grade_numbers(
    subject: Subject,
    examples: Sequence[Example],
    request: Request,
    decoding: Decoding = Decoding(),  # noqa: B008 frozen
) -> EvalResult:
    """Exact match of the number after ``####`` in the answers to ``examples``.

    Raises:
        UserError: If a reference answer has no number.
    """
    start = time.perf_counter()
    chosen = list(examples[: request.limit])
    references = [gsm8k_answer(example.answer) for example in chosen]
    for example, reference in zip(chosen, references, strict=True):
        if reference is None:
            raise UserError(f"test split: no number after '####' in the answer to {example.prompt[:60]!r}")
    texts = generate(subject, [example.prompt for example in chosen], decoding, request)
    found = [gsm8k_answer(text) for text in texts]
    right = [answer == reference for answer, reference in zip(found, references, strict=True)]
    samples = tuple(
        {"prompt": example.prompt, "generated": text, "reference": str(reference), "right": ok}
        for example, text, reference, ok in zip(chosen, texts, references, right, strict=True)
    )
    return EvalResult(
        task="gsm8k",
        metric="exact_match",
        figure=share(right),
        decoding=str(decoding),
        seconds=time.perf_counter() - start,
        samples=samples,
        counts={"without an answer": sum(answer is None for answer in found)},
    )
