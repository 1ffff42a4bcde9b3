"""The run's picture: loss against step, and what it led to."""

from pathlib import Path

from lora_one.files import whole_file
from lora_one.records import RunRecord
from lora_one.tracking import read_metrics


def plot_run(record: RunRecord, folder: Path) -> None:
    """Writes ``plot.png`` from ``metrics.jsonl``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(folder / "metrics.jsonl")
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(*zip(*train, strict=True), label="training loss", color="tab:blue", alpha=0.35, linewidth=1)
    axis.plot(
        *zip(*smoothed(train), strict=True), color="tab:blue", linewidth=1.8, label="training loss, smoothed"
    )
    if validation:
        axis.plot(*zip(*validation, strict=True), "o-", color="tab:orange", label="validation loss")
    axis.set(xlabel="optimiser step", ylabel="loss", yscale="log", title=_title(record))
    axis.grid(alpha=0.3, which="both")
    right = [(row["step"], 100 * row["eval_exact_match"]) for row in rows if "eval_exact_match" in row]
    if right:
        share = axis.twinx()
        share.plot(*zip(*right, strict=True), "s--", color="tab:green")
        share.set(ylim=(0, 100), ylabel="exact match on the validation split, %")
        axis.plot([], [], "s--", color="tab:green", label="exact match")
    axis.legend()
    with whole_file(folder / "plot.png") as partial:
        figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)


def smoothed(points: list[tuple[int, float]], weight: float = 0.8) -> list[tuple[int, float]]:
    """Exponential moving average of a curve, corrected for its start."""
    average = norm = 0.0
    result = []
    for step, value in points:
        average = weight * average + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append((step, average / norm))
    return result


def _title(record: RunRecord) -> str:
    dataset, rate = record.config["dataset"]["name"], record.config["model"]["learning_rate"]
    title = f"{record.method} on {dataset}, learning rate {rate:g}, seed {record.seed}"
    test = record.metrics.get("test")
    if test:
        before = record.metrics.get("test_before")
        path = f"{before['value']:.1%} → " if before else ""
        title += f"\ntest {test['metric'].replace('_', ' ')} {path}{test['value']:.1%} (n = {test['n']})"
    return title
