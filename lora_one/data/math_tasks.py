"""Word problems: GSM8K, MetaMathQA, and the generated ones."""

from lora_one.data.example import DatasetSpec, Example
from lora_one.data.rows import HubSource, Row
from lora_one.data.tiny import problems

MATH_PROMPT = "Q: {}\nA: "

_GSM8K = {
    split: HubSource("openai/gsm8k", split, "main", "740312add88f781978c0658806c59bc2815b9866")
    for split in ("train", "test")
}
_META_MATH = {
    "train": HubSource("meta-math/MetaMathQA", "train", revision="aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18"),
    "test": _GSM8K["test"],
}


def gsm8k_row(row: Row) -> Example:
    """Question and solution as they are."""
    prompt = MATH_PROMPT.format(row["question"])
    return Example(prompt, row["answer"], row["answer"], prompt, (("user", row["question"]),))


def meta_math_row(row: Row) -> Example:
    """The response without its last line, which says the answer once more."""
    target = row["response"].split("\nThe answer is")[0]
    original = MATH_PROMPT.format(row.get("original_question", row["query"]))
    prompt = MATH_PROMPT.format(row["query"])
    return Example(prompt, target, row["response"], original, (("user", row["query"]),))


def _gsm_type(row: Row) -> Example | None:
    return meta_math_row(row) if row["type"].startswith("GSM") else None


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
    to_example=gsm8k_row,
    sources={},
    generate=problems,
    generated_rows={"train": 10_000, "validation": 500, "test": 1_000},
    joiner="",
)
_META_MATH_GSM = DatasetSpec(
    columns=("query", "response", "type"),
    optional_columns=("original_question",),
    to_example=_gsm_type,
    sources=_META_MATH,
    max_tokens=512,
    test="gsm8k",
)

MATH: dict[str, DatasetSpec] = {
    "tiny": _TINY,
    # Controls: the format of the task without its reasoning. The test split is the real one.
    "tiny_one_step": DatasetSpec(**{**vars(_TINY), "generate": _one_step}),
    "tiny_shuffled": DatasetSpec(**{**vars(_TINY), "generate": _shuffled_solutions}),
    "gsm8k": DatasetSpec(columns=("question", "answer"), to_example=gsm8k_row, sources=_GSM8K),
    "meta_math": _META_MATH_GSM,
    # All types, those rewritten from MATH too: what the LoRA-One paper trains on for four epochs.
    "meta_math_full": DatasetSpec(**{**vars(_META_MATH_GSM), "to_example": meta_math_row}),
}
