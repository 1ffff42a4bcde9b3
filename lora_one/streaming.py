"""The streaming estimators: sketches of every target's gradient, summed over a sample's batches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_one.collect import watch_activations
from lora_one.errors import UserError
from lora_one.layers import shape_OI
from lora_one.processes import Processes
from lora_one.sketch import LayerSketch, SketchedGradient, SketchSize

# Runs one batch forward and backward, and gives its loss.
RunBatch = Callable[[Any], float]


@dataclass(frozen=True)
class StreamedGradients:
    """Per target what its sketch knows, and the summed loss of this process's batches."""

    layers: dict[str, SketchedGradient]
    loss: float


def stream_gradients(
    model: Any,
    targets: Sequence[str],
    passes: Callable[[], Iterable[Any]],
    warm_up: Sequence[Any],
    run_batch: RunBatch,
    *,
    size: SketchSize,
    two_passes: bool,
    seed: int,
    processes: Processes,
) -> StreamedGradients:
    """Sketches the gradients of the targets' weights; no (out, in) matrix is formed.

    Args:
        model: The pretrained model, without adapters; quantised or not.
        targets: Names of linear layers.
        passes: Begins a pass over this process's share of the sample; called twice with ``two_passes``.
        warm_up: The first few batches of the whole sample, the same on every process; their gradient
            chooses the sketches' directions.
        run_batch: Runs a batch forward and backward.
        size: Columns of the sketches.
        two_passes: Whether a second pass finds the exact coefficients in the basis of the first.
        seed: Of the random parts.
        processes: Who shares the work.

    Raises:
        UserError: If a target shares its weight with a layer that is none, or gets no gradient.
    """
    rough = _new_sketches(model, targets, size, seed + 1)
    alone = replace(processes, rank=0, world_size=1)
    # A second pass over so few examples is cheap, and finds better directions.
    found, _ = _sketch(model, targets, rough, lambda: warm_up, run_batch, two_passes=True, processes=alone)
    sketches = _new_sketches(model, targets, size, seed)
    for name, sketch in sketches.items():
        if not sketch.is_started:
            device = rough[name].Y_OC.device
            sketch.start(found[name].U_OK.to(device), found[name].V_IK.to(device))
            processes.from_main_(sketch.omega_IC, sketch.psi_OL)
    layers, loss = _sketch(
        model, targets, sketches, passes, run_batch, two_passes=two_passes, processes=processes
    )
    return StreamedGradients(layers, loss)


def _sketch(
    model: Any,
    targets: Sequence[str],
    sketches: Mapping[str, LayerSketch],
    passes: Callable[[], Iterable[Any]],
    run_batch: RunBatch,
    *,
    two_passes: bool,
    processes: Processes,
) -> tuple[dict[str, SketchedGradient], float]:
    """Fills the sketches from one pass or two, and solves them."""
    loss = _pass(model, targets, passes(), run_batch, lambda name, x, d: sketches[name].add(x, d))
    unique = list({id(sketch): sketch for sketch in sketches.values()}.values())
    for name, sketch in sketches.items():
        if not sketch.is_started:
            raise UserError(f"{name}: no gradient reached it; leave it out of peft.lora_target_modules")
    for sketch in unique:
        processes.sum_(sketch.Y_OC)
        processes.sum_(sketch.Z_LI)
    exact: dict[int, Tensor] = {}
    if two_passes:
        bases = {id(sketch): sketch.basis() for sketch in unique}
        exact = {id(s): torch.zeros_like(s.Z_LI[: bases[id(s)].shape[1]]) for s in unique}

        def project(name: str, x_NI: Tensor, delta_NO: Tensor) -> None:
            key = id(sketches[name])
            exact[key].addmm_((delta_NO @ bases[key]).T, x_NI)

        _pass(model, targets, passes(), run_batch, project)
        for coefficients_KI in exact.values():
            processes.sum_(coefficients_KI)
    solved = {id(sketch): sketch.solve(exact.get(id(sketch))) for sketch in unique}
    return {name: solved[id(sketches[name])] for name in targets}, loss


def _new_sketches(model: Any, targets: Sequence[str], size: SketchSize, seed: int) -> dict[str, LayerSketch]:
    """One sketch a weight: layers that share one share the sketch."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: model.get_submodule(name).weight for name in targets}
    own = {id(model.get_submodule(name)) for name in targets}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            shared = next((target for target, weight in weights.items() if weight is parameter), None)
            if shared is not None and id(module) not in own:
                raise UserError(
                    f"{shared}: shares its weight with {name}, whose part of the gradient a streaming "
                    "estimator does not see; use init.estimator=exact"
                )
    by_weight: dict[int, LayerSketch] = {}
    for name, weight in weights.items():
        if id(weight) not in by_weight:
            by_weight[id(weight)] = LayerSketch(shape_OI(model.get_submodule(name)), size, generator)
    return {name: by_weight[id(weight)] for name, weight in weights.items()}


def _pass(
    model: Any,
    targets: Sequence[str],
    batches: Iterable[Any],
    run_batch: RunBatch,
    add: Callable[[str, Tensor, Tensor], None],
) -> float:
    with watch_activations(model, targets, add):
        return sum(run_batch(batch) for batch in batches)
