"""The table of datasets: for each, its source, its columns, and how a row becomes an example.

A new dataset is an entry in the file of its family and a file of the same name in ``conf/dataset/``.
"""

from lora_one.data.example import DatasetSpec, Example, RowError
from lora_one.data.glue import CLASSIFICATION
from lora_one.data.instructions import ALPACA_PROMPT, INSTRUCTIONS
from lora_one.data.math_tasks import MATH, MATH_PROMPT
from lora_one.data.text_tasks import TEXTS

__all__ = ["ALPACA_PROMPT", "MATH_PROMPT", "SPECS", "DatasetSpec", "Example", "RowError"]

SPECS: dict[str, DatasetSpec] = {**MATH, **INSTRUCTIONS, **CLASSIFICATION, **TEXTS}
