"""Adapters: adding them, and starting them from factors.

This is the only module that edits a model's weights. A start with ``B A ≠ 0`` that keeps the model's
function takes ``s · B A`` off the base: off its weight, or, where that would cost too much precision,
off its output (``shift="adapter"``), as two more frozen factors.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from lora_one.config import PeftConfig
from lora_one.errors import UserError
from lora_one.inits import AdapterInit
from lora_one.layers import (
    quantisation,
    read_weight,
    separate_weights,
    settle,
    subtract_product,
    weight_norm,
    why_unsupported,
)

ADAPTER = "default"
PREFIX = "base_model.model."
_TINY = torch.finfo(torch.float32).tiny
_SHIFT = ("lora_one_shift_A", "lora_one_shift_B")


@dataclass(frozen=True)
class InitReport:
    """What the start did to the model.

    Attributes:
        product_norm: Mean over the targets of ‖s · B₀ A₀‖_F.
        relative_product_norm: Mean over the targets of ‖s · B₀ A₀‖_F / ‖W‖_F.
        shift: Where ``s · B₀ A₀`` was taken off: ``weight``, ``adapter``, or None where it was not.
        weight_drift: Largest ‖W' + s · B₀ A₀ - W‖_F / ‖W‖_F over the shifted targets, W' being the
            weight as stored: rounding, or re-quantisation. Of float32 weights a bound (1.2e-7).
        logit_drift: ‖logits after - logits before‖ / ‖logits before‖ on a few examples: rounding
            where the start keeps the function, the first step with LoRA-One. None without examples.
        dropout_drift: The same with the adapters' dropout on, where there is one and the base is
            shifted: dropout acts on the adapter alone, so that the function is kept in eval mode only.
    """

    product_norm: float
    relative_product_norm: float
    shift: str | None
    weight_drift: float
    logit_drift: float | None = None
    dropout_drift: float | None = None

    def remarks(self) -> list[str]:
        """What a person may not expect of the start."""
        lines = []
        if self.dropout_drift is not None:
            lines.append(
                "the adapter's dropout does not act on the shifted base: in training the model starts "
                f"{self.dropout_drift:.1%} away from the pretrained one (relative logits); "
                "use peft.lora_dropout=0"
            )
        if self.weight_drift > 0.01:
            lines.append(
                f"storing the shifted weights again changed them by {self.weight_drift:.1%}; "
                "use init.shift=adapter"
            )
        return lines


def lora_config(
    targets: Sequence[str],
    config: PeftConfig,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    **settings: Any,
) -> LoraConfig:
    """PEFT's config of adapters on exactly ``targets``, each with its rank and alpha."""
    rank, alpha = (_most_common([values[name] for name in targets]) for values in (ranks, alphas))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={f"^{name}": ranks[name] for name in targets if ranks[name] != rank},
        alpha_pattern={f"^{name}": alphas[name] for name in targets if alphas[name] != alpha},
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.dora,
        target_modules=list(targets),
        **settings,
    )


