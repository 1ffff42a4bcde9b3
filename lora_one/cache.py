"""What is known of a model's gradients, on disk: the library's ``cache_file``, one file for one model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_one.errors import UserError
from lora_one.inits import ALIASES
from lora_one.objectives import AdamFactors
from lora_one.starts import GradientStart, LayerEstimate
from lora_one.triplets import Triplets

_FORMAT = "lora-one gradients 3"
_SAMPLE = "weight_sample"
# Layer name to the numbers that go with its tensors.
Numbers = Mapping[str, list[float]]


def save_estimates(
    path: Path,
    layers: Mapping[str, LayerEstimate],
    start: dict[str, Any],
    samples: Mapping[str, Tensor],
) -> None:
    """Writes the estimates in one piece, as safetensors whatever the file is called.

    ``start`` is the ``identity`` of what they are made for, ``samples`` a few entries of some weights, to
    know the model by.
    """
    tensors, numbers = pack_layers(layers)
    tensors |= {f"{name}/{_SAMPLE}": sample for name, sample in samples.items()}
    metadata = {"format": _FORMAT, "start": json.dumps(start), "numbers": json.dumps(numbers)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_whole(path, tensors, metadata)


def load_estimates(path: Path, start: dict[str, Any]) -> tuple[dict[str, LayerEstimate], dict[str, Tensor]]:
    """Reads what ``save_estimates`` wrote: the estimates, and the samples of the weights.

    Raises:
        UserError: If the file is damaged, or made with another objective or estimator.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(
                    f"{path}: not written by this version of lora_one; delete it, or give another cache_file"
                )
            stored, numbers = json.loads(metadata["start"]), json.loads(metadata["numbers"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, and it is made again") from None
    for key, value in start.items():
        if stored.get(key) != value:
            raise UserError(
                f"{path}: made with {key}={stored.get(key)}, but {key}={value} is asked for; "
                "give another cache_file"
            )
    ending = f"/{_SAMPLE}"
    samples = {key.removesuffix(ending): value for key, value in tensors.items() if key.endswith(ending)}
    return unpack_layers(tensors, numbers), samples


def pack_layers(layers: Mapping[str, LayerEstimate]) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """The estimates as flat tensors and numbers."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, list[float]] = {}
    for name, layer in layers.items():
        if isinstance(layer, Triplets):
            parts = {"U_OK": layer.U_OK, "S_K": layer.S_K, "V_IK": layer.V_IK}
            numbers[name] = [layer.norm]
        else:
            parts = {"A_RI": layer.A_RI, "B_OR": layer.B_OR}
            numbers[name] = [layer.before, layer.after]
        tensors |= {f"{name}/{key}": tensor.contiguous() for key, tensor in parts.items()}
    return tensors, numbers


def unpack_layers(tensors: Mapping[str, Tensor], numbers: Numbers) -> dict[str, LayerEstimate]:
    """The estimates again.

    Raises:
        KeyError: If a tensor is missing.
    """
    return {name: _layer(name, tensors, values) for name, values in numbers.items()}


def save_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], suffix: str = "") -> None:
    """Writes a safetensors file in one piece; what is being written ends in ``suffix`` and ``.partial``."""
    partial = path.with_name(f"{path.name}{suffix}.partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _layer(name: str, tensors: Mapping[str, Any], numbers: list[float]) -> LayerEstimate:
    if f"{name}/A_RI" in tensors:
        return AdamFactors(tensors[f"{name}/A_RI"], tensors[f"{name}/B_OR"], *numbers)
    U_OK, S_K, V_IK = (tensors[f"{name}/{part}"] for part in ("U_OK", "S_K", "V_IK"))
    return Triplets(U_OK, S_K, V_IK, numbers[0])


def identity(start: GradientStart, estimator: str) -> dict[str, Any]:
    """What of the settings the stored numbers depend on; triplets serve every direction and scale."""
    if start.objective != "adam":
        return {"objective": start.objective, "estimator": estimator}
    direction = ALIASES.get(start.direction, start.direction)
    return {"objective": start.objective, "direction": direction, "seed": start.seed}
