"""How far a LoRA-GA start moves the model that it should leave as it is: here, and with PEFT's ``lora_ga``.

    python scripts/compare_drift.py                     # the embedded model
    python scripts/compare_drift.py --model path/to/model --data path/to/texts.txt

Same model, same batches, same rank, with weights stored in float32, bfloat16 and 4-bit. The drift is
``‖logits after - logits before‖ / ‖logits before‖``: with the arithmetic in float32, so that only what
is stored counts, and as the model runs. Beside it stands what storing the weights in that precision
costs by itself, and the size of the product that training starts from.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraGAConfig as PeftLoraGAConfig
from peft.tuners.lora import preprocess_loraga as peft_preprocess_loraga
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_one import LoraConfig, LoraGAConfig, get_peft_model, preprocess_loraga
from lora_one.adapters import lora_layers
from lora_one.data.tiny import problems
from lora_one.errors import UserError
from lora_one.layers import settle
from lora_one.models import EMBEDDED_MODEL, linear_layers, model_source

PRECISIONS = ("float32", "bfloat16", "4bit")
BATCHES, BATCH_SIZE, LENGTH = 8, 2, 64


def load(source: str, precision: str) -> Any:
    """The model in one of ``PRECISIONS``."""
    if precision != "4bit":
        return AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, precision)).eval()
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=nf4, dtype=torch.float32).eval()
    settle(model)
    return model


def read_batches(source: str, data: str | None) -> list[Tensor]:
    """Token ids (batch, length) of the texts, or of the generated word problems."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    if data is None:
        texts = [f"{row['question']} {row['answer']}" for row in problems("train", 256)]
    else:
        texts = Path(data).read_text(encoding="utf-8").splitlines()
    ids = [index for text in texts for index in tokenizer(text)["input_ids"]]
    n_tokens = BATCHES * BATCH_SIZE * LENGTH
    if len(ids) < n_tokens:
        raise UserError(f"--data {data}: holds {len(ids)} tokens, {n_tokens} are needed; give a longer text")
    return list(torch.tensor(ids[:n_tokens]).view(BATCHES, BATCH_SIZE, LENGTH))


def backward(model: Any, batches: list[Tensor]) -> None:
    """The step both libraries are given."""
    for ids_BT in batches:
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()


@torch.no_grad()
def logits(model: Any, batches: list[Tensor]) -> Tensor:
    """Float32 logits on the first batches, in eval mode."""
    model.eval()
    return torch.cat([model(input_ids=ids_BT).logits.float() for ids_BT in batches[:2]])


def start_here(model: Any, batches: list[Tensor], settings: dict[str, Any], shift: str = "auto") -> Any:
    """LoRA-GA by this library."""
    config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(shift=shift), **settings)  # type: ignore[arg-type]
    preprocess_loraga(model, config, lambda: backward(model, batches))
    return get_peft_model(model, config)


def start_by_peft(model: Any, batches: list[Tensor], settings: dict[str, Any]) -> Any:
    """PEFT's ``lora_ga``."""
    init: Any = "lora_ga"
    config = peft.LoraConfig(init_lora_weights=init, lora_ga_config=PeftLoraGAConfig(), **settings)
    peft_preprocess_loraga(model, config, lambda: backward(model, batches))
    return peft.get_peft_model(model, config)


def product_norm(model: Any) -> float:
    """Mean of ‖s · B A‖_F over the adapted layers."""
    norms = []
    for layer in lora_layers(model).values():
        A_RI, B_OR = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
        norms.append(layer.scaling["default"] * torch.linalg.norm(B_OR @ A_RI).item())
    return sum(norms) / len(norms)


def measure(
    source: str, precision: str, start: Callable[[Any, list[Tensor]], Any], batches: list[Tensor]
) -> tuple[str, str, str]:
    """The drifts and the product norm of one start, or why there is none."""
    model = load(source, precision)
    before = logits(model, batches)
    settle(model)
    try:
        started = start(model, batches)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"refused: {str(error).splitlines()[0]}", "", ""
    as_run = exact = relative(logits(started, batches), before)
    if precision == "bfloat16":
        exact = relative(logits(started.float(), batches), logits(load(source, precision).float(), batches))
    return f"{exact:.1e}", f"{as_run:.1e}", f"{product_norm(started):.3g}"


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖."""
    return (torch.linalg.norm(actual - expected) / torch.linalg.norm(expected)).item()


def rounding(source: str, precision: str, batches: list[Tensor]) -> str:
    """What storing the model in this precision costs by itself, against float32."""
    exact = logits(load(source, "float32"), batches)
    stored = load(source, precision).float() if precision != "4bit" else load(source, precision)
    return f"{relative(logits(stored, batches), exact):.1e}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="folder of a causal language model")
    parser.add_argument("--data", help="text file for the gradient batches; default: generated problems")
    parser.add_argument("--r", type=int, default=8, help="adapter rank")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    torch.manual_seed(0)
    try:
        source = model_source(arguments.model)
        batches = read_batches(source, arguments.data)
    except OSError as error:
        sys.exit(f"error: --data {arguments.data}: {error.strerror}; give a text file")
    except UserError as error:
        sys.exit(f"error: {error}")
    names = {name.rsplit(".", 1)[-1] for name in linear_layers(load(source, "float32"))}
    settings = {"r": arguments.r, "lora_alpha": 16, "use_rslora": True, "target_modules": sorted(names)}
    print(
        "| stored in | rounding alone | start | drift in float32 | drift as run | mean norm of s·B·A |\n"
        "|---|---|---|---|---|---|"
    )
    for precision in PRECISIONS:
        alone = rounding(source, precision, batches)
        starts: dict[str, Callable[[Any, list[Tensor]], Any]] = {
            "here, shift in the weight": lambda m, b: start_here(m, b, dict(settings), "weight"),
            "here, shift in the adapter": lambda m, b: start_here(m, b, dict(settings), "adapter"),
            "PEFT's lora_ga": lambda m, b: start_by_peft(m, b, dict(settings)),
        }
        for name, start in starts.items():
            cells = measure(source, precision, start, batches)
            print(f"| {precision} | {alone} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
