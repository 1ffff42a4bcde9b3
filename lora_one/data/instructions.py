"""Instructions and their answers: Alpaca's kind, code, FLAN, and the commonsense mixture.

Which rows are left out, and what is cut off, is what the published programs of LoRA-GA and LoRA-One do.
"""

import re

from lora_one.data.example import DatasetSpec, Example
from lora_one.data.rows import HubSource, Row

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
# As the published programs have it: without the sentence that opens the other one.
ALPACA_INPUT_PROMPT = "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"

_FENCE = "```"
_REFUSAL = re.compile("sorry|as an ai", re.IGNORECASE)


def instruction_example(instruction: str, target: str, given: str = "") -> Example:
    """An instruction, with an input where there is one, in Alpaca's templates."""
    if given:
        prompt = ALPACA_INPUT_PROMPT.format(instruction, given)
        asked = f"{instruction}\n\n{given}"
    else:
        prompt, asked = ALPACA_PROMPT.format(instruction), instruction
    return Example(prompt, target, target, prompt, (("user", asked),))


def _alpaca_row(row: Row) -> Example:
    return instruction_example(row["instruction"], row["output"], row.get("input", ""))


def _wizard_row(row: Row) -> Example | None:
    """Rows that refuse are left out."""
    return None if _REFUSAL.search(row["output"]) else instruction_example(row["instruction"], row["output"])


def _code_row(row: Row) -> Example | None:
    """The answer up to the end of its first code block; an answer without a block is left out."""
    parts = row["answer"].split(_FENCE, 2)
    if len(parts) < 2:
        return None
    return instruction_example(row["query"], _FENCE.join(parts[:2]) + _FENCE)


def _flan_row(row: Row) -> Example:
    return instruction_example(row["inputs"], row["targets"])


def _flan_v2_row(row: Row) -> Example:
    """Its inputs are prompts already."""
    return Example(row["inputs"], row["targets"], row["targets"], row["inputs"])


def _commonsense_row(row: Row) -> Example:
    instruction = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    prompt = ALPACA_PROMPT.format(instruction)
    return Example(prompt, row["output"], row["answer"], prompt, (("user", instruction),))


def _alpaca(source: HubSource) -> DatasetSpec:
    return DatasetSpec(
        columns=("instruction", "output"),
        optional_columns=("input",),
        to_example=_alpaca_row,
        sources={"train": source},
    )


INSTRUCTIONS: dict[str, DatasetSpec] = {
    "alpaca": _alpaca(
        HubSource("yahma/alpaca-cleaned", "train", revision="12567cabf869d7c92e573c7c783905fc160e9639")
    ),
    "alpaca_gpt4": _alpaca(
        HubSource("vicgalle/alpaca-gpt4", "train", revision="48bb1405118c738817748474e889f72c0dd77ffb")
    ),
    "wizard_lm": DatasetSpec(
        columns=("instruction", "output"),
        to_example=_wizard_row,
        sources={"train": HubSource("silk-road/Wizard-LM-Chinese-instruct-evol", "train")},
        max_tokens=1024,
    ),
    "codefeedback": DatasetSpec(
        columns=("query", "answer"),
        to_example=_code_row,
        sources={
            "train": HubSource(
                "m-a-p/CodeFeedback-Filtered-Instruction",
                "train",
                revision="e24e63942ad4450639e16ba318130ab841946916",
            )
        },
        max_tokens=1024,
    ),
    "flan": DatasetSpec(
        columns=("inputs", "targets"),
        to_example=_flan_row,
        sources={
            "train": HubSource(
                "Muennighoff/flan", "train", revision="049702ca5ffc5b3c62bf226aac67ba1493e8d548"
            )
        },
        streamed=True,
    ),
    "flan_v2": DatasetSpec(
        columns=("inputs", "targets"),
        to_example=_flan_v2_row,
        sources={
            "train": HubSource(
                "SirNeural/flan_v2",
                "train",
                revision="efaf67c09d87488a0483747396d3486ce5a51620",
                data_files="*_train.jsonl.gz",  # the others are pieces of one file
            )
        },
        max_tokens=512,
        streamed=True,
    ),
    "commonsense_reasoning": DatasetSpec(
        columns=("instruction", "input", "output", "answer"),
        to_example=_commonsense_row,
        sources={"train": HubSource("zwhe99/commonsense_170k", "train")},
    ),
}
