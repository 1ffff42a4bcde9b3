"""LoRA adapters initialised from the full fine-tuning gradient.

Shape suffixes used everywhere: ``O`` output features, ``I`` input features, ``R`` adapter rank,
``K`` kept singular triplets, ``B`` batch, ``T`` positions, ``V`` vocabulary. So ``G_OI`` is a weight
gradient, ``B_OR`` and ``A_RI`` are PEFT's ``lora_B`` and ``lora_A``, and an adapted layer computes
``x (W_OI + s · B_OR A_RI)ᵀ`` with ``s = alpha / r``, or ``alpha / √r`` with rsLoRA.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_one.errors import UserError
    from lora_one.library import get_peft_model, preprocess_lora_one, preprocess_loraga
    from lora_one.optimizers import LoraPro, ScaledAdamW, ScaledGD, factor_pairs
    from lora_one.settings import LoraConfig, LoraGAConfig, LoraOneConfig

__version__ = "0.1.0"

__all__ = [
    "LoraConfig",
    "LoraGAConfig",
    "LoraOneConfig",
    "LoraPro",
    "ScaledAdamW",
    "ScaledGD",
    "UserError",
    "factor_pairs",
    "get_peft_model",
    "preprocess_lora_one",
    "preprocess_loraga",
]


def __getattr__(name: str) -> Any:
    """The library when it is asked for: its imports take seconds, which a table of results need not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lora_one import errors, library, optimizers, settings

    places = (errors, settings, library, optimizers)
    return next(getattr(place, name) for place in places if hasattr(place, name))
