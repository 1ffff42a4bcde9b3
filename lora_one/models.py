"""Models: loading a pretrained model and its tokenizer, and finding the layers to adapt."""

import copy
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from lora_one.config import ExperimentConfig, ModelConfig, PeftConfig
from lora_one.digests import weights_fingerprint
from lora_one.errors import UserError
from lora_one.hub import offline_hint
from lora_one.layers import is_linear, quantisation, settle, shape_OI, why_unsupported
from lora_one.memo import Memo
from lora_one.memory import free_host_bytes
from lora_one.targets import qv_layers

EMBEDDED_MODEL = "embedded/tiny_llama"
_EMBEDDED_FOLDER = Path(__file__).parent / "assets" / "tiny_llama"
# A second copy of the weights saves a read of the disk; more than this of the host's memory is not worth it.
_SHARE_OF_FREE_MEMORY = 0.25


@dataclass(frozen=True)
class LoadedModel:
    """A pretrained model ready for an adapter.

    Attributes:
        model: The model on the device, frozen parameters and all.
        tokenizer: Its tokenizer, with a padding token.
        source: Local folder, or Hub id.
        fingerprint: Digest of the weight files (local) or commit (Hub), None where that is unknown.
        targets: Full names of the layers to adapt; empty for full fine-tuning.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    source: str
    fingerprint: str | None
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
    try:
        exists = folder.exists()
    except OSError as error:
        raise UserError(f"model.name={name}: {error.strerror}; give a folder, or a Hub id") from None
    if not exists:
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
    config: ExperimentConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    memo: Memo | None = None,
) -> LoadedModel:
    """Loads the pretrained model onto ``device`` and finds its target layers.

    Frozen weights are bfloat16 with ``model.bf16``, float16 with ``model.fp16``; trained ones float32.

    Args:
        config: What to load.
        tokenizer: Its tokenizer.
        device: Where it will be trained.
        memo: Holds the weights as they were read for the next load; each gets a copy of its own.

    Raises:
        UserError: If the model cannot be read or has no weights, the device has no bfloat16, no
            layer matches the targets, or the rank is too large for one.
    """
    source = model_source(config.model.name)
    check_precision(config.model, device)
    # Weights that are trained stay in float32: most updates are smaller than bfloat16 can hold.
    low = torch.bfloat16 if config.model.bf16 else torch.float16 if config.model.fp16 else torch.float32
    dtype = low if config.peft.use_peft else torch.float32
    digests = Path(config.cache_dir) / "digests" if config.cache_dir else None
    fingerprint = weights_fingerprint(Path(source), digests) if Path(source).is_dir() else None
    model = _copy_of_weights(config.model, source, dtype, fingerprint, memo)
    if config.model.quantization is not None:
        _check_quantised(model, config.model)
    elif config.model.device_map is None:
        model = model.to(device)
    model.config.use_cache = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = target_names(model, config.peft) if config.peft.use_peft else ()
    if targets:
        check_rank(model, targets, config)
    fingerprint = fingerprint or getattr(model.config, "_commit_hash", None)
    return LoadedModel(model, tokenizer, source, fingerprint, targets)


def empty_model(config: ModelConfig) -> Any | None:
    """The model without weights (meta device), or None where its shape is unknown offline.

    Raises:
        UserError: If its config describes no model, or one of another ``model.type``.
    """
    source = model_source(config.name)
    is_local = Path(source).is_dir()
    if not is_local and config.shape is None:
        return None
    try:
        if is_local:
            hf_config = AutoConfig.from_pretrained(source)
        else:
            shape = dict(config.shape or {})
            hf_config = AutoConfig.for_model(shape.pop("model_type", None), **shape)
        _check_type(config, hf_config)
        with torch.device("meta"):
            return auto_class(config).from_config(hf_config)
    except UserError:
        raise
    except Exception as error:
        where = f"model.name={config.name}: its config.json" if is_local else "model.shape"
        reason = " ".join(str(error).split())
        raise UserError(f"{where} describes no model ({type(error).__name__}: {reason}); mend it") from error


def auto_class(config: ModelConfig) -> Any:
    """The class of transformers that loads a model of this ``model.type``."""
    return AutoModelForSeq2SeqLM if config.is_pair else AutoModelForCausalLM


def check_model_type(config: ModelConfig) -> None:
    """Reads the model's own config, and no weights.

    Raises:
        UserError: If it cannot be read, or is of another ``model.type``.
    """
    try:
        hf_config = AutoConfig.from_pretrained(
            model_source(config.name), revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model.name={config.name}: {offline_hint(error)}") from error
    _check_type(config, hf_config)


def _check_type(config: ModelConfig, hf_config: Any) -> None:
    if hf_config.is_encoder_decoder and not config.is_pair:
        raise UserError(
            f"model.type={config.type}: {config.name} is an encoder with a decoder ({hf_config.model_type}); "
            "use model.type=ConditionalGeneration"
        )
    if config.is_pair and not hf_config.is_encoder_decoder:
        raise UserError(
            f"model.type={config.type}: {config.name} has no encoder ({hf_config.model_type}); "
            "use model.type=CausalLM"
        )


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """All layers that can take an adapter, but the output head, by full name."""
    head = model.get_output_embeddings()
    return {
        name: module for name, module in model.named_modules() if is_linear(module) and module is not head
    }


def target_names(model: Any, config: PeftConfig) -> tuple[str, ...]:
    """Full names of the layers that ``peft.lora_target_modules`` and what restricts it mean.

    Raises:
        UserError: If an entry matches no layer, or one that cannot take an adapter.
    """
    layers = linear_layers(model)
    if not layers or not config.lora_target_modules:
        what = "the model has no linear layer" if not layers else "the list is empty; use all, or name layers"
        raise UserError(f"peft.lora_target_modules: {what}")
    names = tuple(layers) if config.lora_target_modules == "all" else _matching(model, layers, config)
    exclude = config.lora_exclude_modules
    for pattern in [exclude] if isinstance(exclude, str) else exclude or []:
        if all(_is_kept(name, PeftConfig(lora_exclude_modules=pattern)) for name in names):
            raise UserError(f"peft.lora_exclude_modules: {pattern!r} matches no target, such as {names[0]}")
    restricted = tuple(name for name in names if _is_kept(name, config))
    if not restricted:
        raise UserError(
            "peft.lora_exclude_modules, peft.layers_to_transform: no target is left; "
            f"without them there are {len(names)}, such as {names[0]}"
        )
    refuse_shared_modules(model, restricted)
    if config.train_embeddings:
        _refuse_trained_along(model, restricted)
    return restricted


def adapter_rank(model: Any, config: PeftConfig) -> int:
    """``peft.lora_r``, or its share of the hidden size with ``peft.lora_relative_r``."""
    if config.lora_relative_r is None:
        return config.lora_r
    return max(1, int(model.config.hidden_size * config.lora_relative_r))


def adapter_ranks(model: Any, targets: Sequence[str], config: PeftConfig) -> dict[str, int]:
    """The rank of every target's adapter, ``peft.rank_pattern`` included.

    Raises:
        UserError: If a pattern matches no target.
    """
    return _by_pattern(targets, config.rank_pattern, adapter_rank(model, config), "peft.rank_pattern")


def adapter_alphas(targets: Sequence[str], config: PeftConfig) -> dict[str, float]:
    """The alpha of every target's adapter, ``peft.alpha_pattern`` included.

    Raises:
        UserError: If a pattern matches no target.
    """
    return _by_pattern(targets, config.alpha_pattern, config.lora_alpha, "peft.alpha_pattern")


def check_rank(model: Any, targets: tuple[str, ...], config: ExperimentConfig) -> None:
    """Raises UserError if an adapter needs more directions than its target has."""
    ranks = adapter_ranks(model, targets, config.peft)
    doubled = config.init.mode == "gradient" and config.gradient_start().shifts_base
    for name in targets:
        rank, limit = ranks[name], min(shape_OI(model.get_submodule(name)))
        if (2 * rank if doubled else rank) > limit:
            what = f"needs 2r = {2 * rank} directions" if doubled else f"is {rank}"
            most = limit // 2 if doubled else limit
            where = "peft.lora_r" if rank == adapter_rank(model, config.peft) else "peft.rank_pattern"
            raise UserError(
                f"{where}={rank}: {what}, but the weight of {name} has rank {limit}; use r <= {most}"
            )


def check_precision(config: ModelConfig, device: torch.device) -> None:
    """Raises UserError for a number format that the device does not train in."""
    if config.fp16 and device.type != "cuda":
        raise UserError(f"model.fp16=true: not on this device ({device.type}); use model.fp16=false")
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
    """The pretrained model in ``dtype``, on the CPU, or where ``model.device_map`` says.

    Raises:
        UserError: If it cannot be read or has no weights.
    """
    if Path(source).is_dir() and not any(Path(source).glob("*.safetensors")):
        raise UserError(
            f"model.name={config.name}: the folder has no *.safetensors weights; save the model again"
        )
    try:
        return auto_class(config).from_pretrained(
            source,
            revision=config.revision,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            device_map=config.device_map,
            attn_implementation=config.attn_implementation,
            **_quantised(config, dtype),
        )
    except UserError:
        raise
    except Exception as error:
        asked = config.attn_implementation
        reason = " ".join(str(error).split())
        if asked is not None and any(word in reason.lower() for word in ("attention", "attn", asked)):
            raise UserError(f"model.attn_implementation={asked}: {reason}") from error
        raise UserError(f"model.name={config.name}: {offline_hint(error)}") from error


def _copy_of_weights(
    config: ModelConfig, source: str, dtype: torch.dtype, fingerprint: str | None, memo: Memo | None
) -> Any:
    """Reads the weights, or copies what ``memo`` holds of them; training changes what it is given."""
    if memo is None or config.quantization is not None or config.device_map is not None:
        if memo is not None:
            memo.forget()
        return read_weights(config, source, dtype)
    code = (config.type, config.revision, config.trust_remote_code, config.attn_implementation)
    model = memo.get((source, fingerprint, dtype, *code), lambda: read_weights(config, source, dtype))
    size = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
    if size > _SHARE_OF_FREE_MEMORY * free_host_bytes():
        memo.forget()
        return model
    return copy.deepcopy(model)


def _quantised(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    if config.quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantization={config.quantization}: needs bitsandbytes; pip install 'bitsandbytes>=0.46'"
        )
    if config.quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": nf4}


def _check_quantised(model: Any, config: ModelConfig) -> None:
    """Bitsandbytes quantises in blocks of 64 inputs; narrower rows come out wrong on some devices."""
    settle(model)
    for name, layer in model.named_modules():
        if quantisation(layer) != "4bit":
            continue
        if layer.in_features % 64:
            raise UserError(
                f"model.quantization=4bit: {name} has {layer.in_features} inputs, which is no multiple of "
                f"bitsandbytes' block of 64; use model.quantization=8bit, or none with {config.name}"
            )


def _matching(model: Any, layers: Mapping[str, nn.Module], config: PeftConfig) -> tuple[str, ...]:
    """The layers that a name, a list of names or a regular expression means."""
    wanted, key = config.lora_target_modules, "peft.lora_target_modules"
    if wanted == "qv":
        wanted = qv_layers(model.config.model_type, layers)
    suffixes = [wanted] if isinstance(wanted, str) else wanted
    modules = {name: module for name, module in model.named_modules() if name}
    found: set[str] = set()
    for suffix in suffixes:
        matches = [name for name in modules if _ends_with(name, suffix)]
        if not matches and isinstance(wanted, str):
            matches = [name for name in modules if _fullmatch(suffix, name, key) and is_linear(modules[name])]
        if not matches:
            known = sorted({name.rsplit(".", 1)[-1] for name in layers})
            raise UserError(f"{key}: {suffix!r} matches no linear layer; the model has: {', '.join(known)}")
        for name in matches:
            reason = why_unsupported(modules[name])
            if reason is not None:
                raise UserError(f"{key}: {suffix!r} means {name}, but {reason}")
        found.update(matches)
    return tuple(name for name in modules if name in found)


def _is_kept(name: str, config: PeftConfig) -> bool:
    exclude, blocks = config.lora_exclude_modules, config.layers_to_transform
    if isinstance(exclude, str) and (
        _ends_with(name, exclude) or _fullmatch(exclude, name, "peft.lora_exclude_modules")
    ):
        return False
    if isinstance(exclude, list) and any(_ends_with(name, suffix) for suffix in exclude):
        return False
    if blocks is None:
        return True
    number = re.match(r".*?\.(\d+)\.", name)  # the first number in a name is that of the block
    return number is not None and int(number[1]) in ([blocks] if isinstance(blocks, int) else blocks)


def _by_pattern(targets: Sequence[str], pattern: Mapping[str, Any], default: Any, key: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for expression, value in pattern.items():  # the first that matches counts, as in PEFT
        matches = [name for name in targets if _fullmatch(rf"(.*\.)?({expression})", name, key)]
        if not matches:
            raise UserError(f"{key}: {expression!r} matches no target, such as {targets[0]}")
        values = dict.fromkeys(matches, value) | values
    return {name: values.get(name, default) for name in targets}


def refuse_shared_modules(model: Any, names: tuple[str, ...]) -> None:
    """One module under two names would get its adapter under one of them only."""
    wanted = {id(model.get_submodule(name)): name for name in names}
    for name, module in model.named_modules(remove_duplicate=False):
        target = wanted.get(id(module))
        if target is not None and target != name:
            raise UserError(
                f"target modules: {target} and {name} are one and the same module, which PEFT adapts in one "
                "place only; leave it out of the targets"
            )


def _refuse_trained_along(model: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if model.get_submodule(name) in (model.get_input_embeddings(), model.get_output_embeddings()):
            raise UserError(
                f"peft.train_embeddings=true: {name} is trained in full then, and takes no adapter; "
                "leave it out of peft.lora_target_modules"
            )


def _fullmatch(expression: str, name: str, key: str) -> bool:
    try:
        return re.fullmatch(expression, name) is not None
    except re.error as error:
        raise UserError(f"{key}: {expression!r} is no regular expression ({error})") from None


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")