def adalora_config(
    targets: Sequence[str], config: PeftConfig, rank: int, total_steps: int, **settings: Any
) -> LoraConfig:
    """AdaLoRA, its schedule in shares of ``total_steps`` optimiser steps.

    Every target starts with rank ``⌈1.5 r⌉``; the budget falls to r on average between a tenth and
    half of the training.

    Raises:
        UserError: If the training is too short for the schedule.
    """
    if total_steps < 2:
        raise UserError(
            f"peft.adalora=true: {total_steps} steps are too few for its schedule; use at least 2"
        )
    return AdaLoraConfig(
        target_r=rank,
        init_r=-(-3 * rank // 2),
        tinit=total_steps // 10,
        tfinal=total_steps // 2,
        deltaT=max(1, total_steps // 100),
        total_step=total_steps,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT says int, and divides by r
        lora_dropout=config.lora_dropout,
        target_modules=list(targets),
        **settings,
    )


def add_adapter(model: Any, config: LoraConfig, seed: int, dtype: torch.dtype = torch.float32) -> PeftModel:
    """Adds PEFT's adapters with PEFT's own start (A Kaiming-uniform, B zero), seeded.

    Args:
        model: The pretrained model.
        config: Which adapters.
        seed: Of their start; the global random state is left alone.
        dtype: Of the adapters' weights; embeddings trained along are always float32.

    Raises:
        UserError: If PEFT would adapt other layers than the named ones.
    """
    wanted = set(config.target_modules or ())
    settle(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    found = {name.removeprefix(PREFIX) for name in lora_layers(adapted)}
    if found != wanted:
        odd = min(found ^ wanted)
        raise UserError(f"peft.lora_target_modules: ambiguous for {odd}; name the layers by their full names")
    _settle_dtypes(adapted, dtype)
    return adapted


def continue_adapter(
    model: Any, source: str, dtype: torch.dtype, probe: Callable[[Any], Tensor]
) -> tuple[PeftModel, InitReport]:
    """Adds an adapter that has been trained before, to be trained on.

    Args:
        model: The pretrained model that it was made for.
        source: A folder in PEFT's format, or a Hub id.
        dtype: Of the adapter's weights.
        probe: Logits of a model on a few examples.

    Raises:
        UserError: If it cannot be read, is no LoRA adapter, or does not fit the model.
    """
    check_adapter(source)
    settle(model)
    before = probe(model)
    with _naming(source), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, source, ADAPTER, is_trainable=True)
    _settle_dtypes(adapted, dtype)
    named = lora_layers(adapted)
    others = [name for name, layer in named.items() if why_unsupported(layer.get_base_layer()) is not None]
    if others or not named:
        what = f"adapts {others[0].removeprefix(PREFIX)}" if others else "adapts nothing"
        raise UserError(f"init.adapter={source}: {what}; adapters of linear layers can be trained on")
    layers = named.values()
    norms = [_product_norm(layer, ADAPTER) for layer in layers]
    ratios = [
        norm / max(weight_norm(layer.get_base_layer()), _TINY)
        for norm, layer in zip(norms, layers, strict=True)
    ]
    report = InitReport(
        product_norm=sum(norms) / len(norms),
        relative_product_norm=sum(ratios) / len(ratios),
        shift=None,
        weight_drift=0.0,
        logit_drift=_relative(probe(adapted), before),
    )
    return adapted, report


def check_adapter(source: str, key: str = "init.adapter", *, trained_on: bool = True) -> None:
    """Reads an adapter's config, and no weights.

    Args:
        source: Folder or Hub id.
        key: What named it.
        trained_on: Whether it is to be trained further, which AdaLoRA's is not.

    Raises:
        UserError: If it cannot be read, or is no LoRA adapter.
    """
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_path and not Path(source).expanduser().is_dir():
        raise UserError(f"{key}={source}: no such folder; give an adapter's folder or Hub id")
    with _naming(source, key):
        kind = peft.PeftConfig.from_pretrained(source)
    if not isinstance(kind, LoraConfig) or (trained_on and isinstance(kind, AdaLoraConfig)):
        raise UserError(f"{key}={source}: is no LoRA adapter but {kind.peft_type}")


@contextmanager
def _naming(source: str, key: str = "init.adapter") -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise UserError(f"{key}={source}: {' '.join(str(error).split())[:300]}") from error


def _settle_dtypes(adapted: PeftModel, dtype: torch.dtype) -> None:
    _keep_computing_in(adapted)
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data = parameter.data.float()
        elif re.search(r"\.lora_[A-Z]", name):
            parameter.data = parameter.data.to(dtype)


def _keep_computing_in(model: PeftModel) -> None:
    """Fits embeddings and head that are trained in float32 into a base of another dtype."""
    dtype = model.get_base_model().dtype
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        if not isinstance(end, ModulesToSaveWrapper):
            continue
        if isinstance(end.original_module, nn.Embedding):
            end.register_forward_hook(lambda _, __, output: output.to(dtype))
        else:
            end.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))


