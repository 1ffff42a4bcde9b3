"""The layers that take an adapter, seen alike: ``nn.Linear``, GPT-2's ``Conv1D``, 4-bit and 8-bit linears."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Entries of a weight that are worked on at once.
_SLICE = 2**22
_TINY = 1e-30
_QUANTISED = {"Linear4bit": "4bit", "Linear8bitLt": "8bit"}


def quantisation(layer: nn.Module) -> str | None:
    """``"4bit"`` or ``"8bit"`` for a bitsandbytes layer, None for one with plain weights."""
    for kind in type(layer).__mro__:
        if kind.__module__.startswith("bitsandbytes") and kind.__name__ in _QUANTISED:
            return _QUANTISED[kind.__name__]
    return None


def why_unsupported(layer: nn.Module) -> str | None:
    """Why a layer cannot take an adapter of ours, or None where it can."""
    kind = type(layer).__name__
    if isinstance(layer, nn.Embedding):
        return (
            f"it is an embedding ({kind}); train embeddings along with train_embeddings (or modules_to_save)"
        )
    if not isinstance(layer, (nn.Linear, Conv1D)):
        return f"it is no linear layer but {kind}"
    if quantisation(layer) is None and layer.weight.dtype not in _PLAIN:
        return (
            f"its weights are {layer.weight.dtype}, a quantisation other than bitsandbytes' 4-bit and 8-bit"
        )
    return None


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer can take an adapter of ours."""
    return why_unsupported(layer) is None


def shape_OI(layer: Any) -> tuple[int, int]:
    """Output and input features, however the weight is stored."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features


def to_OI(layer: nn.Module, stored: Tensor) -> Tensor:
    """A tensor laid out as the layer's weight, as (out, in): ``Conv1D`` keeps it transposed."""
    return stored.T if isinstance(layer, Conv1D) else stored


@torch.no_grad()
def read_weight(layer: Any) -> Tensor:
    """The weight (out, in), dequantised, in float32 on the layer's device; a copy.

    That of a sharded layer is gathered: all processes must ask for it.
    """
    if isinstance(layer.weight, DTensor):
        return to_OI(layer, layer.weight.full_tensor()).to(torch.float32, copy=True)
    if quantisation(layer) is None:
        return to_OI(layer, layer.weight).to(torch.float32, copy=True)
    _settle_layer(layer)
    return dequantize_module_weight(layer).detach().to(torch.float32, copy=True)


@torch.no_grad()
def write_weight(layer: Any, W_OI: Tensor) -> None:
    """Stores a float32 weight (out, in) in the layer's own layout, dtype and quantisation."""
    kind, weight = quantisation(layer), layer.weight
    if kind is None:
        weight.copy_(to_OI(layer, W_OI))
    elif kind == "4bit":
        layer.weight = type(weight)(
            W_OI.to(weight.quant_state.dtype).cpu(),
            requires_grad=False,
            blocksize=weight.blocksize,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
            module=layer,
        ).to(weight.device)
    else:
        layer.weight = type(weight)(W_OI.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
        layer.state.reset_grads()
        layer.state.CB = layer.state.SCB = None


@torch.no_grad()
def subtract_product(layer: Any, B_OR: Tensor, A_RI: Tensor) -> tuple[float, float]:
    """Stores ``W - B A`` in the layer's own layout, dtype and quantisation; float32 in between.

    Plain weights go through in slices of rows, so that no second weight is made.

    Returns:
        ``‖W‖_F``, and ``‖what is stored - (W - B A)‖_F / ‖W‖_F``; of float32 weights a bound of it.
    """
    if layer.weight.dtype == torch.float32 and quantisation(layer) is None:
        norm = weight_norm(layer)
        to_OI(layer, layer.weight).addmm_(B_OR, A_RI, alpha=-1)
        return norm, torch.finfo(torch.float32).eps
    if quantisation(layer) is not None:
        W_OI = read_weight(layer)
        norm = torch.linalg.vector_norm(W_OI).item()
        W_OI.sub_(B_OR @ A_RI)
        write_weight(layer, W_OI)
        return norm, torch.linalg.vector_norm(read_weight(layer) - W_OI).item() / max(norm, _TINY)
    stored_OI, norms = to_OI(layer, layer.weight), []
    n_rows = max(1, _SLICE // stored_OI.shape[1])
    for begin in range(0, len(stored_OI), n_rows):
        slice_OI = stored_OI[begin : begin + n_rows]
        wanted_OI = slice_OI.float()
        norms.append(torch.linalg.vector_norm(wanted_OI))
        wanted_OI.sub_(B_OR[begin : begin + n_rows] @ A_RI)
        slice_OI.copy_(wanted_OI)
        norms.append(torch.linalg.vector_norm(slice_OI.float().sub_(wanted_OI)))
    norm, error = torch.stack(norms).view(-1, 2).norm(dim=0).tolist()
    return norm, error / max(norm, _TINY)


@torch.no_grad()
def weight_norm(layer: Any) -> float:
    """``‖W‖_F``, of the dequantised weight where it is quantised."""
    if quantisation(layer) is not None:
        return torch.linalg.vector_norm(read_weight(layer)).item()
    if layer.weight.dtype != torch.float32 or isinstance(layer.weight, DTensor):
        return torch.linalg.vector_norm(layer.weight, dtype=torch.float32).item()
    parts = layer.weight.detach().flatten().split(2**26)  # whose lengths add up, in twice the precision
    return math.sqrt(sum(torch.dot(part, part).item() for part in parts))  # twice as fast as vector_norm


def settle(model: nn.Module) -> None:
    """Makes quantised layers fit to be read, moved and differentiated, after whatever passes they saw.

    The first forward pass of bitsandbytes moves the scales of 8-bit weights away from the weight, and
    moving the weight, even to the device where it is already, loses them then. For inference on some
    CPUs it repacks 4-bit weights; those can neither be read nor differentiated, and compute in bfloat16.
    """
    for layer in model.modules():
        _settle_layer(layer)


def _settle_layer(layer: Any) -> None:
    kind = quantisation(layer)
    if kind == "8bit" and layer.state.CB is not None and layer.state.SCB is not None:
        layer.weight.CB, layer.weight.SCB = layer.state.CB, layer.state.SCB
    if kind == "4bit" and layer.weight.device.type == "cpu":
        layer.support_avx512bf16_for_cpu = False
        state = layer.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            layer.state_dict()  # bitsandbytes puts the weights back in order before it hands them out,
            state = layer.weight.quant_state
            if not state.nested:  # but not their scales, which it leaves transposed
                state.absmax = state.absmax.T.reshape(-1).float()


def separate_weights(model: nn.Module, layers: Sequence[Any]) -> None:
    """Gives each of ``layers`` a weight of its own where it shares one with another (tied embeddings)."""
    owners = Counter(
        id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False)
    )
    for layer in layers:
        weight = layer.weight
        if owners[id(weight)] > 1:
            owners[id(weight)] -= 1
            layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
