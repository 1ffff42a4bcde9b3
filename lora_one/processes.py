"""The processes of one launch: who am I, how many are we, which device, and what we agree on."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState

from lora_one.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process's place in the launch."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Prints ``text`` once per launch."""
        if self.is_main:
            print(text, flush=True)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums ``tensor`` over all processes, in place where it already lies on the device."""
        if self.world_size == 1:
            return tensor
        on_device = tensor.to(self.device)
        dist.all_reduce(on_device)
        return tensor.copy_(on_device)

    def gather(self, rows: list[Any]) -> list[Any]:
        """Concatenates the lists of all processes, in rank order, on every process."""
        if self.world_size == 1:
            return rows
        parts: list[list[Any]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def from_main(self, value: Any) -> Any:
        """The main process's ``value``, on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def from_main_(self, *tensors: torch.Tensor) -> None:
        """Overwrites the tensors, which lie on the device, with the main process's."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.world_size > 1:
            dist.barrier()


def start_processes() -> Processes:
    """Joins the launch that the environment describes, once per program or once per sweep job.

    Raises:
        UserError: If the launcher started another number of processes than have found each other:
            each of them would train alone, on the same batches. If it was told to shard the model.
    """
    _check_launcher()
    # A previous job of the same sweep may have used another mixed precision.
    AcceleratorState._reset_state(reset_partial_state=False)
    has_accelerator = torch.accelerator.is_available()
    # The others wait while the main process writes a merged model: longer than the default allows.
    state = PartialState(cpu=not has_accelerator, timeout=timedelta(hours=2))
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes but {state.num_processes} found each other; "
            "start with 'accelerate launch --config_file accelerate_config.yaml' or 'torchrun'"
        )
    return Processes(state.process_index, state.num_processes, state.device)


def _check_launcher() -> None:
    """Accelerate would shard on GPUs, where nobody has tried it, and quietly not on the CPU."""
    for name, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise UserError(
                f"{what} was asked of the launcher: this program gives each process the whole model; use "
                "scripts/launchers/multi_gpu.yaml; for a model larger than one GPU use model.device_map=auto "
                "without a launcher, or the library (docs/scaling.md)"
            )


def end_processes() -> None:
    """Leaves the launch when every process is ready to."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
