"""What probes keep on disk: weights on the way of full fine-tuning, and the first gradient's spaces."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_one.errors import UserError
from lora_one.files import to_disk
from lora_one.probes.subspaces import Spaces

FOLDER = "snapshots"


def write_snapshot(folder: Path, step: int, weights: Mapping[str, Tensor | None]) -> None:
    """Keeps the weights (out, in) by layer name as they are before optimiser step ``step``."""
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    partial = place / "partial"
    save_file({name: W.detach().cpu().contiguous() for name, W in weights.items() if W is not None}, partial)
    to_disk(partial)
    partial.replace(place / f"step-{step:07d}.safetensors")


class Trajectory:
    """The snapshots of one run, read when they are asked for.

    Attributes:
        steps: At which there is one; the first is 0.
    """

    def __init__(self, run_folder: str, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Finds the snapshots.

        Args:
            run_folder: Of the full fine-tuning run.
            shapes: The layers that will be asked for, and their (out, in).

        Raises:
            UserError: If there are none from step 0 on, or a layer is not in them, or has another shape.
        """
        self._key = f"probes.reference={run_folder}"
        files = sorted((Path(run_folder) / FOLDER).glob("step-*.safetensors"))
        self._files = {int(file.stem.split("-")[1]): file for file in files}
        if 0 not in self._files:
            raise UserError(
                f"{self._key}: holds no snapshots from step 0 on; make them with peft=full_ft "
                "probes.snapshots=true"
            )
        self.steps = frozenset(self._files)
        self._check(shapes)

    def moved(self, name: str, step: int, since: int = 0) -> Tensor:
        """What a layer's weight (out, in) has moved by between two steps, float32 on the CPU."""
        return self.weight(name, step) - self.weight(name, since)

    def weight(self, name: str, step: int) -> Tensor:
        """A layer's weight (out, in) at a step, float32 on the CPU."""
        with self._open(step) as file:
            return file.get_tensor(name).float()

    def _open(self, step: int) -> safe_open:
        try:
            return safe_open(self._files[step], framework="pt")
        except (SafetensorError, OSError):
            raise UserError(f"{self._files[step]}: damaged; make the run again, or use another") from None

    def _check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        with self._open(0) as file:
            known = set(file.keys())
            for name, shape in shapes.items():
                if name not in known:
                    raise UserError(f"{self._key}: has no layer {name}; use a run of the same model")
                found = tuple(file.get_slice(name).get_shape())
                if found != tuple(shape):
                    raise UserError(
                        f"{self._key}: {name} is {found} there and {tuple(shape)} here; use a run of the "
                        "same model"
                    )


def save_spaces(spaces: Mapping[str, Spaces], path: Path) -> None:
    """Keeps the first gradient's singular spaces, by layer name, for a run that goes on later."""
    tensors = {f"{name}.U": own.U_OK.contiguous().cpu() for name, own in spaces.items()}
    tensors |= {f"{name}.V": own.V_IK.contiguous().cpu() for name, own in spaces.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


def read_spaces(path: Path, device: torch.device) -> dict[str, Spaces]:
    """What ``save_spaces`` kept; nothing where the training began without these probes.

    Raises:
        UserError: If the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            names = [key.removesuffix(".U") for key in file.keys() if key.endswith(".U")]  # noqa: SIM118
            return {n: Spaces(file.get_tensor(f"{n}.U"), file.get_tensor(f"{n}.V")) for n in names}
    except (SafetensorError, OSError):
        raise UserError(f"{path}: damaged; remove it to go on without the first gradient's spaces") from None
