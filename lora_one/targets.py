"""What ``peft.lora_target_modules=qv`` means for each architecture."""

from collections.abc import Iterable

from lora_one.errors import UserError

_LLAMA = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
_APART = ("q_proj", "v_proj")
# By the ``model_type`` of transformers: the five layers of the published runs where they have Llama's
# names, elsewhere query and value, or the one layer in which they are fused.
QV_LAYERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA),
    **dict.fromkeys(("olmo", "olmo2", "cohere", "granite", "smollm3", "stablelm"), _LLAMA),
    **dict.fromkeys(("phi", "opt", "gptj", "gpt_neo", "bart"), _APART),
    **dict.fromkeys(("t5", "mt5", "umt5"), ("q", "v")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("gpt_neox", "falcon", "bloom"), ("query_key_value",)),
    "phi3": ("qkv_proj",),
}


def qv_layers(model_type: str, linear: Iterable[str]) -> list[str]:
    """Ends of the names of the layers that ``qv`` means.

    Args:
        model_type: The architecture, as the model's config names it.
        linear: Names of its linear layers, shown where the table does not know it.

    Raises:
        UserError: If the table does not know the architecture.
    """
    if model_type in QV_LAYERS:
        return list(QV_LAYERS[model_type])
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    raise UserError(
        f"peft.lora_target_modules=qv: not known for the architecture {model_type}; "
        f"give a list of its linear layers: {', '.join(known)}"
    )
