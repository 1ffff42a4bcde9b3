"""The table of datasets: for each, its source, its columns, and how a row becomes an example.

A new dataset is an entry of ``SPECS`` and a file of the same name in ``conf/dataset/``.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lora_one.data.rows import HubSource, Row
from lora_one.data.tiny import problems

MATH_PROMPT = "Q: {}\nA: "
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """A prompt, the text to learn after it, and the row's own answer for graders.

    Examples of one ``group`` never lie in two splits: the prompt itself, or what several prompts are
    rewritings of.
    """

    prompt: str
    target: str
    answer: str
    group: str


@dataclass(frozen=True)
class DatasetSpec:
    """What is particular to one dataset.

    Attributes:
        columns: Columns that every row must have.
        optional_columns: Columns that are read where a row has them.
        to_example: Turns a row into an example, or into None where the papers leave the row out.
        sources: Split name to its source on the Hub. A split that is not here is carved from
            ``train`` (validation), or does not exist (test).
        generate: For generated data: split and number of rows to rows.
        generated_rows: Rows of each split where the config names no size.
        joiner: Put between prompt and target, as the published programs did.
        max_tokens: Training examples with this many tokens or more are left out.
        test: Spec that reads the test split, where that is another dataset.
    """

    columns: tuple[str, ...]
    to_example: Callable[[Row], Example | None]
    sources: dict[str, HubSource]
    generate: Callable[[str, int], list[Row]] | None = None
    generated_rows: dict[str, int] | None = None
    joiner: str = " "
    max_tokens: int | None = None
    test: str | None = None
    optional_columns: tuple[str, ...] = ()


def _gsm8k_row(row: Row) -> Example:
    prompt = MATH_PROMPT.format(row["question"])
    return Example(prompt, row["answer"], row["answer"], group=prompt)


def _meta_math_row(row: Row) -> Example | None:
    if not row["type"].startswith("GSM"):
        return None
    target = row["response"].split("\nThe answer is")[0]
    original = MATH_PROMPT.format(row.get("original_question", row["query"]))
    return Example(MATH_PROMPT.format(row["query"]), target, row["response"], group=original)


def _commonsense_row(row: Row) -> Example:
    instruction = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    prompt = ALPACA_PROMPT.format(instruction)
    return Example(prompt, row["output"], row["answer"], group=prompt)


def _shuffled_solutions(split: str, n: int) -> list[Row]:
    rows = problems(split, n)
    # A rotation by half the rows gives every problem the solution of another one.
    answers = [row["answer"] for row in rows[n // 2 :] + rows[: n // 2]]
    if split == "test":
        return rows
    return [{**row, "answer": answer} for row, answer in zip(rows, answers, strict=True)]


def _one_step(split: str, n: int) -> list[Row]:
    return problems(split, n, steps="multi" if split == "test" else "one")


_TINY = DatasetSpec(
    columns=("question", "answer"),
    to_example=_gsm8k_row,
    sources={},
    generate=problems,
    generated_rows={"train": 10_000, "validation": 500, "test": 1_000},
    joiner="",
)

SPECS: dict[str, DatasetSpec] = {
    "tiny": _TINY,
    # Controls: the format of the task without its reasoning. The test split is the real one.
    "tiny_one_step": DatasetSpec(**{**vars(_TINY), "generate": _one_step}),
    "tiny_shuffled": DatasetSpec(**{**vars(_TINY), "generate": _shuffled_solutions}),
    "gsm8k": DatasetSpec(
        columns=("question", "answer"),
        to_example=_gsm8k_row,
        sources={
            "train": HubSource("openai/gsm8k", "train", "main"),
            "test": HubSource("openai/gsm8k", "test", "main"),
        },
    ),
    "meta_math": DatasetSpec(
        columns=("query", "response", "type"),
        optional_columns=("original_question",),
        to_example=_meta_math_row,
        sources={
            "train": HubSource("meta-math/MetaMathQA", "train"),
            "test": HubSource("openai/gsm8k", "test", "main"),
        },
        max_tokens=512,
        test="gsm8k",
    ),
    "commonsense_reasoning": DatasetSpec(
        columns=("instruction", "input", "output", "answer"),
        to_example=_commonsense_row,
        sources={"train": HubSource("zwhe99/commonsense_170k", "train")},
    ),
}
