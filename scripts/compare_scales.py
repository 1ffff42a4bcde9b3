"""Whether an adapter's forward and backward scale depends on its rank and on the model's width.

    python scripts/compare_scales.py                    # the embedded model, and random Llamas of four widths
    python scripts/compare_scales.py --model path/to/model --data path/to/texts.txt --ranks 4 8 16 32 64

LoRA-GA's paper calls a start stable where the mean square of the adapter's output, for inputs of mean square
one, does not change with rank and width, and likewise the gradient that it hands back. Printed are, as
geometric means over the adapted layers: that ratio for independent inputs (``‖s·B·A‖²/d``, what the paper's
theorem is about), and on the inputs and gradients that the layers really have, at the start and after some
steps of AdamW.
"""

import argparse
import copy
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_one import LoraConfig, LoraGAConfig, LoraOneConfig, get_peft_model, preprocess_loraga
from lora_one.data.batches import Batch, collate
from lora_one.data.encoding import Encoded
from lora_one.data.tiny import problems
from lora_one.errors import UserError
from lora_one.layers import shape_OI
from lora_one.losses import weighted_loss
from lora_one.models import EMBEDDED_MODEL, linear_layers, model_source
from lora_one.probes.layers import factors, find_layers
from lora_one.probes.passes import look_at_layers
from lora_one.probes.variances import expected_variances, variance_figures
from lora_one.tables import markdown_table

ROWS, LENGTH = 16, 64
WIDTHS = (64, 128, 256, 512)
KEYS = ("forward", "backward")


@dataclass(frozen=True)
class Method:
    """A start by its name in the table, and PEFT's or our settings of it."""

    name: str
    settings: dict[str, Any]


METHODS = [
    Method("LoRA", {}),
    Method(
        "LoRA-GA, stable", {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig(scale="stable")}
    ),
    Method("LoRA-GA, unit", {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig(scale="unit")}),
    Method(
        "LoRA-GA, stable, s = α/r",
        {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig(), "use_rslora": False},
    ),
    Method("LoRA-One, stable", {"init_lora_weights": "lora_one", "lora_one_config": LoraOneConfig()}),
]


def read_batch(source: str, data: str | None) -> Batch:
    """Rows of the texts, or of the generated word problems, all tokens targets.

    Raises:
        UserError: If the text is too short.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    if data is None:
        texts = [f"{row['question']} {row['answer']}" for row in problems("train", 256)]
    else:
        texts = Path(data).read_text(encoding="utf-8").splitlines()
    ids = [index for text in texts for index in tokenizer(text)["input_ids"]][: ROWS * LENGTH]
    if len(ids) < ROWS * LENGTH:
        raise UserError(
            f"--data {data}: holds {len(ids)} tokens, {ROWS * LENGTH} are needed; give a longer text"
        )
    rows = torch.tensor(ids, dtype=torch.int32).view(ROWS, LENGTH).numpy()
    return collate([(Encoded(row, 1), 1 / (ROWS * (LENGTH - 1))) for row in rows], pad_id=0)


def random_llama(width: int, n_words: int) -> LlamaForCausalLM:
    """Two blocks of a width, all shapes in proportion."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=n_words,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    model.config.use_cache = False
    return model.eval()


def start(model: Any, method: Method, rank: int, batch: Batch) -> Any:
    """A copy of the model with its adapters."""
    own = copy.deepcopy(model)
    names = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(own)})
    settings: dict[str, Any] = {"r": rank, "lora_alpha": 16, "use_rslora": True, "target_modules": names}
    config = LoraConfig(**copy.deepcopy(settings | method.settings))
    if method.settings:
        preprocess_loraga(own, config, lambda: weighted_loss(own, batch).backward())
    torch.manual_seed(0)
    return get_peft_model(own, config)


def measure(model: Any, batch: Batch) -> dict[str, float]:
    """Geometric means over the layers: for independent inputs, and on their own."""
    layers, found = find_layers(model, {}), dict[str, list[float]]()

    def look(path: str, x_NI: Tensor, delta_NO: Tensor) -> None:
        own = factors(layers[path].state())
        for key, value in variance_figures(*own, x_NI, delta_NO).items():
            found.setdefault(key, []).append(value or 0.0)
        for key, expected in zip(KEYS, expected_variances(*own), strict=True):
            found.setdefault(f"{key}, independent", []).append(expected)

    look_at_layers(model, list(layers), batch, look)
    return {key: geometric_mean(values) for key, values in found.items()}


def geometric_mean(values: Sequence[float]) -> float:
    """Zero where one of them is."""
    return math.exp(sum(map(math.log, values)) / len(values)) if all(values) else 0.0


def train(model: Any, batch: Batch, n_steps: int, rate: float) -> None:
    """Some steps of AdamW on the batch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    for _ in range(n_steps):
        optimizer.zero_grad()
        weighted_loss(model, batch).backward()
        optimizer.step()


def rows_of(
    name: str, model: Any, ranks: Sequence[int], batch: Batch, steps: int, rate: float
) -> Iterator[list[str]]:
    """A row for every method and rank that the model's layers are large enough for."""
    limit = min(min(shape_OI(layer)) for layer in linear_layers(model).values())
    for method in METHODS:
        for rank in ranks:
            if 2 * rank > limit:
                continue
            started = start(model, method, rank, batch)
            first = measure(started, batch)
            train(started, batch, steps, rate)
            last = measure(started, batch)
            cells = [first[f"{key}, independent"] for key in KEYS]
            cells += [figures[key] for figures in (first, last) for key in KEYS]
            yield [name, method.name, str(rank), *(f"{cell:.3g}" for cell in cells)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="folder of a causal language model")
    parser.add_argument("--data", help="text file; default: generated word problems")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="adapter ranks")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS, help="of random Llamas, at rank 8")
    parser.add_argument("--steps", type=int, default=10, help="of AdamW before the second measurement")
    parser.add_argument("--rate", type=float, default=1e-3, help="its learning rate")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        source = model_source(arguments.model)
        batch = read_batch(source, arguments.data)
    except OSError as error:
        sys.exit(f"error: --data {arguments.data}: {error.strerror}; give a text file")
    except UserError as error:
        sys.exit(f"error: {error}")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    head = ["model", "start", "rank", *(f"{key}, independent" for key in KEYS)]
    head += [f"{key}, {when}" for when in ("at the start", f"after {arguments.steps} steps") for key in KEYS]
    print(markdown_table([head]), flush=True)
    settings = {"batch": batch, "steps": arguments.steps, "rate": arguments.rate}
    tried = [(Path(source).name, model, arguments.ranks)]
    tried += [
        (f"width {width}", random_llama(width, model.config.vocab_size), [8]) for width in arguments.widths
    ]
    for name, own, ranks in tried:
        for row in rows_of(name, own, ranks, **settings):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
