"""Tokens on disk, so that a large dataset is tokenised once.

An entry's name is a digest of all that it depends on: the texts, the tokenizer and the settings. So
nothing is ever found that belongs to something else, and any number of datasets lie in one folder, which
can be deleted at any time.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from lora_one.files import whole_file

Arrays = dict[str, np.ndarray]


class TokenCache:
    """A folder of entries.

    Attributes:
        damaged: Entries that were found broken, and were made again.
    """

    def __init__(
        self, folder: Path | None, tokenizer: PreTrainedTokenizerBase | None, *, writes: bool = True
    ) -> None:
        """``folder``: None keeps nothing; ``writes``: false for processes that only read."""
        self._folder = folder
        self._writes = writes
        self._tokenizer = _tokenizer_digest(tokenizer) if folder is not None and tokenizer else ""
        self.damaged: list[Path] = []

    def get(self, texts: Sequence[str], settings: Sequence[Any], make: Callable[[], Arrays]) -> Arrays:
        """The arrays made of these texts, from the folder or made now."""
        if self._folder is None:
            return make()
        digest = hashlib.sha256(json.dumps([self._tokenizer, *settings]).encode())
        for text in texts:
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        key = digest.hexdigest()[:32]
        path = self._folder / key[:2] / f"{key}.safetensors"
        found = self._read(path)
        if found is not None:
            return found
        made = make()
        if self._writes:
            with suppress(OSError, SafetensorError):  # it only saves time
                _write(path, made)
        return made

    def _read(self, path: Path) -> Arrays | None:
        try:
            with safe_open(path, framework="np") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                if (file.metadata() or {}).get("digest") == _content_digest(arrays):
                    return arrays
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError):
            pass
        self.damaged.append(path)
        return None


NO_CACHE = TokenCache(None, None)


def _write(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        save_file(arrays, partial, metadata={"digest": _content_digest(arrays)})


def _content_digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides which tokens a text becomes, the library's version included."""
    parts = [
        tokenizer.backend_tokenizer.to_str(),
        tokenizers.__version__,
        str(tokenizer.eos_token_id),
        type(tokenizer).__name__,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
