"""Weight gradients of chosen layers, summed over backward passes that somebody else runs.

Layers with plain weights: autograd's own gradient of the weight, which counts every use of it, taken
away as soon as it is made. Quantised layers have no such gradient, and that of sharded ones is spread over
the processes; theirs is ``Σ δᵀ x`` over the positions, from the layer's input ``x`` and the gradient ``δ``
of its output.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_one.errors import UserError
from lora_one.layers import quantisation, settle, shape_OI, to_OI


class Calls:
    """What the backward passes of a recording reached.

    Attributes:
        n_calls: Calls of the model whose output took part in a backward pass.
        reached: Names of the layers that received a gradient.
    """

    def __init__(self) -> None:
        self.n_calls = 0
        self.reached: set[str] = set()


class GradientSums(Calls):
    """What the backward passes inside ``collect_gradients`` left.

    Attributes:
        G_OI: Layer name to the summed gradient, float32, on the CPU or the layer's device. Layers that share
            one weight share one tensor.
        is_finite: Whether every entry that has been added was finite.
    """

    def __init__(self, *, offload: bool = True) -> None:
        super().__init__()
        self.G_OI: dict[str, Tensor] = {}
        self.is_finite = True
        self._offload = offload

    def begin(self, names: Sequence[str], layer: Any) -> None:
        """Makes room for the weight that the layers share."""
        device = "cpu" if self._offload or layer.weight.is_meta else layer.weight.device
        G_OI = torch.zeros(shape_OI(layer), dtype=torch.float32, device=device)
        self.G_OI |= dict.fromkeys(names, G_OI)

    def add(self, names: Sequence[str], G_OI: Tensor) -> None:
        """Adds one batch's gradient of the weight that the layers share."""
        self.is_finite &= bool(torch.isfinite(G_OI.sum(dtype=torch.float32)))
        sum_OI = self.G_OI[names[0]]
        sum_OI.add_(G_OI.to(device=sum_OI.device, dtype=torch.float32))
        self.reached.update(names)

    def unique(self) -> list[Tensor]:
        """Every tensor once."""
        return list({id(tensor): tensor for tensor in self.G_OI.values()}.values())


@contextmanager
def collect_gradients(
    model: Any, targets: Sequence[str], *, dropout: bool = False, offload: bool = True
) -> Iterator[GradientSums]:
    """Sums the gradients of the targets' weights while the caller runs forward and backward passes.

    Inside, nothing but the targets' weights takes a gradient. Each is taken away and added up in float32
    as soon as it is made, so that ``zero_grad`` between two batches loses nothing. Everything is as before
    afterwards.

    Args:
        model: The pretrained model, without adapters; on any device, quantised, sharded or neither.
        targets: Names of linear layers.
        dropout: Whether the model's dropout is on (train mode) or off (eval mode), whatever the caller sets.
        offload: Whether the sums lie on the CPU; at most one gradient lives on the device then.
    """
    sums = GradientSums(offload=offload)
    with _recording(model, targets, lambda: _watch(model, targets, sums), dropout):
        yield sums


@contextmanager
def watch_activations(
    model: Any,
    targets: Sequence[str],
    add: Callable[[str, Tensor, Tensor], None],
    *,
    dropout: bool = False,
) -> Iterator[Calls]:
    """Hands every target's inputs and output gradients to ``add`` while the caller runs passes.

    No weight takes a gradient. Everything is as before afterwards.

    Args:
        model: The pretrained model, without adapters.
        targets: Names of linear layers.
        add: Receives the layer's name, its input (positions, in) and the gradient of its output
            (positions, out), both float32 on the layer's device.
        dropout: As in ``collect_gradients``.
    """
    calls = Calls()

    def hand_on(name: str, x_NI: Tensor, delta_NO: Tensor) -> None:
        calls.reached.add(name)
        add(name, x_NI, delta_NO)

    def hooks() -> Iterator[Any]:
        yield _count_calls(model, calls)
        yield from _watch_activations(model, targets, hand_on)

    with _recording(model, targets, hooks, dropout):
        yield calls


@contextmanager
def _recording(
    model: Any, targets: Sequence[str], hooks: Callable[[], Iterator[Any]], dropout: bool
) -> Iterator[None]:
    """Sets hooks on a frozen model, and puts everything back.

    Gradients go down to the first targets and no further, but for re-entrant checkpointing, which gives none
    to what is made of no input with one.
    """
    settle(model)
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with ExitStack() as stack:
            stack.enter_context(_train_mode(model) if dropout else _no_dropout(model))
            model.requires_grad_(False)
            if not targets or getattr(model, "is_gradient_checkpointing", False):
                for module in model.modules():
                    if isinstance(module, nn.Embedding):
                        stack.callback(module.register_forward_hook(_begin_graph).remove)
            for handle in hooks():
                stack.callback(handle.remove)
            yield
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        for parameter, grad in kept:
            parameter.grad = grad
        for module, mode in modes:
            module.training = mode


def _watch_activations(
    model: Any, targets: Sequence[str], add: Callable[[str, Tensor, Tensor], None]
) -> Iterator[Any]:
    for name in targets:
        yield from _watch_layer(name, model.get_submodule(name), partial(add, name))


