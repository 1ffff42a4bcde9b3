"""LoRA adapters initialised from the full fine-tuning gradient.

Shape suffixes used everywhere: ``O`` output features, ``I`` input features, ``R`` adapter rank,
``K`` kept singular triplets, ``B`` batch, ``T`` positions, ``V`` vocabulary. So ``G_OI`` is a weight
gradient, ``B_OR`` and ``A_RI`` are PEFT's ``lora_B`` and ``lora_A``, and an adapted layer computes
``x (W_OI + s · B_OR A_RI)ᵀ`` with ``s = alpha / r``, or ``alpha / √r`` with rsLoRA.
"""

from lora_one.errors import UserError
from lora_one.library import (
    LoraConfig,
    LoraGAConfig,
    LoraOneConfig,
    get_peft_model,
    preprocess_lora_one,
    preprocess_loraga,
)

__version__ = "0.1.0"

__all__ = [
    "LoraConfig",
    "LoraGAConfig",
    "LoraOneConfig",
    "UserError",
    "get_peft_model",
    "preprocess_lora_one",
    "preprocess_loraga",
]
