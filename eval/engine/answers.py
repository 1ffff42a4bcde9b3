"""Answers kept while an evaluation runs, so that a killed one goes on from what is there."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from lora_one.errors import UserError
from lora_one.processes import Processes

_DIGITS = 16


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
    """Hex digest of all parameters as they stand, adapters included.

    It is made of exact integer sums of the numbers' bits, so it is fast on every device and the same
    on all of them: it tells models and moments of a training apart, and is no signature.
    """
    digest = hashlib.sha256()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in model.named_parameters():
        bits = parameter.detach().contiguous().view(integers[parameter.element_size()])
        halves = [part.sum(dtype=torch.int64).item() for part in bits.flatten().tensor_split(2)]
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {halves}\n".encode())
    return digest.hexdigest()[:_DIGITS]


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
