"""The gradient estimates of the runner, on disk, so that a sweep pays for each once.

An entry's name is a digest of all that its numbers depend on: weights, sample as token ids, targets,
estimator and its settings. So nothing is ever found that belongs to something else, and entries of any
number of models lie in one folder. Who computes an entry holds its lock; the system frees that when its
holder dies.
"""

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_one.cache import identity, pack_layers, save_whole, unpack_layers
from lora_one.config import ExperimentConfig
from lora_one.data.batches import Slot
from lora_one.data.encoding import Encoded
from lora_one.errors import UserError
from lora_one.gradients import GradientEstimate, choose_estimator
from lora_one.models import LoadedModel
from lora_one.processes import Processes
from lora_one.sample import sample_batches
from lora_one.sketch import SKETCH_VERSION

_FORMAT = "lora-one estimate 1"
# Of a model's config, what says where it came from or how it is run, not what it computes.
_NOT_COMPUTED = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Entry:
    """An estimate that may be on disk.

    Attributes:
        identity: All that its numbers depend on.
        about: Names, for people.
    """

    identity: dict[str, Any]
    about: dict[str, Any]

    @property
    def key(self) -> str:
        """Its name."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:24]


class DamagedEntryError(Exception):
    """A file that is not what was written there."""


def describe_estimate(
    config: ExperimentConfig,
    loaded: LoadedModel,
    examples: Sequence[Encoded],
    ranks: Mapping[str, int],
    processes: Processes,
) -> Entry:
    """What the estimate of a run depends on."""
    alone = replace(processes, rank=0, world_size=1)
    indices, batches = sample_batches(examples, config, alone)
    n_examples = len(indices) // processes.world_size
    estimator = choose_estimator(config, loaded.model, loaded.targets, ranks, n_examples)
    sizes = None if estimator.name == "exact" else [SKETCH_VERSION, asdict(estimator.size)]
    parts = {
        "format": _FORMAT,
        "weights": loaded.fingerprint,
        "model": _digest(_computed(loaded.model.config.to_dict())),
        "precision": [str(loaded.model.dtype), config.model.quantization],
        "sample": _sample_digest(examples, batches),
        "targets": _digest(list(loaded.targets)),
        "start": identity(config.gradient_start(), estimator.name),
        "ranks": dict(ranks) if config.init.objective == "adam" else None,
        "n_triplets": estimator.n_triplets,
        "sketch": sizes,
        "dropout": config.init.dropout,
        "seed": config.seed,
    }
    about = {
        "model": config.model.name,
        "dataset": config.dataset.name,
        "estimator": estimator.name,
        "n_triplets": estimator.n_triplets,
        "n_targets": len(loaded.targets),
    }
    return Entry(parts, about)


def cached_estimate(
    folder: str | None, entry: Entry, make: Callable[[], GradientEstimate], processes: Processes
) -> GradientEstimate:
    """The estimate from ``folder``, or made and kept there; to be called on all processes.

    Where another program is making the same one, waits for it.
    """
    if folder is None or entry.identity["weights"] is None:
        if folder is not None:
            processes.say(
                "note: the model's revision is unknown, so its gradient is not kept; give model.revision"
            )
        return make()
    path = Path(folder) / f"{entry.key}.safetensors"
    with ExitStack() as stack:
        found = None
        if processes.is_main:
            found = _look(path, entry, processes)
            if found is None:
                has_lock = stack.enter_context(_lock(path.with_suffix(".lock"), processes.say))
                found = _look(path, entry, processes) if has_lock else None
        found = processes.from_main(found)
        if found is not None:
            processes.say(f"gradient: read from {path} (made in {found.seconds:.1f} s)")
            return replace(found, cache_file=str(path))
        estimate = make()
        if processes.is_main:
            _keep(path, entry, estimate, processes)
        return estimate


def make_cache_folder(folder: str) -> None:
    """Makes the folder of the cache.

    Raises:
        UserError: If it cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cache_dir={folder}: cannot be made ({error.strerror}); give another, or cache_dir=null"
        ) from None


def read_entry(path: Path) -> tuple[Entry, GradientEstimate]:
    """Reads and checks a file of the cache.

    Raises:
        DamagedEntryError: If it is not what was written there.
        OSError: If it is not there, or cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        if metadata.pop("digest", None) != _content_digest(tensors, metadata):
            raise DamagedEntryError("its content is not what was written")
        facts = json.loads(metadata["facts"])
        estimate = GradientEstimate(
            layers=unpack_layers(tensors, json.loads(metadata["numbers"])),
            **facts | {"errors": tuple(facts["errors"])},
        )
        return Entry(json.loads(metadata["identity"]), json.loads(metadata["about"])), estimate
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise DamagedEntryError(str(error) or type(error).__name__) from None


def _look(path: Path, entry: Entry, processes: Processes) -> GradientEstimate | None:
    try:
        stored, estimate = read_entry(path)
        if stored.identity != json.loads(json.dumps(entry.identity)):
            raise DamagedEntryError("it belongs to another model, sample or setting")
    except FileNotFoundError:
        return None
    except (DamagedEntryError, OSError) as error:
        processes.say(f"note: {path}: damaged ({error}); the gradient is computed again")
        return None
    with suppress(OSError):
        os.utime(path)  # when it was last of use
    return estimate


def _keep(path: Path, entry: Entry, estimate: GradientEstimate, processes: Processes) -> None:
    tensors, numbers = pack_layers(estimate.layers)
    facts = asdict(replace(estimate, layers={}))
    del facts["layers"], facts["cache_file"]
    about = entry.about | {"made": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": socket.gethostname()}
    metadata = {
        "format": _FORMAT,
        "identity": json.dumps(entry.identity),
        "about": json.dumps(about),
        "facts": json.dumps(facts),
        "numbers": json.dumps(numbers),
    }
    metadata["digest"] = _content_digest(tensors, metadata)
    try:
        for left in path.parent.glob(f"{path.name}.*.partial"):  # of a writer that was killed
            left.unlink(missing_ok=True)
        save_whole(path, tensors, metadata, suffix=f".{socket.gethostname()}-{os.getpid()}")
    except (OSError, SafetensorError) as error:
        processes.say(f"note: {path}: could not be written ({error}); this gradient is not kept")
        return
    processes.say(f"gradient: computed, kept in {path}")


@contextmanager
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Holds the lock of an entry; gives whether it could be had."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("a+"))
            _wait_for_lock(file, say)
        except OSError as error:
            say(f"note: {path}: no lock ({error.strerror}), so other programs may compute the same gradient")
            yield False
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield True


def _wait_for_lock(file: IO[str], say: Callable[[str], None]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        say(f"gradient: {file.read().strip() or 'another program'} is computing it; waiting")
        fcntl.flock(file, fcntl.LOCK_EX)


def _computed(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in _NOT_COMPUTED}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _sample_digest(examples: Sequence[Encoded], batches: Sequence[Sequence[Slot]]) -> str:
    """Of the token ids, the masks, the weights and the batches."""
    digest = hashlib.sha256()
    for slots in batches:
        digest.update(len(slots).to_bytes(4, "little"))
        for index, weight in slots:
            example = examples[index]
            digest.update(np.array([len(example.ids), example.n_prompt], dtype=np.int64).tobytes())
            digest.update(np.ascontiguousarray(example.ids, dtype=np.int64).tobytes())
            digest.update(np.float64(weight).tobytes())
    return digest.hexdigest()[:24]


def _content_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()
