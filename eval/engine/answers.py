"""Answers kept while an evaluation runs, so that a killed one goes on from what is there."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
import torch
from accelerate.utils import align_module_device
from peft.tuners.lora import LoraLayer
from torch import Tensor

from lora_one.errors import UserError
from lora_one.processes import Processes

_DIGITS = 16
_BLOCK = 16_384
_BLOCKS_AT_ONCE = {"cpu": 4}  # what its cache holds: five times faster than 64
_MOST_BLOCKS_AT_ONCE = 1_024
# Of configs: where a model comes from, and how it was trained or begun.
_WITHOUT_EFFECT = {
    "_name_or_path",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "peft_version",
    "revision",
    "transformers_version",
    "use_cache",
}


class AnswerStore:
    """What has been answered under some settings: JSON lines, each process appending to a file of its own.

    Answers that were made under other settings lie in other files, whose names have another digest. What
    the main process reads at the start decides for all; a line that a kill tore in two does not count.

        with AnswerStore(request.folder, {"prompts": digest_of(prompts)}, subject.processes) as store:
            for index in mine:
                if index not in store.known:
                    store.add(index, answer(index))

    Attributes:
        known: Index to answer, as they were there at the start; alike on all processes.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], processes: Processes) -> None:
        """Reads what is there; every process has to come here.

        Args:
            folder: Where; None: nothing is kept.
            settings: All that an answer depends on, as JSON.
            processes: Who answers.

        Raises:
            UserError: If the folder cannot be written.
        """
        self.known: dict[int, Any] = {}
        self._file: TextIO | None = None
        if folder is None:
            return
        name = f"answers-{digest_of(settings)}"
        if processes.is_main:
            for path in sorted(folder.glob(f"{name}-*.jsonl")):
                self.known |= _read(path)
        self.known = processes.from_main(self.known)
        path = folder / f"{name}-{processes.rank}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot write answers there ({error.strerror})") from None
        # A line that was torn by a kill stays one of its own.
        self._write({"settings": dict(settings)} if is_new else None)

    def add(self, index: int, answer: Any) -> None:
        """Keeps an answer, which can be written as JSON, at once."""
        self._write({"index": index, "answer": answer})

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "AnswerStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, row: dict[str, Any] | None) -> None:
        if self._file is not None:
            self._file.write(("" if row is None else json.dumps(row, ensure_ascii=False)) + "\n")
            self._file.flush()


def digest_of(value: Any) -> str:
    """Hex digest of anything that can be written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def weights_digest(model: torch.nn.Module) -> str:
    """Hex digest of a model as it stands: all weights, the adapters and how they are scaled, the config.

    Weights enter by sums of their bits, each times a number that belongs to its place. That is exact
    integer arithmetic, so fast on every device and the same on all of them; it tells models and moments of
    a training apart, and is no signature. Weights that were moved out of the way are read where they are.

    Raises:
        UserError: If the model has weights that were never loaded.
    """
    digest = hashlib.sha256(_plain(_described(model)).encode())
    factors: dict[torch.device, Tensor] = {}
    for path, module in model.named_modules():
        with align_module_device(module):
            for own_name, parameter in module.named_parameters(recurse=False):
                name = f"{path}.{own_name}"
                if parameter.device.type == "meta":
                    raise UserError(f"the weights of {name} are not loaded; load the model anew")
                if parameter.device not in factors:
                    factors[parameter.device] = _factors(parameter.device)
                sums = _sums(parameter.detach(), factors[parameter.device])
                digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {sums}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def _factors(device: torch.device) -> Tensor:
    """What the numbers of a block are multiplied by: odd, else the highest bits would not count."""
    numbers = np.random.default_rng(0).integers(0, 2**63, _BLOCK, dtype=np.int64)
    return torch.from_numpy(numbers | 1).to(device)


def _sums(weights: Tensor, factors: Tensor) -> list[int]:
    """One number for each block of the weights' bits, modulo 2^64."""
    flat = weights.reshape(-1).contiguous()
    bits = flat.view({1: torch.uint8, 2: torch.int16}.get(flat.element_size(), torch.int32))
    n_blocks = _BLOCKS_AT_ONCE.get(flat.device.type, _MOST_BLOCKS_AT_ONCE)
    sums = [
        (torch.nn.functional.pad(lot, (0, -len(lot) % _BLOCK)).view(-1, _BLOCK) * factors).sum(1)
        for lot in bits.split(_BLOCK * n_blocks)
    ]
    return torch.cat(sums).tolist() if sums else []


def _described(model: torch.nn.Module) -> dict[str, Any]:
    """What decides beside the weights."""
    peft_configs: Any = getattr(model, "peft_config", {})
    adapters = {name: config.to_dict() for name, config in peft_configs.items()}
    # As they are applied: they can be changed after the adapter's config was written.
    layers = {
        name: [module.scaling, module.active_adapters, module.disable_adapters, module.merged_adapters]
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    config: Any = getattr(model, "config", None)
    return {"config": None if config is None else config.to_dict(), "adapters": adapters, "layers": layers}


def _plain(value: Any) -> str:
    """JSON of settings, without those that change no answer."""

    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): kept(value[key]) for key in value if key not in _WITHOUT_EFFECT}
        if isinstance(value, set | frozenset):
            return sorted(map(str, value))
        return [kept(each) for each in value] if isinstance(value, list | tuple) else value

    return json.dumps(kept(value), sort_keys=True, default=str)


def _read(path: Path) -> dict[int, Any]:
    found: dict[int, Any] = {}
    # Only "\n" ends a line: answers may hold the other characters that Python takes for an end.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # empty, or torn
        if isinstance(row, dict) and isinstance(row.get("index"), int) and "answer" in row:
            found[row["index"]] = row["answer"]
    return found