def _watch(model: Any, targets: Sequence[str], sums: GradientSums) -> Iterator[Any]:
    """Sets the hooks; yields their handles as they are made."""
    yield _count_calls(model, sums)
    by_weight: dict[int, list[str]] = {}
    for name in targets:
        by_weight.setdefault(id(model.get_submodule(name).weight), []).append(name)
    watched: dict[str, list[str]] = {}
    for names in by_weight.values():
        layer = model.get_submodule(names[0])
        if _has_own_gradient(layer):
            yield _from_autograd(layer, names, sums)
        else:
            sums.begin(names, layer)
            watched |= dict.fromkeys(names, names)
    shared = shared_elsewhere(model, list(watched))
    if shared is not None:
        raise UserError(
            f"{shared[0]}: shares its weight with {shared[1]}, whose part of the gradient cannot be seen "
            "while the weight is sharded, offloaded or quantised; leave it out of the target modules"
        )

    def add(name: str, x_NI: Tensor, delta_NO: Tensor) -> None:
        sums.add(watched[name], delta_NO.T @ x_NI)

    yield from _watch_activations(model, list(watched), add)


def shared_elsewhere(model: Any, targets: Sequence[str]) -> tuple[str, str] | None:
    """A target and a layer that is none but has the same weight, such as the embedding of a tied head."""
    owners = {id(model.get_submodule(name).weight): name for name in targets}
    own = {id(model.get_submodule(name)) for name in targets}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in owners and id(module) not in own:
                return owners[id(parameter)], name
    return None


def _has_own_gradient(layer: Any) -> bool:
    return quantisation(layer) is None and not isinstance(layer.weight, DTensor) and not layer.weight.is_meta


def _from_autograd(layer: Any, names: Sequence[str], sums: GradientSums) -> Any:
    sums.begin(names, layer)

    def move(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None  # the hook runs when it has just been made
        sums.add(names, to_OI(layer, parameter.grad))
        parameter.grad = None

    layer.weight.grad = None
    layer.weight.requires_grad_(True)
    return layer.weight.register_post_accumulate_grad_hook(move)


class _Hold(torch.autograd.Function):
    """Saves a layer's input as autograd saves its own: checkpointing drops it and makes it again.

    A node beside the way of the gradients. On it, one of Python costs some per cent of a pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        """``anchor`` takes a gradient, so that there is a node where ``x`` takes none."""
        ctx.save_for_backward(x)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        """Never runs: nothing is made of the output."""


def _made_by_layer(output: Tensor) -> Tensor:
    """The tensor behind a view of all of it: changing the view in place would cut off a hook on the view."""
    base = output._base
    if base is None or not base.requires_grad or base.numel() != output.numel():
        return output
    return base if base.shape[-1] == output.shape[-1] else output


def _watch_layer(name: str, layer: Any, add: Callable[[Tensor, Tensor], None]) -> Iterator[Any]:
    """Hands ``add`` the layer's input and its output's gradient in every backward pass."""
    anchor = torch.empty(0, requires_grad=True)

    def after(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        begun = None if output.requires_grad else _begun(output)
        held = [_Hold.apply(inputs[0], anchor)]
        _made_by_layer(output if begun is None else begun).register_hook(_handing_on(name, held, add))
        return begun

    yield layer.register_forward_hook(after)


def _begun(output: Tensor) -> Tensor:
    """The graph begins here: the gradient of what lies below is nobody's. No leaf: those bear no changes."""
    return output + output.new_zeros((), requires_grad=True)


def _handing_on(
    name: str, held: list[Tensor], add: Callable[[Tensor, Tensor], None]
) -> Callable[[Tensor], None]:
    def note(delta: Tensor) -> None:
        if not held:
            raise UserError(
                f"{name}: a second backward pass through the same forward pass; add the losses up and run one"
            )
        (x,) = held.pop().grad_fn.saved_tensors  # type: ignore[union-attr]  # made with an anchor
        with _no_autocast(delta.device.type):
            x_NI, delta_NO = (part.detach().flatten(0, -2).float() for part in (x, delta))
            add(x_NI.to(delta.device), delta_NO)

    return note


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Float32 inside; entering ``autocast`` where there is none to leave costs as much as a small product."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _count_calls(model: nn.Module, calls: Calls) -> Any:
    def watch(_: nn.Module, __: Any, output: Any) -> None:
        counted: list[bool] = []

        def count(_: Tensor) -> None:
            if not counted:
                counted.append(True)
                calls.n_calls += 1

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(count)

    return model.register_forward_hook(watch)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def _begin_graph(_: nn.Module, __: Any, output: Tensor) -> None:
    """Frozen weights alone make no graph, nor does re-entrant gradient checkpointing without one."""
    if torch.is_grad_enabled() and output.is_leaf and output.is_floating_point():
        output.requires_grad_(True)


@contextmanager
def _train_mode(model: Any) -> Iterator[None]:
    """Train mode whatever the caller sets."""

    def settle_modes(*_: Any) -> None:
        model.train()

    settle_modes()
    handle = model.register_forward_pre_hook(settle_modes)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _no_dropout(model: Any) -> Iterator[None]:
    """Eval mode whatever the caller sets, and no dropout in layers that checkpoint themselves.

    Those do so in train mode only; some of them call dropout as a function of that mode.
    """
    dropout = nn.functional.dropout

    def settle_modes(*_: Any) -> None:
        checkpoints = getattr(model, "is_gradient_checkpointing", False)
        for module in model.modules():
            module.training = checkpoints and isinstance(module, GradientCheckpointingLayer)

    settle_modes()
    handle = model.register_forward_pre_hook(settle_modes)
    nn.functional.dropout = lambda input, *_, **__: input
    try:
        yield
    finally:
        nn.functional.dropout = dropout
        handle.remove()
