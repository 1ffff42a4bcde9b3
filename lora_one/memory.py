"""Memory: the host's, and that of tensors on any device, without an allocator's help."""

import os
import weakref
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def free_host_bytes() -> int:
    """What is free of the host's memory, shared evenly among the processes of a launch on this machine."""
    return int(psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class LivePeak(TorchDispatchMode):
    """The peak of the bytes of all tensors that operations have made and that still live.

    Memory that was there before, such as a model's weights, does not count, nor do views of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._note(tensor.untyped_storage(), counts=False)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._note(tensor.untyped_storage(), counts=True)
        return out

    def _note(self, storage: torch.UntypedStorage, *, counts: bool) -> None:
        key, size = storage._cdata, storage.nbytes() if counts else 0
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
