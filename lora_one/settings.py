"""The configs of the library: which adapter, and how it starts.

They extend PEFT's own, so that everything of PEFT's can be set; what is saved is a config of stock PEFT.
"""

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import peft
from peft.tuners.lora import LoraGAConfig as PeftLoraGAConfig

from lora_one.errors import UserError, nearest
from lora_one.inits import DIRECTIONS, SCALE_ALIASES, SCALES
from lora_one.starts import GradientStart

Scale = Literal["stable", "gd", "gd_scale", "unit", "weightS", "weight_svd"]
Objective = Literal["gradient", "sign", "adam"]
Shift = Literal["auto", "weight", "adapter"]
Estimator = Literal["exact", "sketch"]
_PEFT_STARTS = ("True", "False", "gaussian", "pissa", "olora", "eva", "corda", "loftq", "orthogonal", "mica")
PREPROCESS = {"lora_ga": "preprocess_loraga", "lora_one": "preprocess_lora_one"}
# What PEFT's own get_peft_model refuses: it would start the adapter in its default way without a word.
MARK = " (call lora_one.get_peft_model, not PEFT's)"


@dataclass
class LoraGAConfig(PeftLoraGAConfig):
    """LoRA-GA (arXiv 2407.05000); goes into ``LoraConfig(init_lora_weights="lora_ga")``.

    Attributes:
        direction: ``ArB2r`` (also ``LoRA-GA``), ``A2rBr``, ``ArBr`` or ``random``: which of the first 2r
            singular vectors of the gradient go to A and B.
        scale: ``stable`` (``d_out^¼/√γ`` on each factor), ``gd_scale`` (``1/s``), ``unit`` (1) or
            ``weight_svd`` (mean of ``√(σ_i(W)/s)``).
        stable_gamma: γ.
        objective: ``gradient``, or for Adam's first step ``sign`` or ``adam``; see ``objectives``.
        norm_clip: Shrink the factors so that no entry of ``s·B·A`` exceeds the largest of W.
        shift: Where ``s·B₀·A₀`` is taken off the base: ``weight``, ``adapter`` (two more frozen
            factors, exact on a quantised base), ``auto``: ``adapter`` where quantised.
        seed: For ``direction="random"``, and the random parts of ``sketch``.
        estimator: ``exact`` sums whole gradients in float32 on the CPU; ``sketch`` finds their leading
            singular triplets in one pass without forming them.
    """

    # Wider types than PEFT's: more directions and scales, and a γ that need not be whole.
    direction: Literal["LoRA-GA", "ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"  # type: ignore[assignment]
    scale: Scale = "stable"  # type: ignore[assignment]
    stable_gamma: float = 16  # type: ignore[assignment]
    objective: Objective = "gradient"
    norm_clip: bool = False
    shift: Shift = "auto"
    seed: int = 0
    estimator: Estimator = "exact"

    def __post_init__(self) -> None:
        _check_choices("LoraGAConfig", self, direction=[name for name in DIRECTIONS if name != "LoRA-One"])

    def start(self) -> GradientStart:
        """The settings as the mathematics takes them."""
        return GradientStart(
            direction=self.direction,
            scale=self.scale,
            gamma=self.stable_gamma,
            objective=self.objective,
            norm_clip=self.norm_clip,
            seed=self.seed,
        )


@dataclass
class LoraOneConfig:
    """LoRA-One (arXiv 2502.01235); goes into ``LoraConfig(init_lora_weights="lora_one")``.

    Attributes:
        scale: ``stable`` (``1/√γ`` on each factor), ``gd_scale``, ``unit`` or ``weight_svd``.
        stable_gamma: γ.
        normalize: ``spectral`` divides the singular values by the largest (Algorithm 1); ``none`` is the
            plain gradient step.
        objective: ``gradient``, or ``sign`` for Adam's first step.
        norm_clip: Shrink the factors so that no entry of ``s·B·A`` exceeds the largest of W.
        seed: For the random parts of ``sketch``.
        estimator: ``exact`` or ``sketch``, as in ``LoraGAConfig``.
    """

    scale: Scale = "stable"
    stable_gamma: float = 128
    normalize: Literal["spectral", "none"] = "spectral"
    objective: Objective = "gradient"
    norm_clip: bool = False
    seed: int = 0
    estimator: Estimator = "exact"

    def __post_init__(self) -> None:
        _check_choices("LoraOneConfig", self, normalize=["spectral", "none"])

    def start(self) -> GradientStart:
        """The settings as the mathematics takes them."""
        return GradientStart(
            direction="LoRA-One",
            scale=self.scale,
            gamma=self.stable_gamma,
            normalize=self.normalize,
            objective=self.objective,
            norm_clip=self.norm_clip,
            seed=self.seed,
        )


@dataclass
class LoraConfig(peft.LoraConfig):
    """PEFT's ``LoraConfig`` with two more values of ``init_lora_weights``: ``lora_ga``, ``lora_one``."""

    if TYPE_CHECKING:  # PEFT's own field carries metadata that it needs
        init_lora_weights: Any = True
    lora_one_config: LoraOneConfig | None = field(default=None)

    def __post_init__(self) -> None:
        kind = start_kind(self)
        if kind in PREPROCESS:
            start_config(self)
            self.init_lora_weights = f"{kind}{MARK}"
        elif self.lora_ga_config is not None or self.lora_one_config is not None:
            wanted = "lora_ga" if self.lora_ga_config is not None else "lora_one"
            raise UserError(f'{wanted}_config: has no effect here; use init_lora_weights="{wanted}"')
        elif kind not in _PEFT_STARTS and not kind.startswith("pissa_niter_"):
            hint = nearest(kind, [*PREPROCESS, *_PEFT_STARTS])
            raise UserError(f"init_lora_weights={kind!r}: no such start{hint}")
        super().__post_init__()


def start_config(config: Any) -> LoraGAConfig | LoraOneConfig:
    """The settings of a config's gradient start.

    Raises:
        UserError: If it has none.
    """
    kind = start_kind(config)
    if kind == "lora_one":
        if not isinstance(getattr(config, "lora_one_config", None), LoraOneConfig):
            raise UserError('init_lora_weights="lora_one": give lora_one_config=LoraOneConfig(...)')
        return config.lora_one_config
    if kind == "lora_ga":
        given = config.lora_ga_config
        if given is None:
            raise UserError('init_lora_weights="lora_ga": give lora_ga_config=LoraGAConfig(...)')
        if isinstance(given, LoraGAConfig):
            return given
        if not isinstance(given, PeftLoraGAConfig):
            raise UserError(f"lora_ga_config: give a LoraGAConfig, not {type(given).__name__}")
        return LoraGAConfig(direction=given.direction, scale=given.scale, stable_gamma=given.stable_gamma)
    raise UserError(
        f'init_lora_weights={config.init_lora_weights!r}: no gradient start; use "lora_ga" or "lora_one"'
    )


def start_kind(config: Any) -> str:
    """``init_lora_weights`` as the user wrote it."""
    return str(getattr(config, "init_lora_weights", "")).removesuffix(MARK)


def is_gradient_start(config: Any) -> bool:
    """Whether a config asks for LoRA-GA or LoRA-One."""
    return isinstance(config, peft.LoraConfig) and start_kind(config) in PREPROCESS


def stock_config(config: peft.LoraConfig) -> peft.LoraConfig:
    """The same adapter as a config of PEFT's own, with PEFT's own start."""
    names = [item.name for item in dataclasses.fields(peft.LoraConfig) if item.init]
    settings = {name: copy.copy(getattr(config, name)) for name in names}
    return peft.LoraConfig(**settings | {"init_lora_weights": True, "lora_ga_config": None})


def _check_choices(owner: str, config: Any, **choices: list[str]) -> None:
    choices |= {"scale": [*SCALES, *SCALE_ALIASES], "objective": ["gradient", "sign", "adam"]}
    choices |= {"estimator": ["exact", "sketch"]}
    for key, valid in choices.items():
        value = getattr(config, key)
        if value not in valid:
            raise UserError(f"{owner}: {key}={value!r}; valid: {', '.join(valid)}")
    if config.estimator != "exact" and config.objective != "gradient":
        raise UserError(
            f"{owner}: objective={config.objective!r} needs every entry of the gradient, which "
            f'estimator={config.estimator!r} never forms; use estimator="exact"'
        )
    if not isinstance(config.stable_gamma, (int, float)) or not config.stable_gamma > 0:
        raise UserError(f"{owner}: stable_gamma={config.stable_gamma!r}; it must be a number above 0")
