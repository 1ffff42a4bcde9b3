"""One look at a model in training: every family of probes that was asked for, at the weights as they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_one.adapters import shift_place
from lora_one.config import ExperimentConfig
from lora_one.data.batches import Batch
from lora_one.errors import UserError
from lora_one.fused import unfused
from lora_one.inits import AdapterInit
from lora_one.layers import quantisation, read_weight
from lora_one.losses import weighted_loss
from lora_one.modes import in_mode
from lora_one.probes import curvature, spectra, updates, variances
from lora_one.probes.changes import align
from lora_one.probes.kept import Trajectory, read_spaces, save_spaces, write_snapshot
from lora_one.probes.layers import Adapted, State, factors, find_layers, without_adapters
from lora_one.probes.passes import look_at_layers
from lora_one.probes.rows import Rows
from lora_one.probes.subspaces import Spaces, compare_factors, energy_between
from lora_one.triplets import leading_svd

FIRST_FILE = "probes.safetensors"
# How far storing a weight in low precision can take it, relative; another model's is as far as 1.
_ROUNDED_APART, _QUANTISED_APART = 0.02, 0.3
_LOSS_SCALE = 2.0**12  # of float16, as in the gradient estimate
States = Mapping[str, State]


class Looker:
    """Looks at a model; keeps what later looks are compared with.

    Args:
        config: The experiment.
        model: As it is trained, unwrapped, on its device.
        starts: The adapters' starts, by layer.
        batch: The fixed sample, on the model's device.
        folder: The run's folder.

    Raises:
        UserError: If ``probes.reference`` cannot be compared with.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        model: Any,
        starts: Mapping[str, AdapterInit],
        batch: Batch,
        folder: Path,
    ) -> None:
        self.config, self.settings = config, config.probes
        self.model, self.batch, self.folder = model, batch, folder
        self.layers = find_layers(model, starts)
        # Only a start that shifts no base moves the model, and DoRA's magnitudes move it too.
        self._start_moves = any(not start.shifts_base for start in starts.values()) and not any(
            layer.is_dora for layer in self.layers.values()
        )
        self._first: dict[str, Spaces] = {}
        self._previous: tuple[int, States] | None = None
        self._reference: Trajectory | None = None
        if self.settings.reference is not None and config.peft.use_peft:
            shapes = {layer.name: layer.shape for layer in self.layers.values()}
            self._reference = Trajectory(self.settings.reference, shapes)
            self._check_base(self._reference)

    def go_on(self) -> None:
        """Takes up what an interrupted start of the run has kept."""
        self._first = read_spaces(self.folder / FIRST_FILE, self._device)

    def states(self) -> dict[str, State]:
        """What is trained of every layer, as it is now."""
        return {path: layer.state() for path, layer in self.layers.items()}

    def look(self, step: int, after: States | None, optimizer: Any, clipped_to: float = 1.0) -> Rows:
        """All figures at the weights as they are.

        Args:
            step: Optimiser steps that led here.
            after: The states that the next step led to, if one was taken.
            optimizer: That of the training.
            clipped_to: What clipping leaves of the gradients these days, as a share.
        """
        rows, now, asked = Rows(layer.name for layer in self.layers.values()), self.states(), self.settings
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), unfused(self.model):
            if asked.update and step == 0 and self._start_moves:
                self._at_the_start(now, rows)
            if asked.update or asked.subspaces or asked.variance:
                self._in_the_layers(step, now, after, rows)
            if asked.spectrum:
                self._spectra(now, rows)
            if self._reference is not None and step in self._reference.steps:
                self._beside_reference(self._reference, step, now, rows)
            if asked.curvature:
                found = self._curvature(optimizer, clipped_to)
                rows.totals |= {f"curvature/{key}": value for key, value in found.items()}
        if asked.snapshots:
            weights = {layer.name: now[path].W_OI for path, layer in self.layers.items()}
            write_snapshot(self.folder, step, weights)
        return rows

    @property
    def _device(self) -> torch.device:
        return self.batch["input_ids"].device

    def _check_base(self, reference: Trajectory) -> None:
        """Raises UserError if the reference began with other weights; looks at the last layer."""
        layer = list(self.layers.values())[-1]
        base = layer.module.get_base_layer()
        W_OI, first_OI = read_weight(base), reference.weight(layer.name, 0).to(self._device)
        if layer.start is not None and shift_place(base, self.config.init.shift) == "weight":
            _, _, scaling = factors(layer.state())
            W_OI += (scaling * (layer.start.B_OR @ layer.start.A_RI)).to(W_OI)
        apart = float((W_OI - first_OI).norm() / first_OI.norm())
        if apart > (_QUANTISED_APART if quantisation(base) else _ROUNDED_APART):
            raise UserError(
                f"probes.reference={self.settings.reference}: began with other weights than this run "
                f"({layer.name} is {apart:.0%} away); use a run of the same model"
            )

    def _run(self, look: Any) -> None:
        scale = _LOSS_SCALE if self.config.model.fp16 else 1.0
        look_at_layers(self.model, list(self.layers), self.batch, look, scale=scale)

    def _in_the_layers(self, step: int, now: States, after: States | None, rows: Rows) -> None:
        """What needs a layer's input and the gradient of its output."""
        if step == 0:
            self._first = {}

        def look(path: str, x_NI: Tensor, delta_NO: Tensor) -> None:
            layer, state = self.layers[path], now[path]
            if self.settings.variance and layer.has_factors:
                figures = variances.variance_figures(*factors(state), x_NI, delta_NO)
                rows.add(layer.name, "variance", figures)
            if not (self.settings.update or self.settings.subspaces):
                return
            G_OI, rank = delta_NO.T @ x_NI, layer.rank or self.config.peft.lora_r
            U_OK, S_K, V_IK = leading_svd(G_OI, 2 * rank)
            spaces = Spaces(U_OK, V_IK)
            if self.settings.update:
                best = updates.best_cosine(S_K, float(G_OI.double().square().sum()))
                rows.add(layer.name, "update", {"best_cosine": best})
                if after is not None:
                    self._step(layer, state, after[path], G_OI, spaces, rows)
            if self.settings.subspaces and layer.has_factors:
                if step == 0:
                    self._first[layer.name] = spaces
                self._spaces(layer, state, G_OI, spaces, rows)

        self._run(look)
        if step == 0 and self.settings.subspaces:
            save_spaces(self._first, self.folder / FIRST_FILE)

    def _step(
        self, layer: Adapted, before: State, after: State, G_OI: Tensor, spaces: Spaces, rows: Rows
    ) -> None:
        change = layer.change(before, after)
        for key, part in updates.compare_update(change, G_OI).items():
            rows.align(layer.name, f"update/{key}", part)
        rank = layer.rank or self.config.peft.lora_r
        rows.add(layer.name, "update", updates.compare_spaces(change, spaces, rank))

    def _spaces(self, layer: Adapted, state: State, G_OI: Tensor, spaces: Spaces, rows: Rows) -> None:
        A_RI, B_OR, _ = factors(state)
        first = self._first.get(layer.name)
        figures = compare_factors(A_RI, B_OR, spaces, first)
        figures["energy_now"] = energy_between(G_OI, spaces, len(A_RI))
        if first is not None:
            figures["energy_first"] = energy_between(G_OI, first, len(A_RI))
        rows.add(layer.name, "subspaces", figures)

    def _at_the_start(self, now: States, rows: Rows) -> None:
        """A start that is itself a step, beside the gradient at the pretrained weights."""

        def look(path: str, x_NI: Tensor, delta_NO: Tensor) -> None:
            name, (A_RI, B_OR, scaling), G_OI = self.layers[path].name, factors(now[path]), delta_NO.T @ x_NI
            rows.align(name, "start/cosine_gradient", updates.compare_start(A_RI, B_OR, scaling, G_OI))
            energy = float(G_OI.double().square().sum())
            best = updates.best_cosine(leading_svd(G_OI, len(A_RI))[1], energy)
            rows.add(name, "start", {"best_cosine": best})

        with without_adapters(self.layers):
            self._run(look)

    def _spectra(self, now: States, rows: Rows) -> None:
        for path, layer in self.layers.items():
            if layer.has_factors:
                figures = spectra.spectrum_figures(*factors(now[path]), layer.moved(now[path]))
                rows.add(layer.name, "spectrum", figures)

    def _beside_reference(self, reference: Trajectory, step: int, now: States, rows: Rows) -> None:
        for path, layer in self.layers.items():
            moved, M_OI = layer.moved(now[path]), reference.moved(layer.name, step).to(self._device)
            part = align(moved, M_OI)
            rows.align(layer.name, "trajectory/cosine", part)
            if layer.rank is not None and part.second_sq:
                U_OK, _, V_IK = leading_svd(M_OI, layer.rank)
                figures = updates.compare_spaces(moved, Spaces(U_OK, V_IK), layer.rank)
                rows.add(layer.name, "trajectory", figures)
            if self._previous is not None:
                since, states = self._previous
                M_OI = reference.moved(layer.name, step, since).to(self._device)
                change = layer.change(states[path], now[path])
                rows.align(layer.name, "trajectory/cosine_since", align(change, M_OI))
        self._previous = step, now

    def _curvature(self, optimizer: Any, clipped_to: float) -> dict[str, float | None]:
        """Of the sample's loss in all that is trained."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        n = sum(parameter.numel() for parameter in parameters)
        start_P = torch.randn(n, generator=torch.Generator().manual_seed(self.config.seed))
        start_P = start_P.to(parameters[0].device)
        choice, figures = self.config.optimizer, dict[str, float | None]()
        # The fast attention kernels cannot be differentiated twice.
        with in_mode(self.model, training=False), sdpa_kernel([SDPBackend.MATH]), torch.enable_grad():
            multiply = curvature.hessian_product(weighted_loss(self.model, self.batch), parameters)
            found = curvature.lanczos(multiply, start_P, self.settings.products)
            momentum = choice.momentum if choice.name == "sgd" else 0.0
            figures |= {"top": found.top, "bottom": found.bottom, "error": found.error}
            figures["sgd_rate_limit"] = curvature.rate_limit(found.top, momentum)
            scale_P = curvature.adam_scale(optimizer, parameters) if choice.name == "adamw" else None
            if scale_P is not None:
                # Adam's moments are of clipped gradients, and so is what it multiplies.
                multiply = curvature.preconditioned(multiply, clipped_to * scale_P)
                found = curvature.lanczos(multiply, start_P, self.settings.products)
                figures["adam_top"], figures["adam_error"] = found.top, found.error
                figures["adam_rate_limit"] = curvature.adam_rate_limit(found.top, choice.beta1)
        return figures
