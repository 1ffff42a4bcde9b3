"""The streaming estimators: a sketch of every target's gradient, filled by passes that somebody runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lora_one.collect import Calls, shared_elsewhere, watch_activations
from lora_one.errors import UserError
from lora_one.layers import shape_OI
from lora_one.processes import Processes
from lora_one.sketch import OnePassSketch, SketchedGradient, SketchSize, TwoPassSketch, groups_of

Sketch = TypeVar("Sketch", OnePassSketch, TwoPassSketch)


class Sketches(Generic[Sketch]):
    """The sketches of all targets; layers that share one weight share the sketch."""

    def __init__(self, by_name: dict[str, Sketch]) -> None:
        self.by_name: dict[str, Sketch] = by_name
        self.unique: list[Sketch] = list({id(sketch): sketch for sketch in by_name.values()}.values())
        self.calls = Calls()

    def are_finite(self) -> bool:
        """Whether every number that has been added was finite."""
        return all(sketch.seems_finite() for sketch in self.unique)

    def finish(self, processes: Processes) -> dict[str, SketchedGradient]:
        """What the sketches know, summed over the processes.

        Raises:
            UserError: If a gradient is not finite, or has reached a target on no process.
        """
        bad = [name for name, sketch in self.by_name.items() if not sketch.is_finite()]
        if int(processes.sum_(torch.tensor(len(bad)))) > 0:
            where = bad[0] if bad else "a target on another process"
            raise UserError(f"{where}: its gradient is not finite; check the data, or compute in float32")
        solved: dict[int, SketchedGradient] = {}
        for group in groups_of(self.unique, processes):
            found_in_group = type(group[0]).finish(group, processes)
            solved |= {id(sketch): one for sketch, one in zip(group, found_in_group, strict=True)}
        found = {name: solved[id(sketch)] for name, sketch in self.by_name.items()}
        for name, gradient in found.items():
            if gradient.n_positions == 0:
                raise UserError(f"{name}: no gradient reached it; leave it out of the target modules")
        return found


@contextmanager
def one_pass(
    model: Any, targets: Sequence[str], size: SketchSize, *, seed: int, dropout: bool = False
) -> Iterator[Sketches[OnePassSketch]]:
    """Sketches the gradients of the targets' weights while the caller runs forward and backward passes.

    Args:
        model: The pretrained model, without adapters; quantised, sharded or neither.
        targets: Names of linear layers.
        size: Columns of the sketches.
        seed: Of the random parts; the same on every process.
        dropout: Whether the model's dropout is on.

    Raises:
        UserError: If a target shares its weight with a layer that is none.
    """
    sketches = Sketches(_new_sketches(model, targets, size, seed, OnePassSketch))
    aimed_after = 0

    def begin_batch(*_: Any) -> None:
        nonlocal aimed_after
        n_batches = sketches.calls.n_calls
        if n_batches == aimed_after or not _is_due(n_batches) or not torch.is_grad_enabled():
            return
        aimed_after = n_batches  # 1, 2, 4, 8, ...
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            for group in groups_of(sketches.unique):
                OnePassSketch.aim(group)

    handle = model.register_forward_pre_hook(begin_batch)
    try:
        with watch_activations(model, targets, _adding(sketches, "add"), dropout=dropout) as sketches.calls:
            yield sketches
    finally:
        handle.remove()


def two_passes(
    model: Any,
    targets: Sequence[str],
    size: SketchSize,
    *,
    seed: int,
    run_pass: Callable[[Sketches[TwoPassSketch], Callable[[int], None]], None],
    processes: Processes,
    dropout: bool = False,
) -> Sketches[TwoPassSketch]:
    """Sketches the gradients of the targets' weights in two passes over the same batches.

    Args:
        model: The pretrained model, without adapters; quantised, sharded or neither.
        targets: Names of linear layers.
        size: Columns of the sketches.
        seed: Of the random parts.
        run_pass: Runs this process's batches forward and backward, at least one, and calls its second
            argument with the number of batches done after each.
        processes: Who shares the sample.
        dropout: Whether the model's dropout is on; both passes must draw the same.

    Raises:
        UserError: If a target shares its weight with a layer that is none.
    """
    sketches = Sketches(_new_sketches(model, targets, size, seed, TwoPassSketch))

    def after_batch(number: int) -> None:
        if number == 1:
            for group in groups_of(sketches.unique, processes):
                TwoPassSketch.aim(group, processes)

    with watch_activations(model, targets, _adding(sketches, "add"), dropout=dropout):
        run_pass(sketches, after_batch)
    for group in groups_of(sketches.unique, processes):
        TwoPassSketch.end_first_pass(group, processes)
    with watch_activations(model, targets, _adding(sketches, "project"), dropout=dropout):
        run_pass(sketches, lambda number: None)
    return sketches


def _is_due(n_batches: int) -> bool:
    return n_batches.bit_count() == 1


def _adding(sketches: Sketches[Any], method: str) -> Callable[[str, Tensor, Tensor], None]:
    return lambda name, x_NI, delta_NO: getattr(sketches.by_name[name], method)(x_NI, delta_NO)


def _new_sketches(
    model: Any, targets: Sequence[str], size: SketchSize, seed: int, kind: type[Sketch]
) -> dict[str, Sketch]:
    """One sketch a weight: layers that share one share the sketch."""
    shared = shared_elsewhere(model, targets)
    if shared is not None:
        raise UserError(
            f"{shared[0]}: shares its weight with {shared[1]}, whose part of the gradient a streaming "
            "estimator does not see; use the exact one (init.estimator=exact)"
        )
    generator = torch.Generator().manual_seed(seed)
    by_weight: dict[int, Sketch] = {}
    found = {}
    for name in targets:
        layer = model.get_submodule(name)
        if id(layer.weight) not in by_weight:
            by_weight[id(layer.weight)] = kind(shape_OI(layer), size, generator)
        found[name] = by_weight[id(layer.weight)]
    return found
