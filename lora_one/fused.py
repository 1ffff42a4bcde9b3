"""PEFT's LoRA layers with fewer passes over the activations: the same sums, in training only.

PEFT computes ``x Wᵀ``, ``x Aᵀ``, ``(x Aᵀ) Bᵀ``, times s, plus the first, and autograd as many steps back.
Here the second product is added in place while it is made, s is taken on the rank-sized side, and the
gradient of x is summed in the same way: nothing of the activations' size is written twice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_one.adapters import ADAPTER, lora_layers
from lora_one.config import ModelConfig
from lora_one.errors import UserError


@contextmanager
def faster(model: Any, config: ModelConfig) -> Iterator[None]:
    """Inside, the model trains by compiled blocks (``model.compile``), or else by fused adapters.

    Raises:
        UserError: If the blocks cannot be compiled here.
    """
    with compiled_blocks(model) if config.compile else fused_adapters(model):
        yield


@contextmanager
def compiled_blocks(model: Any) -> Iterator[None]:
    """Inside, the model's blocks are compiled: those alike once, and what is between them stays as it is.

    Raises:
        UserError: If they cannot be compiled here.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in blocks:
        block.compile(dynamic=True)
    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.compile=true: {reason}; use model.compile=false") from error
    finally:
        for block in blocks:
            block._compiled_call_impl = None


@contextmanager
def fused_adapters(model: Any) -> Iterator[int]:
    """Inside, the LoRA layers that can be are computed in fused steps; gives their number.

    Those are plain linear layers with frozen weights and one LoRA adapter without dropout. The others
    (quantised, DoRA, with dropout, with hooks of their own) stay PEFT's, as does all of a layer but its
    ``forward``.
    """
    layers = [layer for layer in lora_layers(model).values() if _can_be_fused(layer)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def unfused(model: Any) -> Iterator[None]:
    """Inside, fused layers and compiled blocks compute as PEFT and the model do, which hooks and a second
    differentiation can follow.
    """
    fused = [
        (layer, vars(layer)["forward"]) for layer in lora_layers(model).values() if "forward" in vars(layer)
    ]
    blocks = [module for module in model.modules() if getattr(module, "_compiled_call_impl", None)]
    compiled = [(block, block._compiled_call_impl) for block in blocks]
    try:
        for layer, _ in fused:
            del layer.forward
        for block, _ in compiled:
            block._compiled_call_impl = None
        yield
    finally:
        for layer, forward in fused:
            layer.forward = forward
        for block, call in compiled:
            block._compiled_call_impl = call


def _can_be_fused(layer: Any) -> bool:
    base = layer.get_base_layer()
    if type(layer) is not LoraLinear or type(base) is not nn.Linear or layer.active_adapters != [ADAPTER]:
        return False
    parts = (base, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.lora_dropout[ADAPTER])
    has_hooks = any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or "forward" in vars(part)
        for part in parts
    )
    return not (
        has_hooks
        or any(parameter.requires_grad for parameter in base.parameters())
        or ADAPTER in layer.lora_variant
        or layer.lora_bias[ADAPTER]
        or not isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
    )


def _forward(layer: Any, x: Tensor, *arguments: Any, **settings: Any) -> Tensor:
    W_OI, bias_O = layer.base_layer.weight, layer.base_layer.bias
    A_RI, B_OR = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, A_RI, B_OR = x.to(dtype), A_RI.to(dtype), B_OR.to(dtype)
    is_usual = layer.active_adapters == [ADAPTER] and not (layer.disable_adapters or layer.merged)
    # Sharded weights are gathered by hooks of the layers that hold them.
    is_whole = W_OI.ndim == A_RI.ndim == 2 and not isinstance(W_OI, DTensor)
    is_plain = is_usual and is_whole and x.ndim > 1 and not arguments and not settings
    if not is_plain or not x.dtype == W_OI.dtype == A_RI.dtype:
        return LoraLinear.forward(layer, x, *arguments, **settings)
    return _LinearWithLora.apply(x, W_OI, bias_O, A_RI, B_OR, layer.scaling[ADAPTER])


class _LinearWithLora(torch.autograd.Function):
    """``x Wᵀ + bias + s (x Aᵀ) Bᵀ``; W and the bias take no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, scaling: float
    ) -> Tensor:
        x_NI = x.flatten(0, -2)
        # In x's own shape: a view of another tensor could not be changed in place, as some models do.
        y = nn.functional.linear(x, W_OI, bias_O)
        h_NR = (x_NI @ A_RI.T).mul_(scaling)
        y.flatten(0, -2).addmm_(h_NR, B_OR.T)
        ctx.save_for_backward(x_NI, h_NR, W_OI, A_RI, B_OR)
        ctx.scaling, ctx.shape = scaling, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, h_NR, W_OI, A_RI, B_OR = ctx.saved_tensors
        delta_NO = delta.flatten(0, -2)
        delta_NR = (delta_NO @ B_OR).mul_(ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (delta_NO @ W_OI).addmm_(delta_NR, A_RI).view(ctx.shape)
        dA_RI = delta_NR.T @ x_NI if ctx.needs_input_grad[3] else None
        dB_OR = delta_NO.T @ h_NR if ctx.needs_input_grad[4] else None
        return dx, None, None, dA_RI, dB_OR, None
