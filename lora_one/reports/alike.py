"""What runs must have in common to be averaged, and what a reader should know that they have not."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from lora_one.errors import UserError
from lora_one.reports.reading import Record, devices_of, figure_at


def check_alike(where: str, runs: Sequence[Record], metric: str) -> None:
    """Raises UserError where figures that are to be averaged differ in more than the seed."""
    for what, of in _KINDS.items():
        kinds: dict[str, list[str]] = defaultdict(list)
        for run in runs:
            kinds[str(of(run, metric))].append(run["run_id"])
        if len(kinds) > 1:
            (one, [first, *_]), (other, [second, *_]), *_ = kinds.items()
            remedy = "give eval.limit=… to choose" if what == "n of problems" else "keep them in two folders"
            raise UserError(
                f"{where}: runs that differ in more than the seed are not averaged: {what} is {one} in "
                f"{first} and {other} in {second}; {remedy}, or make one of them again"
            )
    seeds = [run["seed"] for run in runs]
    twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
    if twice is not None:
        names = " and ".join(run["run_id"] for run in runs if run["seed"] == twice)
        raise UserError(f"{where}: seed {twice} is there twice, as {names}; keep them in two folders")


_KINDS: dict[str, Callable[[Record, str], Any]] = {
    "n of problems": lambda run, metric: (figure_at(run, metric) or {}).get("n"),
    "the benchmark's data": lambda run, metric: (figure_at(run, metric.split(".")[0]) or {}).get("data"),
    "the decoding": lambda run, metric: (figure_at(run, metric.split(".")[0]) or {}).get("decoding"),
    "the metric": lambda run, metric: (figure_at(run, metric.split(".")[0]) or {}).get("metric"),
    "the data's fingerprint": lambda run, _: (run.get("data") or {}).get("fingerprint"),
    "the fingerprint of the model's weights": lambda run, _: (run.get("model") or {}).get("fingerprint"),
}


def provenance(runs: Sequence[Record]) -> list[str]:
    """Notes on runs that were made by different or unknown code, packages or machines."""
    remarks = []
    dirty = sum(bool(run.get("code", {}).get("dirty")) for run in runs)
    if dirty:
        remarks.append(f"{dirty} of {len(runs)} runs were made by code with changes that were not committed")
    commits = {str(run.get("code", {}).get("commit"))[:8] for run in runs}
    if len(commits) > 1:
        remarks.append(f"the runs were made by different versions of the code: {', '.join(sorted(commits))}")
    packages = sorted({name for run in runs for name in run.get("packages", {})})
    for package in packages:
        versions = {run.get("packages", {}).get(package, "none") for run in runs}
        if len(versions) > 1:
            remarks.append(
                f"the runs were made with different versions of {package}: {', '.join(sorted(versions))}"
            )
    devices = {devices_of(run) for run in runs}
    if len(devices) > 1:
        remarks.append(f"the runs were made on different devices: {'; '.join(sorted(devices))}")
    return remarks
