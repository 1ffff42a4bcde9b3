"""What a comparison is asked for: methods, grids and seeds, checked before anything runs."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, ValidationError

from lora_one.comparison.search import Line, Space, log_grid
from lora_one.config import ExperimentConfig, Section
from lora_one.errors import UserError, nearest
from lora_one.overrides import named_keys

_KEY = "hydra.sweeper"
# What the comparison chooses itself.
_OURS = {"seed": "seeds", "init.stable_gamma": "gamma_factor", "model.eval_points": "eval_points"}
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rate = Annotated[float, Field(gt=0)]


class Settings(Section):
    """The keys of ``conf/hydra/sweeper/fair.yaml``, where they are explained."""

    name: str | None = Field(None, pattern=r"^[\w.+-]+$")
    only: list[str] | None = Field(None, min_length=1)
    baseline: str = "LoRA"
    tuning_seeds: list[Seed] = Field([100], min_length=1)
    seeds: list[Seed] = Field([0, 1, 2, 3, 4], min_length=2)
    per_decade: int = Field(4, ge=1, le=10)
    points: int = Field(5, ge=3)
    widest: int = Field(8, ge=0)
    gamma_factor: float = Field(4.0, gt=1)
    tune_gamma: bool = True
    eval_points: int | None = Field(20, ge=2)
    methods: dict[str, list[str]]
    centres: dict[str, Rate] = Field({})
    rates: dict[str, list[Rate]] = Field({})

    @property
    def chosen(self) -> dict[str, list[str]]:
        """Name and overrides of the methods that are compared."""
        return {name: self.methods[name] for name in self.only or self.methods}

    def space(self, name: str, config: ExperimentConfig) -> Space:
        """What is searched for a method.

        Args:
            name: The method's.
            config: One of its runs, as it would be without a search.
        """
        if name in self.rates:
            given = tuple(sorted(self.rates[name]))
            rates = Line(given, 10 ** (1 / self.per_decade), digits=2, given=True)
        else:
            centre = config.model.learning_rate * self.centres.get(name, 1.0)
            rates = log_grid(centre, self.points, self.per_decade)
        starts_from_gradient = config.peft.use_peft and config.init.mode == "gradient"
        if not (self.tune_gamma and starts_from_gradient and config.init.scale == "stable"):
            return Space(rates, widest=self.widest)
        gamma, factor = config.init.gamma, self.gamma_factor
        gammas = Line((gamma / factor, gamma, gamma * factor), factor)
        return Space(rates, gammas, gamma_start=1, widest=self.widest)


def read_settings(tree: dict[str, Any]) -> Settings:
    """The typed settings.

    Raises:
        UserError: For a wrong type, a value out of range, a method that does not exist, or seeds that
            do not fit.
    """
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in (_KEY, *first["loc"]))
        message = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(f"{key}={first['input']}: {message}") from None
    names = list(settings.methods)
    asked = [("only", name) for name in settings.only or []]
    asked += [("centres", name) for name in settings.centres] + [("rates", name) for name in settings.rates]
    for key, name in asked:
        if name not in names:
            raise UserError(
                f"{_KEY}.{key}: there is no method {name!r}{nearest(name, names)}; {_list(names)}"
            )
    if settings.baseline not in settings.chosen:
        raise UserError(
            f"{_KEY}.baseline={settings.baseline}: is not among the methods compared; add it, or name one of "
            f"{', '.join(settings.chosen)}"
        )
    if len(settings.chosen) < 2:
        raise UserError(f"{_KEY}.only={settings.only}: one method is no comparison; give at least two")
    _check_numbers(settings)
    return settings


def _check_numbers(settings: Settings) -> None:
    for key in ("seeds", "tuning_seeds", "only"):
        values: list[Any] = getattr(settings, key) or []
        if len(set(values)) < len(values):
            raise UserError(f"{_KEY}.{key}={values}: one stands there twice; leave it out")
    if both := set(settings.seeds) & set(settings.tuning_seeds):
        raise UserError(
            f"{_KEY}.tuning_seeds={settings.tuning_seeds}: {min(both)} is one of {_KEY}.seeds too, so its "
            "final run would have been chosen for being good; give another"
        )
    for name, rates in settings.rates.items():
        if not rates or len(set(rates)) < len(rates):
            raise UserError(f"{_KEY}.rates.{name}={rates}: give different learning rates, or leave it out")


def check_arguments(arguments: Sequence[str], settings: Settings) -> None:
    """Refuses overrides that the comparison, or a method, gives itself.

    Args:
        arguments: Overrides of the command line as ``normalise_overrides`` writes them.
        settings: Of the comparison.

    Raises:
        UserError: For the first.
    """
    for key in sorted(named_keys(list(arguments))):
        if key in _OURS:
            raise UserError(f"{key}: a comparison gives it to its runs; use {_KEY}.{_OURS[key]}")
        for name, overrides in settings.chosen.items():
            if key != "peft" and key in named_keys(overrides):
                raise UserError(
                    f"{key}: method {name} gives it; change {_KEY}.methods.{name}, or leave it out"
                )


def format_value(value: float | int | str) -> str:
    """A value as an override."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _list(names: list[str]) -> str:
    return f"valid: {', '.join(names)}"
