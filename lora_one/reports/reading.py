"""Records of many runs, and figures found in them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one.config import result_settings
from lora_one.errors import UserError, nearest
from lora_one.records import read_record

Record = dict[str, Any]
COST = "cost"


@dataclass(frozen=True)
class Records:
    """The runs below a folder.

    Attributes:
        found: Each run once: its folder and its record.
        damaged: One line for each record that cannot be read.
        remarks: Which copy counts, where a run is there more than once.
    """

    found: tuple[tuple[Path, Record], ...]
    damaged: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def all(self) -> list[Record]:
        """The records alone."""
        return [record for _, record in self.found]

    @property
    def folders(self) -> dict[str, Path]:
        """The folder of each run."""
        return {record["run_id"]: folder for folder, record in self.found}

    def check_whole(self) -> None:
        """Raises UserError if a record is damaged: a table without it would mislead."""
        if self.damaged:
            raise UserError(self.damaged[0])


def load_some(root: Path) -> Records:
    """As ``load_records``, where there must be some, all readable.

    Raises:
        UserError: If there is none, or one is damaged.
    """
    records = load_records(root)
    records.check_whole()
    if not records.found:
        raise UserError(f"{root}: no record.json below it; run an experiment, or name another folder")
    return records


def load_records(root: Path) -> Records:
    """All runs below ``root``, damaged ones set apart."""
    copies: dict[str, list[tuple[Path, Record]]] = {}
    damaged = []
    for path in sorted(root.rglob("record.json")):
        try:
            record = read_record(path.parent)
            if record is None:  # removed since it was found
                continue
            _check_parts(record, path)
        except UserError as error:
            damaged.append(str(error))
            continue
        copies.setdefault(record["run_id"], []).append((path.parent, record))
    chosen = {name: max(same, key=lambda copy: _standing(copy[1])) for name, same in copies.items()}
    remarks = [
        f"{name} is there {len(same)} times; the one in {chosen[name][0].parent} counts"
        for name, same in copies.items()
        if len(same) > 1
    ]
    return Records(tuple(chosen.values()), tuple(damaged), tuple(remarks))


def _check_parts(record: Record, path: Path) -> None:
    parts = flatten(record)
    needed = ("run_id", "method", "seed", "config.dataset.name", "config.model.learning_rate")
    lacking = next((key for key in needed if key not in parts), None)
    if lacking is not None:
        raise UserError(f"{path}: not a run record, it has no {lacking}; remove it, or restore the file")


def chosen_metric(records: Records, asked: str | None) -> str:
    """The figure that a table shows: the one asked for, else that of the test split.

    Raises:
        UserError: If no finished run has what was asked for.
    """
    if asked is None:
        return "test"
    finished = [record for record in records.all if record["status"] == "finished"]
    there = sorted({name for record in finished for name in record.get("metrics", {})})
    if not any(figure_at(record, asked) is not None for record in finished):
        raise UserError(
            f"--metric {asked}: no finished run has it{nearest(asked, there)}; there are {', '.join(there)}"
        )
    return asked


def _standing(record: Record) -> tuple[bool, str]:
    return record["status"] == "finished", record.get("ended") or record.get("started") or ""


def settings_key(config: dict[str, Any], without: Iterable[str] = ()) -> str:
    """What runs that may be averaged have in common: all that changes the trained weights but the seed.

    Args:
        config: A dumped config, or the one of a record.
        without: Dotted keys that may differ too.
    """
    settings = result_settings(json.loads(json.dumps(config)))
    settings.pop("seed", None)
    for key in without:
        section, _, name = key.rpartition(".")
        settings.get(section, {}).pop(name, None)
    for key in {"rank_pattern", "alpha_pattern"} & settings.get("peft", {}).keys():
        settings["peft"][key] = list(settings["peft"][key].items())  # the first match counts: keep the order
    return json.dumps(_with_floats(settings), sort_keys=True)


def _with_floats(value: Any) -> Any:
    # YAML's 16 and the default 16.0 are one setting.
    if isinstance(value, dict):
        return {key: _with_floats(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_floats(entry) for entry in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def figure_at(record: Record, path: str) -> dict[str, Any] | None:
    """A figure of a record: ``test``, ``lm_eval/gsm8k``, ``humaneval.others.pass@10``, ``cost.hours``, ….

    Returns:
        At least its ``value``; None where it was not measured.
    """
    figures = {**record.get("metrics", {}), COST: _cost(record)}
    found = _descend(figures, path.split("."))
    if isinstance(found, dict):
        return found if found.get("value") is not None else None
    return None if found is None else {"value": found}


def _cost(record: Record) -> dict[str, float | None]:
    """Hours from the pretrained model to the trained one, and the peak GB (1e9 bytes) on the way."""
    stages = [record.get("stages", {}).get(name, {}) for name in ("gradient", "init", "training")]
    training = record.get("training") or {}
    # Of a training that went on from a checkpoint the record has the last part only, and of a gradient
    # that was read from the cache not the memory.
    is_whole = "seconds" in training and not training.get("resumed_from_step")
    is_cached = bool((record.get("gradient") or {}).get("cache_file"))
    peaks = [
        peak for stage in stages if (peak := stage.get("peak_gpu_bytes") or stage.get("peak_resident_bytes"))
    ]
    return {
        "hours": (init_seconds(record) + training["seconds"]) / 3600 if is_whole else None,
        "peak_gb": max(peaks) / 1e9 if peaks and is_whole and not is_cached else None,
    }


def _descend(tree: Any, parts: Sequence[str]) -> Any:
    if not parts:
        return tree
    if not isinstance(tree, dict):
        return None
    # A name may itself hold a dot: the longest that fits.
    for taken in range(len(parts), 0, -1):
        name = ".".join(parts[:taken])
        if name in tree:
            return _descend(tree[name], parts[taken:])
    return None


def value_at(record: Record, path: str) -> float | None:
    """The number of ``figure_at``."""
    figure = figure_at(record, path)
    return None if figure is None else figure["value"]


def limit_of(record: Record, path: str) -> int | None:
    """The first so many problems that a figure was measured on; None: on all."""
    benchmark = figure_at(record, path.split(".")[0]) or {}
    limit: int | None = benchmark.get("limit", record["config"].get("eval", {}).get("limit"))
    return limit


def init_seconds(record: Record) -> float:
    """Seconds from the pretrained model to the first training step.

    A gradient that was read from the cache counts with what it took to make.
    """
    stages = record.get("stages", {})
    seconds = {name: stages.get(name, {"seconds": 0.0})["seconds"] for name in ("gradient", "init")}
    gradient = record.get("gradient") or {}
    if gradient.get("cache_file"):
        seconds["gradient"] = gradient["seconds"]
    return float(sum(seconds.values()))


def devices_of(record: Record) -> str:
    """What a run was made on: its GPUs, or CPU."""
    return ", ".join(record.get("hardware", {}).get("gpus") or ["CPU"])


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a nested dictionary."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
