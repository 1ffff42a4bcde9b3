"""Adapters that travel: what is written loads with stock PEFT on the untouched base model.

A start that shifts the base trains relative to a base that nobody else has. Such an adapter is written
as the exact difference to the *untouched* base, ``s (B A - B₀ A₀) = s · [B, B₀] [A; -A₀]``: a plain
adapter of rank 2r.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora_one.adapters import ADAPTER, PREFIX
from lora_one.config import ModelConfig
from lora_one.errors import UserError
from lora_one.files import to_disk, whole_folder
from lora_one.inits import AdapterInit
from lora_one.models import LoadedModel, read_weights

# PEFT's settings of starts; what is written needs none of them.
_START_SETTINGS = ("lora_ga_config", "eva_config", "corda_config")


def save_init(inits: Mapping[str, AdapterInit], path: Path) -> None:
    """Keeps stored starts: a resumed run needs the same ones to the bit."""
    tensors = {f"{name}.A_RI": init.A_RI for name, init in inits.items()}
    tensors |= {f"{name}.B_OR": init.B_OR for name, init in inits.items()}
    shifts = any(init.shifts_base for init in inits.values())
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"shifts_base": str(shifts)})
    to_disk(partial)
    partial.replace(path)


def load_init(path: Path) -> dict[str, AdapterInit]:
    """Reads what ``save_init`` wrote.

    Raises:
        UserError: If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shifts = file.metadata()["shifts_base"] == "True"
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); remove the run folder and start again") from None
    names = [key.removesuffix(".A_RI") for key in tensors if key.endswith(".A_RI")]
    return {name: AdapterInit(tensors[f"{name}.A_RI"], tensors[f"{name}.B_OR"], shifts) for name in names}


def portable_config(config: LoraConfig, shifts_base: bool) -> LoraConfig:
    """The config of the written adapter: twice the ranks where the base was shifted, no start of ours."""
    portable: Any = copy.deepcopy(config)
    portable.inference_mode = True
    portable.init_lora_weights = True
    for name in _START_SETTINGS:
        setattr(portable, name, None)
    if shifts_base:
        # The scaling of each layer stays: alpha / r, or alpha / √r with rsLoRA.
        factor = 2**0.5 if portable.use_rslora else 2
        portable.r *= 2
        portable.lora_alpha *= factor
        portable.rank_pattern = {key: 2 * rank for key, rank in portable.rank_pattern.items()}
        portable.alpha_pattern = {key: factor * alpha for key, alpha in portable.alpha_pattern.items()}
    return portable


def portable_state(state: Mapping[str, Tensor], inits: Mapping[str, AdapterInit]) -> dict[str, Tensor]:
    """The tensors of the written adapter, from PEFT's own and the starts that shifted the base."""
    # Copies: tied embeddings are one tensor under two names, which safetensors does not write.
    written = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in state.items()
    }
    for name, init in inits.items():
        if init.shifts_base:
            key_A, key_B = (f"{PREFIX}{name}.lora_{factor}.weight" for factor in "AB")
            # In the wider of the two dtypes: the base was shifted by exactly these.
            written[key_A] = torch.cat([written[key_A], -init.A_RI], dim=0)
            written[key_B] = torch.cat([written[key_B], init.B_OR], dim=1)
    return written


def export_adapter(model: PeftModel, inits: Mapping[str, AdapterInit], folder: Path) -> None:
    """Writes the adapter so that stock PEFT loads it onto the untouched base model.

    Args:
        model: The trained model.
        inits: The stored starts; empty for a start with ``B = 0``.
        folder: Created whole or not at all.
    """
    state = portable_state(get_peft_model_state_dict(model, save_embedding_layers=False), inits)
    shifts_base = any(init.shifts_base for init in inits.values())
    config: Any = portable_config(model.peft_config[ADAPTER], shifts_base)  # type: ignore[arg-type]
    with whole_folder(folder) as partial:
        save_file(state, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(partial))


def merge_adapter(loaded: LoadedModel, config: ModelConfig, adapter: Path, folder: Path) -> None:
    """Writes the untouched base model with exactly this adapter merged in, computed in float32.

    Args:
        loaded: Where the base model came from, and its tokenizer.
        config: ``bf16`` is the dtype of the written weights.
        adapter: A portable adapter folder.
        folder: Created whole or not at all.
    """
    base = read_weights(
        config.model_copy(update={"quantization": None, "device_map": None}), loaded.source, torch.float32
    )
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    save_model(merged.to(torch.bfloat16) if config.bf16 else merged, loaded.tokenizer, folder)


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a whole model and its tokenizer as a folder that ``from_pretrained`` reads."""
    model.config.use_cache = True
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def load_trained(loaded: LoadedModel, run_folder: Path) -> Any:
    """The trained model of a finished run: its adapter on the untouched base, or its own weights.

    Raises:
        UserError: If the run folder holds neither.
    """
    if (run_folder / "adapter").is_dir():
        return PeftModel.from_pretrained(loaded.model, str(run_folder / "adapter"))
    if not (run_folder / "merged").is_dir():
        raise UserError(f"{run_folder}: holds neither adapter/ nor merged/; remove it to run again")
    merged = type(loaded.model).from_pretrained(str(run_folder / "merged"), dtype=loaded.model.dtype)
    return merged.to(loaded.model.device)