def lora_layers(model: PeftModel) -> dict[str, Any]:
    """PEFT's layers by full name, its own prefix included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def scalings(model: PeftModel, adapter: str = ADAPTER) -> dict[str, float]:
    """The adapters' s, by full layer name without PEFT's prefix."""
    return {name.removeprefix(PREFIX): layer.scaling[adapter] for name, layer in lora_layers(model).items()}


def weight_reader(model: PeftModel) -> Callable[[str], Tensor]:
    """A function that reads the base weight (out, in) of a layer, float32."""
    layers = lora_layers(model)
    return lambda name: read_weight(layers[PREFIX + name].get_base_layer())


@torch.no_grad()
def apply_init(
    model: PeftModel,
    inits: Mapping[str, AdapterInit],
    *,
    shift: str = "auto",
    adapter: str = ADAPTER,
    probe: Callable[[], Tensor] | None = None,
) -> InitReport:
    """Writes the factors into the adapters and, where a start asks for it, shifts the base.

    The shift is computed in float32 from the factors as stored, after their cast to the adapter's
    dtype, so that the adapter cancels it as exactly as the base's dtype allows. The magnitudes of DoRA
    become the row norms of what the layer now computes with.

    Args:
        model: The model with adapters whose B is zero.
        inits: Full layer name (without PEFT's prefix) to its start.
        shift: ``weight`` stores ``W - s B₀ A₀`` (quantised again where W is), ``adapter`` leaves W alone
            and subtracts ``s B₀ A₀ x`` from the layer's output; ``auto`` is ``adapter`` on a
            quantised base and ``weight`` elsewhere.
        adapter: Name of the adapter.
        probe: Computes logits of the model, to see what the start does to its function.

    Raises:
        UserError: If the shift cannot be kept in the adapter (DoRA).
    """
    before = probe() if probe else None
    layers = lora_layers(model)
    bases = [layers[PREFIX + name].get_base_layer() for name, init in inits.items() if init.shifts_base]
    separate_weights(model, [base for base in bases if shift_place(base, shift) == "weight"])
    norms, ratios, drifts = [], [], [0.0]
    places: set[str] = set()
    for name, init in inits.items():
        layer = layers[PREFIX + name]
        base = layer.get_base_layer()
        layer.lora_A[adapter].weight.copy_(init.A_RI)
        layer.lora_B[adapter].weight.copy_(init.B_OR)
        is_dora = adapter in getattr(layer, "lora_magnitude_vector", {})
        norms.append(_product_norm(layer, adapter))
        if init.shifts_base:
            if is_dora:
                check_dora(name, base, shift)
            places.add(shift_place(base, shift))
        if init.shifts_base and shift_place(base, shift) == "weight":
            A_RI, B_OR = _factors(layer, adapter)
            norm, drift = subtract_product(base, layer.scaling[adapter] * B_OR, A_RI)
            drifts.append(drift)
        else:
            norm = weight_norm(base)
        if init.shifts_base and shift_place(base, shift) == "adapter":
            _subtract_in_adapter(layer, adapter)
        ratios.append(norms[-1] / max(norm, _TINY))
        if is_dora:
            rows_O = torch.linalg.norm(read_weight(base) + _product(layer, adapter), dim=1)
            magnitude = layer.lora_magnitude_vector[adapter].weight
            magnitude.copy_(rows_O.view_as(magnitude))
    after = probe() if probe else None
    dropped = None
    if probe and places and _has_dropout(model, adapter):
        dropped = _relative(_with_dropout(model, adapter, probe), before)
    return InitReport(
        product_norm=sum(norms) / len(norms),
        relative_product_norm=sum(ratios) / len(ratios),
        shift="/".join(sorted(places)) or None,
        weight_drift=max(drifts),
        logit_drift=None if after is None else _relative(after, before),
        dropout_drift=dropped,
    )


def stored_init(
    model: PeftModel, inits: Mapping[str, AdapterInit], adapter: str = ADAPTER
) -> dict[str, AdapterInit]:
    """The starts as the adapters hold them now, after their cast to the adapter's dtype."""
    layers = lora_layers(model)

    def factor(kind: str, name: str) -> Tensor:
        return getattr(layers[PREFIX + name], kind)[adapter].weight.detach().cpu().clone()

    return {
        name: AdapterInit(factor("lora_A", name), factor("lora_B", name), init.shifts_base)
        for name, init in inits.items()
    }


def shift_place(base: nn.Module, shift: str) -> str:
    """Where the shift of a layer goes with ``shift``: ``weight`` or ``adapter``."""
    if shift == "auto":
        return "adapter" if quantisation(base) else "weight"
    return shift


def check_dora(name: str, base: nn.Module, shift: str) -> None:
    """Raises UserError if DoRA would read a norm that lacks the shift."""
    if shift_place(base, shift) == "adapter":
        raise UserError(
            f"{name}: DoRA needs the norm of the shifted weight, so the shift cannot be kept in the adapter; "
            "use shift=weight, or LoRA-One, which shifts nothing"
        )


def keeps_shift_in_adapter(model: PeftModel) -> bool:
    """Whether some layer subtracts its first adapter from its output."""
    return any(hasattr(module, _SHIFT[0]) for module in model.modules())


def _subtract_in_adapter(layer: Any, adapter: str) -> None:
    base = layer.get_base_layer()
    for buffer, factor in zip(_SHIFT, (layer.lora_A, layer.lora_B), strict=True):
        base.register_buffer(buffer, factor[adapter].weight.detach().clone(), persistent=False)
    base.register_forward_hook(partial(_subtract, layer.scaling[adapter]))


def _subtract(scaling: float, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    A_RI, B_OR = (getattr(layer, buffer) for buffer in _SHIFT)
    return output - (scaling * (inputs[0].to(A_RI.dtype) @ A_RI.T @ B_OR.T)).to(output.dtype)


def _factors(layer: Any, adapter: str = ADAPTER) -> tuple[Tensor, Tensor]:
    """A and B as stored, in float32."""
    return layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()


def _product(layer: Any, adapter: str = ADAPTER) -> Tensor:
    A_RI, B_OR = _factors(layer, adapter)
    return layer.scaling[adapter] * (B_OR @ A_RI)


def _product_norm(layer: Any, adapter: str) -> float:
    """``‖s B A‖_F``, from the small inner products."""
    A_RI, B_OR = _factors(layer, adapter)
    return layer.scaling[adapter] * ((B_OR.T @ B_OR) * (A_RI @ A_RI.T)).sum().clamp(min=0).sqrt().item()


def _relative(actual: Tensor, expected: Tensor | None) -> float:
    assert expected is not None
    return (actual - expected).norm().item() / max(expected.norm().item(), _TINY)


def _has_dropout(model: PeftModel, adapter: str) -> bool:
    return any(isinstance(layer.lora_dropout[adapter], nn.Dropout) for layer in lora_layers(model).values())


def _with_dropout(model: PeftModel, adapter: str, probe: Callable[[], Tensor]) -> Tensor:
    """What ``probe`` gives with the adapters' dropout on and all else in eval mode."""

    def drop(module: nn.Dropout, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        return nn.functional.dropout(inputs[0], module.p, training=True)

    handles = [
        layer.lora_dropout[adapter].register_forward_hook(drop) for layer in lora_layers(model).values()
    ]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return probe()
    finally:
        for handle in handles:
            handle.remove()


def _most_common(values: list[Any]) -> Any:
    return max(values, key=values.count)
