"""The layers that are looked at: adapted ones, or the linear layers of full fine-tuning."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Conv1d, Embedding, ParamWrapper
from torch import Tensor, nn

from lora_one.adapters import ADAPTER, PREFIX, lora_layers
from lora_one.inits import AdapterInit
from lora_one.layers import read_weight, shape_OI, to_OI
from lora_one.models import linear_layers
from lora_one.probes.changes import Change, Dense, LowRank


@dataclass(frozen=True)
class State:
    """What is trained of one layer; tensors that nobody writes to.

    Attributes:
        A_RI: ``lora_A``, float32; None in full fine-tuning.
        B_OR: ``lora_B``.
        scaling: s.
        magnitude_O: DoRA's.
        W_OI: The weight itself in full fine-tuning.
    """

    A_RI: Tensor | None = None
    B_OR: Tensor | None = None
    scaling: float = 1.0
    magnitude_O: Tensor | None = None
    W_OI: Tensor | None = None


class Adapted:
    """A linear layer with an adapter, or without one where its weight is trained.

    Attributes:
        name: Without PEFT's prefix.
        path: Full name in the model.
        start: The first factors, where their product was taken off the base, or None.
    """

    def __init__(self, path: str, module: Any, start: AdapterInit | None = None) -> None:
        self.path = path
        self.name = path.removeprefix(PREFIX)
        self.module = module
        self.has_factors = hasattr(module, "lora_A")
        self.start = start if start is not None and start.shifts_base else None

    @property
    def rank(self) -> int | None:
        """r; None in full fine-tuning."""
        return int(self.module.lora_A[ADAPTER].weight.shape[0]) if self.has_factors else None

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input features."""
        return shape_OI(self.module.get_base_layer() if self.has_factors else self.module)

    @property
    def is_dora(self) -> bool:
        """Whether a magnitude is trained beside the factors."""
        return self.has_factors and ADAPTER in getattr(self.module, "lora_magnitude_vector", {})

    def state(self) -> State:
        """As it is now. The tensors are the parameters' own data where they are float32."""
        if not self.has_factors:
            return State(W_OI=to_OI(self.module, self.module.weight.data).float())
        A_RI, B_OR = (side[ADAPTER].weight.data.float() for side in (self.module.lora_A, self.module.lora_B))
        magnitude = None
        if self.is_dora:
            magnitude = self.module.lora_magnitude_vector[ADAPTER].weight.data.float().flatten()
        return State(A_RI, B_OR, float(self.module.scaling[ADAPTER]), magnitude)

    def change(self, before: State, after: State) -> Change:
        """What two states differ by in the weight that the layer computes with."""
        if after.W_OI is not None and before.W_OI is not None:
            return Dense(after.W_OI - before.W_OI)
        if after.magnitude_O is not None:
            W_OI = read_weight(self.module.get_base_layer())
            return Dense(_with_dora(W_OI, after) - _with_dora(W_OI, before))
        return _product_change(before, after)

    def moved(self, now: State) -> LowRank:
        """What the factors have done to the pretrained weight: ``s (B A - B₀ A₀)``, or ``s B A``."""
        A_RI, B_OR, scaling = factors(now)
        if self.start is None:
            return LowRank(scaling * B_OR, A_RI)
        started = State(self.start.A_RI.to(A_RI), self.start.B_OR.to(B_OR), scaling)
        return _product_change(started, now)


def factors(state: State) -> tuple[Tensor, Tensor, float]:
    """``A_RI``, ``B_OR`` and s of an adapted layer."""
    assert state.A_RI is not None and state.B_OR is not None
    return state.A_RI, state.B_OR, state.scaling


def find_layers(model: Any, starts: Mapping[str, AdapterInit]) -> dict[str, Adapted]:
    """The layers by full path: those with LoRA's two factors, or else all linear ones that are trained."""
    adapted = {
        path: Adapted(path, layer, starts.get(path.removeprefix(PREFIX)))
        for path, layer in lora_layers(model).items()
        if isinstance(layer.lora_A, nn.ModuleDict)
        and ADAPTER in layer.lora_A
        and not isinstance(layer, Embedding | Conv1d | ParamWrapper)
    }
    if adapted:
        return adapted
    return {
        path: Adapted(path, layer)
        for path, layer in linear_layers(model).items()
        if layer.weight.requires_grad
    }


def _product_change(before: State, after: State) -> LowRank:
    """``s (B' A' - B A)``, but not as that difference, in which a small step would drown in rounding."""
    (A_RI, B_OR, _), (new_A_RI, new_B_OR, scaling) = factors(before), factors(after)
    left_OK = torch.cat([new_B_OR - B_OR, B_OR], dim=1)
    return LowRank(scaling * left_OK, torch.cat([new_A_RI, new_A_RI - A_RI]))


def _with_dora(W_OI: Tensor, state: State) -> Tensor:
    """The weight that DoRA computes with."""
    (A_RI, B_OR, scaling), magnitude_O = factors(state), state.magnitude_O
    assert magnitude_O is not None
    V_OI = W_OI + scaling * (B_OR @ A_RI)
    return V_OI * (magnitude_O / torch.linalg.vector_norm(V_OI, dim=1))[:, None]


class Held:
    """Copies of all trained parameters, to look at a step from where it began after it was taken."""

    def __init__(self, model: nn.Module) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._pairs = [(parameter, parameter.data.clone()) for parameter in trained]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters are the copies; afterwards the very same tensors as before."""
        now = [parameter.data for parameter, _ in self._pairs]
        try:
            for parameter, copy in self._pairs:
                parameter.data = copy
            yield
        finally:
            for (parameter, _), data in zip(self._pairs, now, strict=True):
                parameter.data = data


@contextmanager
def without_adapters(layers: Mapping[str, Adapted]) -> Iterator[None]:
    """Inside, every B is zero: starts that shift no base then compute the pretrained function."""
    factors = [layer.module.lora_B[ADAPTER].weight for layer in layers.values()]
    now = [factor.data for factor in factors]
    try:
        for factor in factors:
            factor.data = torch.zeros_like(factor.data)
        yield
    finally:
        for factor, data in zip(factors, now, strict=True):
            factor.data = data
