"""Models: loading a pretrained model and its tokenizer, and finding the layers to adapt."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lora_one.config import ExperimentConfig, ModelConfig, PeftConfig
from lora_one.errors import UserError
from lora_one.hub import offline_hint

EMBEDDED_MODEL = "embedded/tiny_llama"
_EMBEDDED_FOLDER = Path(__file__).parent / "assets" / "tiny_llama"


@dataclass(frozen=True)
class LoadedModel:
    """A pretrained model ready for an adapter.

    Attributes:
        model: The model on the device, frozen parameters and all.
        tokenizer: Its tokenizer, with a padding token.
        source: Local folder, or Hub id.
        fingerprint: Digest of the weight files (local) or commit (Hub).
        targets: Full names of the layers to adapt; empty for full fine-tuning.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    source: str
    fingerprint: str
    targets: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """What the record keeps."""
        return {"source": self.source, "fingerprint": self.fingerprint, "targets": len(self.targets)}


def model_source(name: str) -> str:
    """The folder of a local model, the embedded one included, or the Hub id as it is.

    Raises:
        UserError: For a local folder that is no model.
    """
    if name == EMBEDDED_MODEL:
        return str(_EMBEDDED_FOLDER)
    folder = Path(name).expanduser()
    if not folder.exists():
        if name.startswith((".", "/", "~")):
            raise UserError(f"model.name={name}: no such folder; give a folder with config.json, or a Hub id")
        return name
    if not (folder / "config.json").is_file():
        raise UserError(f"model.name={name}: the folder has no config.json; give a saved Hugging Face model")
    return str(folder)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer; pads with the end token where it has no padding token.

    Raises:
        UserError: If it cannot be read, or has no end token or no character offsets.
    """
    source = model_source(config.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise UserError(f"model.name={config.name}: {offline_hint(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"model.name={config.name}: its tokenizer has no fast version, which masking needs")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name={config.name}: its tokenizer has no end token; set eos_token in its config"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> LoadedModel:
    """Loads the pretrained model onto ``device`` and finds its target layers.

    Frozen weights are bfloat16 with ``model.bf16``; trained ones, and all without it, float32.

    Raises:
        UserError: If the model cannot be read or has no weights, the device has no bfloat16, no
            layer matches the targets, or the rank is too large for one.
    """
    source = model_source(config.model.name)
    check_bf16(config.model, device)
    # Weights that are trained stay in float32: most updates are smaller than bfloat16 can hold.
    low_precision = config.model.bf16 and config.peft.use_peft
    model = read_weights(config.model, source, torch.bfloat16 if low_precision else torch.float32)
    model = model.to(device)
    model.config.use_cache = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = target_names(model, config.peft) if config.peft.use_peft else ()
    if targets:
        check_rank(model, targets, config)
    return LoadedModel(model, tokenizer, source, _fingerprint(model, source), targets)


def empty_model(config: ModelConfig) -> Any | None:
    """The model without weights (meta device), or None where its shape is unknown offline."""
    source = model_source(config.name)
    if Path(source).is_dir():
        hf_config = AutoConfig.from_pretrained(source)
    elif config.shape is not None:
        shape = dict(config.shape)
        hf_config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    else:
        return None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config)


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """All linear layers but the output head, by full name."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def target_names(model: Any, config: PeftConfig) -> tuple[str, ...]:
    """Full names of the layers that ``peft.lora_target_modules`` means.

    Raises:
        UserError: If an entry matches no linear layer; the model's are listed.
    """
    layers = linear_layers(model)
    wanted = config.lora_target_modules
    if not layers or not wanted:
        what = "the model has no linear layer" if not layers else "the list is empty; use all, or name layers"
        raise UserError(f"peft.lora_target_modules: {what}")
    if wanted == "all":
        return tuple(layers)
    suffixes = [wanted] if isinstance(wanted, str) else wanted
    for suffix in suffixes:
        if not any(_ends_with(name, suffix) for name in layers):
            known = sorted({name.rsplit(".", 1)[-1] for name in layers})
            raise UserError(
                f"peft.lora_target_modules: {suffix!r} matches no linear layer; "
                f"the model has: {', '.join(known)}"
            )
    return tuple(name for name in layers if any(_ends_with(name, suffix) for suffix in suffixes))


def adapter_rank(model: Any, config: PeftConfig) -> int:
    """``peft.lora_r``, or its share of the hidden size with ``peft.lora_relative_r``."""
    if config.lora_relative_r is None:
        return config.lora_r
    return max(1, int(model.config.hidden_size * config.lora_relative_r))


def check_rank(model: Any, targets: tuple[str, ...], config: ExperimentConfig) -> None:
    """Raises UserError if the adapter needs more directions than the smallest target has."""
    rank = adapter_rank(model, config.peft)
    shifts = config.init.mode == "gradient" and config.init.direction != "LoRA-One"
    needed = 2 * rank if shifts else rank
    layers = linear_layers(model)
    smallest = min(targets, key=lambda name: min(layers[name].weight.shape))
    limit = min(layers[smallest].weight.shape)
    if needed > limit:
        what = f"needs 2r = {needed} directions" if shifts else f"is {rank}"
        most = limit // 2 if shifts else limit
        raise UserError(
            f"peft.lora_r={rank}: {what}, but the weight of {smallest} has rank {limit}; use r <= {most}"
        )


def check_bf16(config: ModelConfig, device: torch.device) -> None:
    """Raises UserError if bfloat16 is asked for on a device that has none."""
    if not config.bf16:
        return
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        has_bf16 = True
    if not has_bf16:
        raise UserError(f"model.bf16=true: the device ({device.type}) has no bfloat16; use model.bf16=false")


def read_weights(config: ModelConfig, source: str, dtype: torch.dtype) -> Any:
    """The pretrained model in ``dtype``, on the CPU.

    Raises:
        UserError: If it cannot be read or has no weights.
    """
    if Path(source).is_dir() and not any(Path(source).glob("*.safetensors")):
        raise UserError(
            f"model.name={config.name}: the folder has no *.safetensors weights; save the model again"
        )
    try:
        return AutoModelForCausalLM.from_pretrained(
            source,
            revision=config.revision,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
        )
    except Exception as error:
        raise UserError(f"model.name={config.name}: {offline_hint(error)}") from error


def _fingerprint(model: Any, source: str) -> str:
    if not Path(source).is_dir():
        return str(getattr(model.config, "_commit_hash", None))
    digest = hashlib.sha256()
    for path in sorted(Path(source).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")
