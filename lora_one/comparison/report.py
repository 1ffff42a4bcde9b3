"""Report skeleton."""

from pathlib import Path
from lora_one.comparison.results import Comparison
from lora_one.comparison.statistics import summarise


def write_report(comparison: Comparison, folder: Path) -> str:
    lines = []
    for m in comparison.methods:
        if m.finals:
            s = summarise(list(m.losses.values()))
            lines.append(
                f"{m.name}: {m.best} loss {s.mean:.4f} ± {s.std:.4f} runs {m.n_tuning_runs} {m.remarks} {m.missing}"
            )
            for sc in comparison.scores:
                t = summarise(list(m.score(sc).values()))
                lines.append(f"   {sc} {t.mean:.3f} ± {t.std:.3f}")
    return "\n".join(lines)
