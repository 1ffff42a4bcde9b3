"""What a streaming estimate of the gradient loses: in the gradient itself, and in the training after it.

    python scripts/compare_estimators.py accuracy init.bsz=8               # any overrides of run_exp.py
    python run_exp.py -m init.bsz=8 init.estimator=exact,auto seed=0,1,2
    python scripts/compare_estimators.py curves results

``accuracy`` takes model, data and sample of an experiment, and prints for each kind of layer the energy of
the gradient between the leading k estimated singular vectors, against the best k, in the worst layer.
``curves`` compares the training losses of finished runs that differ in nothing but ``init.estimator``.
"""

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from torch import Tensor
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lora_one.collect import collect_gradients
from lora_one.config import ExperimentConfig, parse_config, result_settings
from lora_one.data.prepare import Data, prepare_data
from lora_one.errors import UserError
from lora_one.gradients import estimate_gradient
from lora_one.losses import weighted_loss
from lora_one.models import LoadedModel, adapter_ranks, load_model, load_tokenizer
from lora_one.overrides import named_keys, normalise_overrides
from lora_one.processes import Processes
from lora_one.records import read_record
from lora_one.sample import gradient_batches
from lora_one.tables import markdown_table
from lora_one.tracking import read_metrics
from lora_one.triplets import Triplets, energy_share

STREAMING = ("sketch", "sketch_two_pass")
ALONE = Processes(rank=0, world_size=1, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))


# ---- accuracy


def accuracy(overrides: Sequence[str]) -> str:
    """The table of energies."""
    arguments, _ = normalise_overrides(list(overrides), ROOT / "conf")
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        config = parse_config(compose("config", overrides=arguments), named_keys(arguments))
    if not config.peft.use_peft or config.init.mode != "gradient" or config.init.objective != "gradient":
        raise UserError("accuracy: needs init=gradient with init.objective=gradient, and an adapter")
    tokenizer = load_tokenizer(config.model)
    data, loaded = prepare_data(config, tokenizer), load_model(config, tokenizer, ALONE.device)
    gradients = exact_gradients(config, loaded, data)
    ranks = adapter_ranks(loaded.model, loaded.targets, config.peft)
    columns = {name: estimate(config, loaded, data, ranks, name) for name in STREAMING}
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in loaded.targets))
    head = ["worst layer of its kind", *(f"{name}, {k}" for name in columns for k in ("r", "2r"))]
    rows = [head]
    for kind in [*kinds, "all"]:
        names = [name for name in loaded.targets if kind in ("all", name.rsplit(".", 1)[-1])]
        rows.append([kind])
        for found in columns.values():
            for times in (1, 2):
                shares = (energy_share(gradients[n], found[n], times * ranks[n]) for n in names)
                rows[-1].append(f"{min(shares):.4f}")
    return markdown_table(rows)


def exact_gradients(config: ExperimentConfig, loaded: LoadedModel, data: Data) -> dict[str, Tensor]:
    """The whole gradients of the sample, float32 on the CPU."""
    with collect_gradients(loaded.model, loaded.targets, dropout=config.init.dropout) as sums:
        for batch in gradient_batches(data.gradient.examples, config, data.pad_id, ALONE.device):
            weighted_loss(loaded.model, batch).backward()
    return sums.G_OI


def estimate(
    config: ExperimentConfig, loaded: LoadedModel, data: Data, ranks: dict[str, int], estimator: str
) -> dict[str, Triplets]:
    """What an estimator finds."""
    settings = config.model_copy(update={"init": config.init.model_copy(update={"estimator": estimator})})
    found = estimate_gradient(
        loaded.model,
        loaded.targets,
        data.gradient.examples,
        settings,
        ranks=ranks,
        pad_id=data.pad_id,
        processes=ALONE,
    )
    return {name: layer for name, layer in found.layers.items() if isinstance(layer, Triplets)}


# ---- curves


def curves(root: Path) -> str:
    """The table of loss differences.

    Raises:
        UserError: If no two runs differ in the estimator alone.
    """
    found: dict[str, dict[str, dict[int, tuple[list[float], float]]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(root.rglob("record.json")):
        record = read_record(path.parent)
        if record is None or record["status"] != "finished" or not record.get("gradient"):
            continue
        losses = [row["loss"] for row in read_metrics(path.parent / "metrics.jsonl") if "loss" in row]
        run = (losses, record["metrics"]["validation_loss"])
        found[experiment_of(record)][record["gradient"]["estimator"]][record["seed"]] = run
    rows = [["runs", "estimator", "seeds", "against exact", "seed against seed", "validation loss"]]
    for name, by_estimator in found.items():
        exact = by_estimator.get("exact", {})
        for estimator, runs in sorted(by_estimator.items()):
            both = sorted(runs.keys() & exact.keys())
            if both and len(by_estimator) > 1:
                against = (
                    "-" if estimator == "exact" else f"{mean(apart(runs[s], exact[s]) for s in both):.4f}"
                )
                own = [runs[seed] for seed in both]
                rows.append([name, estimator, str(len(both)), against, between(own), validation(own)])
    if len(rows) == 1:
        raise UserError(f"{root}: no finished runs that differ in init.estimator alone, one of them exact")
    return markdown_table(rows)


def experiment_of(record: dict[str, Any]) -> str:
    """A short name of all that a run depends on but its seed and its estimator."""
    settings = result_settings(record["config"])
    settings.pop("seed")
    settings["init"] = {key: value for key, value in settings["init"].items() if key != "estimator"}
    settings["data"] = record["data"].get("fingerprint")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:4]
    return f"{record['config']['dataset']['name']} {record['method']} {digest}"


def apart(first: tuple[list[float], float], second: tuple[list[float], float]) -> float:
    """Mean difference of two training losses over the steps."""
    return mean(abs(a - b) for a, b in zip(first[0], second[0], strict=True))


def between(runs: list[tuple[list[float], float]]) -> str:
    """Mean difference between two seeds."""
    pairs = [apart(one, other) for i, one in enumerate(runs) for other in runs[:i]]
    return f"{mean(pairs):.4f}" if pairs else "-"


def validation(runs: list[tuple[list[float], float]]) -> str:
    """Mean and standard deviation over the seeds."""
    values = [loss for _, loss in runs]
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("accuracy", "curves"))
    parser.add_argument("arguments", nargs="*", help="accuracy: overrides of run_exp.py; curves: a folder")
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        if given.what == "accuracy":
            print(accuracy(given.arguments))
        else:
            print(curves(Path(given.arguments[0] if given.arguments else "results")))
    except (UserError, HydraException) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
