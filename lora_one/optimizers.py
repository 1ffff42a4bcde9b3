"""The optimisers by name: torch's own, and those that precondition the gradients of LoRA factors.

Moments, bias correction, momentum and decay are torch's functions, which are handed preconditioned gradients.
Factors are paired by the layer that holds them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.optim.sgd import sgd

from lora_one.config import ExperimentConfig
from lora_one.errors import UserError
from lora_one.preconditioners import (
    LORA_PRO_DAMPING,
    PAPER_DAMPING,
    Chunk,
    FactorPair,
    Form,
    Grams,
    Stacks,
    Workspace,
    damped_grams,
    float32,
    group_pairs,
    mixing,
    parts_of,
    preconditioned,
)

_GroupOf = dict[int, dict[str, Any]]  # a parameter's id to its group
_Groups = list[list[FactorPair]]  # of one rank, by shape


def optimizer_class(config: ExperimentConfig, model: nn.Module) -> tuple[type[torch.optim.Optimizer], dict]:
    """The class that the config names, and its settings but the parameters.

    Raises:
        UserError: If it needs LoRA factors and there are none.
    """
    choice = config.optimizer
    settings: dict[str, Any] = {"lr": config.model.learning_rate}
    if choice.name in ("sgd", "scaled_gd"):
        settings["momentum"] = choice.momentum
    else:
        settings |= {"betas": (choice.beta1, choice.beta2), "eps": choice.eps}
    if choice.name == "adamw":
        settings["fused"] = True
    if choice.is_preconditioned:
        settings |= {"pairs": factor_pairs(model), "damping": config.damping}
    if choice.name in ("scaled_gd", "scaled_adamw"):
        settings["form"] = choice.form
    return _CLASSES[choice.name], settings


def loraplus_optimizer(
    config: ExperimentConfig, model: Any, kind: type[torch.optim.Optimizer], settings: dict[str, Any]
) -> torch.optim.Optimizer:
    """What ``optimizer_class`` gave, with LoRA+'s larger learning rate for B; the groups are PEFT's."""
    return create_loraplus_optimizer(
        model,
        kind,
        loraplus_lr_ratio=config.peft.loraplus_lr_ratio,
        loraplus_weight_decay=config.model.weight_decay,
        **settings,
    )


def factor_pairs(model: nn.Module) -> list[FactorPair]:
    """The LoRA factors of a PEFT model's active adapters, layer by layer.

    Raises:
        UserError: If there are none, half a pair is trained, two layers share one, or one is no matrix.
    """
    pairs: list[FactorPair] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for adapter in layer.active_adapters:
            if adapter not in layer.lora_A or not isinstance(layer.lora_A, nn.ModuleDict):
                continue  # an embedding's factors, or AdaLoRA's
            A_RI, B_OR = (side[adapter].get_parameter("weight") for side in (layer.lora_A, layer.lora_B))
            if A_RI.requires_grad != B_OR.requires_grad:
                raise UserError(f"{name}: only one of its LoRA factors is trained; preconditioners need both")
            if A_RI.ndim != 2 or isinstance(layer, ParamWrapper):
                raise UserError(f"{name}: its LoRA factors are no pair of matrices; use optimizer=adamw")
            if A_RI.requires_grad:
                pairs.append(FactorPair(name, A_RI, B_OR, float(layer.scaling[adapter])))
    if not pairs:
        raise UserError("no LoRA factors are trained; use an adapter (peft=all), or optimizer=adamw")
    owners: dict[int, str] = {}
    for pair in pairs:
        for factor in (pair.A_RI, pair.B_OR):
            other = owners.setdefault(id(factor), pair.name)
            if other != pair.name:
                raise UserError(f"{pair.name}: shares a LoRA factor with {other}; use optimizer=adamw")
    return pairs


def n_escalated(optimizer: Any) -> int | None:
    """How many r x r matrices have needed more damping than δ; None of an optimiser without preconditioners.

    Args:
        optimizer: One of those here, as it is or wrapped by Accelerate.
    """
    groups = [] if optimizer is None else optimizer.param_groups
    return int(groups[0]["n_escalated"]) if groups and "n_escalated" in groups[0] else None


class _FactorOptimizer(torch.optim.Optimizer):
    """Steps along preconditioned gradients of the factors, and along plain ones of what else is trained.

    No ``grad`` is touched. The state is in the shape of torch's own optimiser of that rule.
    """

    def __init__(
        self, params: Any, pairs: Sequence[FactorPair], damping: float, form: Form, defaults: dict[str, Any]
    ) -> None:
        super().__init__(params, defaults)
        self.pairs, self.damping, self.form = list(pairs), damping, form
        # In a group, so that it is saved and loaded with the state.
        self.param_groups[0].setdefault("n_escalated", 0)
        self._factors = {id(factor): pair for pair in self.pairs for factor in (pair.A_RI, pair.B_OR)}
        given = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        for factor, pair in self._factors.items():
            if factor not in given:
                raise UserError(f"{pair.name}: a LoRA factor of its pair is not among the parameters")
        self._workspace, self._stacks = Workspace(), Stacks(self.pairs)

    def __getstate__(self) -> Any:
        raise TypeError("cannot be copied or pickled; make another one and load this one's state_dict")

    def free_workspace(self) -> None:
        """Gives back the few MB of memory that are kept from step to step."""
        self._workspace = Workspace()

    def _begin_step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Called once a step, with all that ``_update`` will be given in it."""

    def _update(self, group: dict[str, Any], parameters: list[Any], gradients: list[Tensor]) -> None:
        """The step of some parameters of one group, device and dtype along these gradients."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; all preconditioners are of the factors before it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group_of = {id(parameter): group for group in self.param_groups for parameter in group["params"]}
        batches = group_pairs(
            self.pairs, lambda pair: (id(group_of[id(pair.A_RI)]), id(group_of[id(pair.B_OR)]))
        )
        self._begin_step([p for group in self.param_groups for p in group["params"] if p.grad is not None])
        for groups in batches:
            grams, n_escalated = damped_grams(groups, self.damping, self._stacks)
            self.param_groups[0]["n_escalated"] = self.param_groups[0].get("n_escalated", 0) + n_escalated
            for chunk in self._preconditioned(groups, grams, group_of):
                self._step_factors(chunk, group_of)
        for group in self.param_groups:
            others = [p for p in group["params"] if p.grad is not None and id(p) not in self._factors]
            if others and not batches:
                raise UserError(
                    "no LoRA factor has a gradient, but other parameters have: the optimiser was made for "
                    "factors that are trained no more; make it after loading and set_adapter"
                )
            self._along(others, [p.grad for p in others], group_of)
        return loss

    def _preconditioned(self, groups: _Groups, grams: Grams, group_of: _GroupOf) -> Iterator[Chunk]:
        one_by_one = self._one_by_one(grams.of_A_PRR.device)
        yield from preconditioned(groups, grams, self.form, self._workspace, one_by_one=one_by_one)

    def _one_by_one(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def _step_factors(self, chunk: Chunk, group_of: _GroupOf) -> None:
        """Both sides at once where they are of one parameter group, since each call has its price."""
        factors_A, factors_B = [pair.A_RI for pair in chunk.pairs], [pair.B_OR for pair in chunk.pairs]
        grads_A, grads_B = _cast(chunk.grads_A, factors_A[0]), _cast(chunk.grads_B, factors_B[0])
        of_A, of_B = group_of[id(factors_A[0])], group_of[id(factors_B[0])]
        if of_A is of_B and factors_A[0].dtype is factors_B[0].dtype:
            self._update(of_A, factors_A + factors_B, grads_A + grads_B)
        else:
            self._update(of_A, factors_A, grads_A)
            self._update(of_B, factors_B, grads_B)

    def _along(self, parameters: list[Any], gradients: list[Any], group_of: _GroupOf) -> None:
        alike: dict[Any, tuple[list[Any], list[Tensor]]] = {}
        for parameter, gradient in zip(parameters, gradients, strict=True):
            key = id(group_of[id(parameter)]), parameter.device, parameter.dtype
            found = alike.setdefault(key, ([], []))
            found[0].append(parameter)
            found[1].append(gradient)
        for chosen, own in alike.values():
            self._update(group_of[id(chosen[0])], chosen, own)


class ScaledGD(_FactorOptimizer):
    """Scaled gradient descent (arXiv 2402.02347): ``B ← B - η g_B (A Aᵀ + δI)⁻¹`` and its mirror.

    Args:
        params: Parameters or groups of them, as of ``torch.optim.SGD``.
        pairs: The factors among them, from ``factor_pairs``.
        lr: η.
        damping: δ.
        form: ``classic``, ``symmetric`` or ``sylvester``; see ``preconditioners``.
        momentum: Of the preconditioned gradients.
        weight_decay: Decoupled.
    """

    def __init__(
        self,
        params: Any,
        pairs: Sequence[FactorPair],
        *,
        lr: float,
        damping: float = PAPER_DAMPING,
        form: Form = "classic",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, pairs, damping, form, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        )

    def _update(self, group: dict[str, Any], parameters: list[Any], gradients: list[Tensor]) -> None:
        for parameter in parameters if group["weight_decay"] else ():
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        buffers = [self.state[p].get("momentum_buffer") for p in parameters]
        sgd(
            parameters,
            gradients,
            buffers,
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        if group["momentum"]:
            for parameter, buffer in zip(parameters, buffers, strict=True):
                self.state[parameter]["momentum_buffer"] = buffer


class ScaledAdamW(_FactorOptimizer):
    """Scaled AdamW (arXiv 2402.02347): both moments are of the preconditioned gradient.

    Args:
        params: Parameters or groups of them, as of ``torch.optim.AdamW``.
        pairs: The factors among them, from ``factor_pairs``.
        lr: Learning rate.
        damping: δ.
        form: ``classic``, ``symmetric`` or ``sylvester``; see ``preconditioners``.
        betas: Of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.
    """

    def __init__(
        self,
        params: Any,
        pairs: Sequence[FactorPair],
        *,
        lr: float,
        damping: float = PAPER_DAMPING,
        form: Form = "classic",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        # "fused" also tells torch to keep the step counts as tensors on the device when a state is loaded.
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        super().__init__(params, pairs, damping, form, defaults)

    def _begin_step(self, parameters: Sequence[nn.Parameter]) -> None:
        if parameters:
            torch._foreach_add_([self._state_of(parameter)["step"] for parameter in parameters], 1)

    def _update(self, group: dict[str, Any], parameters: list[Any], gradients: list[Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        # What torch's own AdamW calls, without its sorting by device and dtype.
        torch._fused_adamw_(
            parameters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


class LoraPro(ScaledAdamW):
    """LoRA-Pro with AdamW (arXiv 2407.18242), as released.

    The moments are of the equivalent gradient ``s (B g̃_A + g̃_B A)``, (out, in) for each layer: as much memory
    as in full fine-tuning. Adam's direction is then brought back to the factors by the *sylvester* form.

    Args:
        params: Parameters or groups of them, as of ``torch.optim.AdamW``.
        pairs: The factors among them, from ``factor_pairs``.
        lr: Learning rate.
        damping: δ.
        settings: As of ``ScaledAdamW``, but no form.
    """

    def __init__(
        self,
        params: Any,
        pairs: Sequence[FactorPair],
        *,
        lr: float,
        damping: float = LORA_PRO_DAMPING,
        **settings: Any,
    ) -> None:
        super().__init__(params, pairs, lr=lr, damping=damping, form="sylvester", **settings)

    def _preconditioned(self, groups: _Groups, grams: Grams, group_of: _GroupOf) -> Iterator[Chunk]:
        parts = [part for group in groups for part in parts_of(group, one_by_one=True)]
        for row, part in enumerate(parts):
            (pair,), own = part.pairs, grams.at(row)
            group, s = group_of[id(pair.B_OR)], pair.scaling
            products = part.grad_A @ part.A.T / s**2, part.B.T @ part.grad_B / s**2
            one_sided = mixing(own, "one_sided", *products)
            grad_A_RI = one_sided.of_A(part.A, part.grad_A / s**2)
            grad_B_OR = one_sided.of_B(part.B, part.grad_B / s**2)
            G_OI = self._adam(pair.B_OR, s * (part.B @ grad_A_RI + grad_B_OR @ part.A), group)
            grad_A_RI, grad_B_OR = part.B.T @ G_OI / s, G_OI @ part.A.T / s
            back = mixing(own, "sylvester", grad_A_RI @ part.A.T, part.B.T @ grad_B_OR)
            yield Chunk([pair], [back.of_A(part.A, grad_A_RI)], [back.of_B(part.B, grad_B_OR)])

    def _begin_step(self, parameters: Sequence[nn.Parameter]) -> None:
        super()._begin_step([parameter for parameter in parameters if id(parameter) not in self._factors])

    def _step_factors(self, chunk: Chunk, group_of: _GroupOf) -> None:
        for pair, grad_A_RI, grad_B_OR in zip(*chunk, strict=True):
            for factor, direction in ((pair.A_RI, grad_A_RI), (pair.B_OR, grad_B_OR)):
                group = group_of[id(factor)]
                factor.mul_(1 - group["lr"] * group["weight_decay"])
                factor.add_(direction.to(factor.dtype), alpha=-group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the moments of factors keep their float32."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(parameters, indices, strict=True):
            if id(parameter) in self._factors and index in state_dict["state"]:
                for name, value in state_dict["state"][index].items():
                    self.state[parameter][name] = value.to(parameter.device, torch.float32, copy=True)

    def _adam(self, key: nn.Parameter, G_OI: Tensor, group: dict[str, Any]) -> Tensor:
        """Adam's direction for the equivalent gradient; its moments are kept with the factor B."""
        state = self.state[key]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=G_OI.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(G_OI), torch.zeros_like(G_OI)
        (beta1, beta2), first, second = (
            group["betas"],
            float32(state["exp_avg"]),
            float32(state["exp_avg_sq"]),
        )
        state["step"] += 1
        state["exp_avg"] = first.lerp_(G_OI, 1 - beta1)
        state["exp_avg_sq"] = second.mul_(beta2).addcmul_(G_OI, G_OI, value=1 - beta2)
        step = float(state["step"])
        root_OI = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        return (first / (1 - beta1**step)).div_(root_OI)


def _cast(gradients: Sequence[Tensor], factor: nn.Parameter) -> list[Tensor]:
    """Float32 gradients in the factor's own precision."""
    if factor.dtype is torch.float32:
        return list(gradients)
    return [gradient.to(factor.dtype) for gradient in gradients]


_CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "scaled_gd": ScaledGD,
    "scaled_adamw": ScaledAdamW,
    "lora_pro": LoraPro,
}
