"""Adapters: adding them, starting them from factors, and writing what loads anywhere.

This is the only module that edits a model's weights. A start with ``B A ≠ 0`` that keeps the
model's function takes ``s · B A`` off the base weight, so what is trained is relative to a base
that nobody else has. Such an adapter is written as the exact difference to the *untouched* base:
``s (B A - B₀ A₀) = s · [B, B₀] [A; -A₀]``, a plain adapter of rank 2r.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lora_one.config import ModelConfig, PeftConfig
from lora_one.data.batches import collate
from lora_one.data.encoding import Encoded
from lora_one.errors import UserError
from lora_one.files import whole_folder
from lora_one.inits import AdapterInit
from lora_one.losses import to_device
from lora_one.models import LoadedModel, read_weights

_ADAPTER = "default"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class InitReport:
    """What the start did to the model.

    Attributes:
        product_norm: Mean over the targets of ‖s · B₀ A₀‖_F.
        relative_product_norm: Mean over the targets of ‖s · B₀ A₀‖_F / ‖W‖_F.
        logit_drift: ‖logits after - logits before‖ / ‖logits before‖ on a few validation examples:
            rounding error where the start keeps the function, the first step with LoRA-One.
        shifts_base: Whether the base weights were shifted.
    """

    product_norm: float
    relative_product_norm: float
    logit_drift: float
    shifts_base: bool


def add_adapter(loaded: LoadedModel, config: PeftConfig, rank: int, seed: int) -> PeftModel:
    """Adds PEFT's LoRA layers with PEFT's own start (A Kaiming-uniform, B zero), seeded.

    Raises:
        UserError: If PEFT would adapt other layers than ``loaded.targets``.
    """
    lora_config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT says int, and divides by r
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=sorted({name.rsplit(".", 1)[-1] for name in loaded.targets}),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(loaded.model, lora_config)
    adapted = {name.removeprefix(_PREFIX) for name in _lora_layers(model)}
    if adapted != set(loaded.targets):
        odd = min(adapted ^ set(loaded.targets))
        raise UserError(
            f"peft.lora_target_modules: ambiguous for {odd}; name the layers by their last part only"
        )
    return model


def scaling(model: PeftModel) -> float:
    """The adapters' s."""
    return next(iter(_lora_layers(model).values())).scaling[_ADAPTER]


def apply_init(
    model: PeftModel,
    inits: Mapping[str, AdapterInit],
    probe: Sequence[Encoded],
    pad_id: int,
    device: torch.device,
) -> InitReport:
    """Writes the factors into the adapters and, where a start asks for it, shifts the base weights.

    The shift is computed in float32 from the factors as stored, after their cast to the adapter's
    dtype, so that the adapter cancels it as exactly as the base's dtype allows.

    Args:
        model: The model with adapters whose B is zero.
        inits: Full layer name (without PEFT's prefix) to its start.
        probe: A few examples, to see what the start does to the model's function.
        pad_id: Padding token.
        device: Of the model.
    """
    before = _logits(model, probe, pad_id, device)
    norms: list[float] = []
    ratios: list[float] = []
    layers = _lora_layers(model)
    for name, init in inits.items():
        layer = layers[_PREFIX + name]
        weight = layer.get_base_layer().weight
        with torch.no_grad():
            layer.lora_A[_ADAPTER].weight.copy_(init.A_RI)
            layer.lora_B[_ADAPTER].weight.copy_(init.B_OR)
            product_OI = _product(layer)
            norms.append(product_OI.norm().item())
            ratios.append(norms[-1] / weight.float().norm().item())
            if init.shifts_base:
                weight.copy_(weight.float() - product_OI)
    after = _logits(model, probe, pad_id, device)
    return InitReport(
        product_norm=sum(norms) / len(norms),
        relative_product_norm=sum(ratios) / len(ratios),
        logit_drift=((after - before).norm() / before.norm()).item(),
        shifts_base=any(init.shifts_base for init in inits.values()),
    )


def stored_init(model: PeftModel, inits: Mapping[str, AdapterInit]) -> dict[str, AdapterInit]:
    """The starts as the adapters hold them now, after their cast to the adapter's dtype."""
    layers = _lora_layers(model)

    def factor(kind: str, name: str) -> Tensor:
        return getattr(layers[_PREFIX + name], kind)[_ADAPTER].weight.detach().cpu().clone()

    return {
        name: AdapterInit(factor("lora_A", name), factor("lora_B", name), init.shifts_base)
        for name, init in inits.items()
    }


def save_init(inits: Mapping[str, AdapterInit], path: Path) -> None:
    """Keeps stored starts: a resumed run needs the same ones to the bit."""
    tensors = {f"{name}.A_RI": init.A_RI for name, init in inits.items()}
    tensors |= {f"{name}.B_OR": init.B_OR for name, init in inits.items()}
    shifts = any(init.shifts_base for init in inits.values())
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"shifts_base": str(shifts)})
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


def export_adapter(model: PeftModel, inits: Mapping[str, AdapterInit], folder: Path) -> None:
    """Writes the adapter so that stock PEFT loads it onto the untouched base model.

    Args:
        model: The trained model.
        inits: The stored starts; empty for a start with ``B = 0``.
        folder: Created whole or not at all.
    """
    state = {
        key: tensor.detach().cpu().contiguous() for key, tensor in get_peft_model_state_dict(model).items()
    }
    config: Any = copy.deepcopy(model.peft_config[_ADAPTER])
    config.inference_mode = True
    if any(init.shifts_base for init in inits.values()):
        config.r = 2 * config.r
        config.lora_alpha = scaling(model) * config.r
        config.use_rslora = False
        for name, init in inits.items():
            key_A, key_B = (f"{_PREFIX}{name}.lora_{factor}.weight" for factor in "AB")
            state[key_A] = torch.cat([state[key_A], -init.A_RI.to(state[key_A])], dim=0)
            state[key_B] = torch.cat([state[key_B], init.B_OR.to(state[key_B])], dim=1)
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
    base = read_weights(config, loaded.source, torch.float32)
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
    model = AutoModelForCausalLM.from_pretrained(str(run_folder / "merged"), dtype=loaded.model.dtype)
    return model.to(loaded.model.device)


def _lora_layers(model: PeftModel) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _product(layer: Any) -> Tensor:
    A_RI = layer.lora_A[_ADAPTER].weight.float()
    B_OR = layer.lora_B[_ADAPTER].weight.float()
    return layer.scaling[_ADAPTER] * (B_OR @ A_RI)


@torch.no_grad()
def _logits(model: PeftModel, probe: Sequence[Encoded], pad_id: int, device: torch.device) -> Tensor:
    batch = to_device(collate([(example, 0.0) for example in probe], pad_id), device)
    was_training = model.training
    model.eval()
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    model.train(was_training)
    return output.logits[batch["attention_mask"].bool()].float()
