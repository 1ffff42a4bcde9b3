"""The picture of a run's probes: one panel a family, figures over all layers against the step."""

from pathlib import Path
from typing import Any

from lora_one.files import whole_file
from lora_one.probes.callback import FILE
from lora_one.records import RunRecord
from lora_one.tracking import read_metrics

# Family, axis, whether logarithmic, and figure to label.
_PANELS: list[tuple[str, str, bool, dict[str, str]]] = [
    (
        "update",
        "cosine of the step",
        False,
        {
            "update/cosine_gradient": "with -G",
            "update/cosine_sign": "with -sign(G)",
            "update/best_cosine": "best of rank 2r",
        },
    ),
    (
        "subspaces",
        "overlap with r directions of G",
        False,
        {
            "subspaces/B_overlap_r": "B, left",
            "subspaces/A_overlap_r": "A, right",
            "subspaces/B_overlap_first": "B, first G",
            "subspaces/A_overlap_first": "A, first G",
            "subspaces/energy_first": "energy of G in the first G's",
        },
    ),
    (
        "spectrum",
        "Frobenius norm",
        True,
        {
            "spectrum/norm_sBA": "s·B·A",
            "spectrum/norm_moved": "moved from the start's weight",
            "spectrum/norm_A": "A",
            "spectrum/norm_B": "B",
        },
    ),
    ("spectrum", "effective rank of s·B·A", False, {"spectrum/effective_rank": "effective rank"}),
    (
        "variance",
        "mean square, out / in",
        True,
        {"variance/forward": "forward", "variance/backward": "backward"},
    ),
    (
        "curvature",
        "eigenvalue",
        True,
        {"curvature/top": "Hessian", "curvature/adam_top": "preconditioned by Adam"},
    ),
    (
        "curvature",
        "learning rate",
        True,
        {"curvature/sgd_rate_limit": "limit of SGD", "curvature/adam_rate_limit": "limit of Adam"},
    ),
    (
        "trajectory",
        "cosine with full fine-tuning's path",
        False,
        {"trajectory/cosine": "since the start", "trajectory/cosine_since": "since the last look"},
    ),
]


def plot_probes(record: RunRecord, folder: Path) -> None:
    """Writes ``probes.png`` from ``probes.jsonl``; nothing without one."""
    rows = read_metrics(folder / FILE)
    panels = [panel for panel in _PANELS if any(curve(rows, key) for key in panel[3])]
    if not panels:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    n_rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(n_rows, 2, figsize=(10, 2.9 * n_rows), layout="constrained", squeeze=False)
    for axis, (_, label, is_log, keys) in zip(axes.flat, panels, strict=False):
        draw(axis, rows, keys, label, is_log)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    dataset = record.config["dataset"]["name"]
    figure.suptitle(f"{record.method} on {dataset}, seed {record.seed}: over all layers")
    with whole_file(folder / "probes.png") as partial:
        figure.savefig(partial, format="png", dpi=110)
    plt.close(figure)


def curve(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Step and value of a figure over all layers, where it has one."""
    return [(row["step"], row["totals"][key]) for row in rows if row["totals"].get(key) is not None]


def draw(axis: Any, rows: list[dict[str, Any]], keys: dict[str, str], label: str, is_log: bool) -> None:
    """One panel."""
    for key, name in keys.items():
        points = [(step, value) for step, value in curve(rows, key) if value > 0 or not is_log]
        if points:
            axis.plot(*zip(*points, strict=True), ".-", label=name)
    axis.set(xlabel="optimiser step", ylabel=label, yscale="log" if is_log else "linear")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
