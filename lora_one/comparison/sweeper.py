"""Hydra's sweeper that compares methods: tunes each, then runs each at its best over seeds, and reports."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from lora_one import sweeps
from lora_one.comparison.report import write_report
from lora_one.comparison.results import Tuned, collect
from lora_one.comparison.runs import Cell, Cells
from lora_one.comparison.search import Point, Space, plan
from lora_one.comparison.settings import Settings, check_arguments, read_settings
from lora_one.complaints import complain
from lora_one.config import ExperimentConfig, parse_config
from lora_one.errors import UserError
from lora_one.overrides import named_keys, normalise_overrides

PLUGIN = "hydra_plugins.lora_one.FairSweeper"
_ATTEMPTS = 2  # at a launch that breaks, such as one whose worker the system killed


class FairSweeper(Sweeper):
    """See ``conf/hydra/sweeper/fair.yaml`` for its keys."""

    def __init__(self, **settings: Any) -> None:
        self.tree = settings
        self.n_launched = 0

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Takes what Hydra has made."""
        self._loader, self._master = hydra_context.config_loader, config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Runs the comparison, or what is missing of it.

        Args:
            arguments: Overrides of the command line.

        Raises:
            UserError: For bad input, before any run begins; or if no method came to a result.
        """
        settings, cells, spaces = self._check(arguments)
        folder = _folder(settings.name, next(iter(cells.examples.values())))
        if self._master.dry_run:
            print(_outlook(spaces, len(settings.seeds), folder))
            return
        sweeps.journal().takes_divergence = True
        tuned = self._tune(cells, spaces)
        if tuned is None:
            return
        finals = {name: cells.final(name, found.best) for name, found in tuned.items() if found.best}
        if not finals:
            raise UserError("no method came to a validation loss; the jobs' errors stand above")
        batch = [cell for of_method in finals.values() for cell in of_method]
        self._launch(batch, f"final runs over seeds {settings.seeds}")
        if not self._stopping:
            errors = {o.run_id: o.error for o in sweeps.journal().collect() if o.run_id and o.error}
            comparison = collect(settings, tuned, finals, errors)
            sweeps.journal().last_words = write_report(comparison, folder)

    def _check(self, arguments: list[str]) -> tuple[Settings, Cells, dict[str, Space]]:
        """Everything that can be known before a run begins; one run of each method is composed."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("experiment=fair_comparison: start it without accelerate launch or torchrun")
        settings = read_settings(self._normalised(self.tree))
        _check_no_lists(arguments)
        check_arguments(arguments, settings)
        cells = Cells(settings, arguments, self._compose)
        spaces = {name: settings.space(name, config) for name, config in cells.examples.items()}
        for name, space in spaces.items():
            cells.tuning(name, plan(space, {}).asks[0])
        return settings, cells, spaces

    @property
    def _stopping(self) -> bool:
        return sweeps.journal().is_stopping

    def _normalised(self, tree: dict[str, Any]) -> dict[str, Any]:
        methods = tree.get("methods")
        if not isinstance(methods, dict):
            return tree
        (conf,) = [s.path for s in self._master.hydra.runtime.config_sources if s.provider == "main"]
        written = {
            name: normalise_overrides(list(overrides), Path(conf))[0]
            if isinstance(overrides, list) and all(isinstance(o, str) for o in overrides)
            else overrides
            for name, overrides in methods.items()
        }
        return tree | {"methods": written}

    def _compose(self, overrides: Sequence[str]) -> ExperimentConfig:
        loaded = self._loader.load_sweep_config(self._master, list(overrides))
        with read_write(loaded), open_dict(loaded):
            del loaded["hydra"]
        return parse_config(loaded, named_keys(list(overrides)))

    def _tune(self, cells: Cells, spaces: Mapping[str, Space]) -> dict[str, Tuned] | None:
        """Rounds of runs until every method's search has ended; None if asked to stop."""
        tried: dict[str, dict[Point, list[Cell]]] = {name: {} for name in spaces}
        number = 0
        while True:
            plans = {name: plan(space, _losses(tried[name])) for name, space in spaces.items()}
            asked = {name: found.asks for name, found in plans.items() if found.asks}
            if not asked:
                return {name: Tuned(plans[name], tried[name]) for name in spaces}
            number += 1
            for name, points in asked.items():
                tried[name] |= {point: cells.tuning(name, point) for point in points}
            batch = [cell for name, points in asked.items() for p in points for cell in tried[name][p]]
            self._launch(batch, f"round {number} of tuning", _counts(asked))
            if self._stopping:
                return None

    def _launch(self, batch: Sequence[Cell], what: str, detail: str = "") -> None:
        """Gives what is missing of a batch to the launcher."""
        for _ in range(_ATTEMPTS):
            missing = [cell for cell in batch if not cell.is_done]
            print(f"comparison: {what}, {len(missing)} of {len(batch)} runs to make{detail}", flush=True)
            if not missing:
                return
            first = self.n_launched
            self.n_launched += len(missing)
            try:
                jobs = self.launcher.launch([list(cell.overrides) for cell in missing], initial_job_idx=first)
                for job in jobs:
                    _ = job.return_value  # raises what the job itself could not catch
                return
            except Exception as error:
                first_line = str(error).strip().splitlines()[:1]
                complain(": ".join([f"launching {what}", type(error).__name__, *first_line]))
            if self._stopping:
                return


def register() -> None:
    """Lets Hydra find the sweeper; it takes plugins by names below ``hydra_plugins`` only."""
    Plugins.instance().register(FairSweeper)
    Plugins.instance().class_name_to_class[PLUGIN] = FairSweeper


def _check_no_lists(arguments: Sequence[str]) -> None:
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        if override.is_sweep_override():
            raise UserError(
                f"{override.input_line}: a comparison makes its own lists; give one value, or start it once "
                "for each"
            )


def _losses(tried: Mapping[Point, Sequence[Cell]]) -> dict[Point, float]:
    """The mean over the tuning seeds; what diverged for one seed counts as diverged."""
    return {point: sum(cell.loss for cell in cells) / len(cells) for point, cells in tried.items()}


def _counts(asked: Mapping[str, Sequence[Point]]) -> str:
    return ": " + "; ".join(f"{name} {', '.join(map(str, points))}" for name, points in asked.items())


def _folder(name: str | None, config: ExperimentConfig) -> Path:
    model = Path(config.model.name).name.lower()
    return Path(config.results_dir) / "comparisons" / (name or f"{config.dataset.name}-{model}")


def _outlook(spaces: Mapping[str, Space], n_seeds: int, folder: Path) -> str:
    """What a comparison would do."""
    lines = [f"comparison: {len(spaces)} methods, report in {folder}"]
    n_runs = 0
    for name, space in spaces.items():
        asks = plan(space, {}).asks
        gammas = f", then γ {', '.join(f'{g:g}' for g in space.gammas.values)}" if space.gammas else ""
        lines.append(f"{name}: rates {', '.join(f'{p.rate:g}' for p in asks)}{gammas}")
        n_runs += len(asks) + n_seeds + (len(space.gammas.values) - 1 if space.gammas else 0)
    return "\n".join([*lines, f"at least {n_runs} runs; grids grow while their best is at an edge"])
