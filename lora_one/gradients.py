"""The gradient estimate: the mean full fine-tuning gradient of each target, and what is kept of it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_one.collect import collect_gradients, shared_elsewhere
from lora_one.config import ExperimentConfig
from lora_one.data.batches import Slot, collate_slots
from lora_one.data.encoding import Encoded
from lora_one.errors import UserError
from lora_one.layers import shape_OI
from lora_one.losses import to_device, weighted_loss
from lora_one.objectives import AdamFactors
from lora_one.processes import Processes
from lora_one.progress import progress_bar
from lora_one.sample import sample_batches
from lora_one.sketch import SketchedGradient, SketchSize, sketch_size, triplets_to_keep
from lora_one.starts import LayerEstimate, reduce_gradient
from lora_one.streaming import one_pass, two_passes
from lora_one.triplets import Triplets

_ANNOUNCE_AFTER = 5  # batches
# From so many examples on, one pass finds all that can be seen; below, a second costs little.
ONE_PASS_EXAMPLES = 64


@dataclass(frozen=True)
class EstimatorChoice:
    """How the gradients are estimated, and how much of them is kept."""

    name: str
    n_triplets: int

    @property
    def size(self) -> SketchSize:
        """Columns of the sketches."""
        return sketch_size(self.n_triplets, two_passes=self.name == "sketch_two_pass")


@dataclass(frozen=True)
class GradientEstimate:
    """What is known of the targets' gradients, and the sample that they are the mean over.

    Attributes:
        layers: Per target its leading singular triplets, or factors fitted to Adam's first step.
        loss: Mean training loss over the sample.
        n_examples: Of the sample.
        n_tokens: Of the sample, padding not counted.
        seconds: That the estimate took.
        estimator: ``exact``, ``sketch`` or ``sketch_two_pass``.
        dropout: Whether the model's dropout was on.
        errors: Of the streaming estimators: per target the estimated relative error of all its triplets.
        cache_file: Where it was read from, if it was.
    """

    layers: dict[str, LayerEstimate]
    loss: float
    n_examples: int
    n_tokens: int
    seconds: float
    estimator: str = "exact"
    dropout: bool = False
    errors: tuple[float, ...] = ()
    cache_file: str | None = None

    def summary(self) -> dict[str, Any]:
        """What the record keeps: the sample, and how well the layers' factors hold what they aim at."""
        known: dict[str, Any] = {}
        triplets = [layer for layer in self.layers.values() if isinstance(layer, Triplets)]
        if triplets:
            kept = [min(1.0, float((t.S_K**2).sum()) / t.norm**2) for t in triplets]
            known = {
                "n_triplets": max(t.S_K.numel() for t in triplets),
                "energy_kept_mean": sum(kept) / len(kept),
                "energy_kept_worst": min(kept),
            }
        fitted = [layer for layer in self.layers.values() if isinstance(layer, AdamFactors)]
        if fitted:
            known = {
                "adam_objective_before_mean": sum(f.before for f in fitted) / len(fitted),
                "adam_objective_after_mean": sum(f.after for f in fitted) / len(fitted),
            }
        return {
            "loss": self.loss,
            "n_examples": self.n_examples,
            "n_tokens": self.n_tokens,
            "seconds": round(self.seconds, 3),
            "estimator": self.estimator,
            "dropout": self.dropout,
            "cache_file": self.cache_file,
            **known,
            **({"error_estimate_worst": max(self.errors)} if self.errors else {}),
        }


def choose_estimator(
    config: ExperimentConfig, model: Any, targets: Sequence[str], ranks: Mapping[str, int], n_examples: int
) -> EstimatorChoice:
    """The estimator that ``init.estimator`` means here, and the number of triplets to keep.

    ``n_examples`` are those of one process: each renews its own directions.

    Raises:
        UserError: If ``init.n_triplets`` is less than a rank needs.
    """
    needed = max(config.gradient_start().triplets_needed(rank) for rank in ranks.values())
    kept = config.init.n_triplets or triplets_to_keep(needed)
    if kept < needed:
        raise UserError(f"init.n_triplets={kept}: the adapters' ranks need {needed}; raise it, or use null")
    name: str = config.init.estimator
    if name == "auto":
        is_small = n_examples < ONE_PASS_EXAMPLES
        needs_all = config.init.objective != "gradient" or shared_elsewhere(model, targets) is not None
        name = "exact" if needs_all else "sketch_two_pass" if is_small else "sketch"
    return EstimatorChoice(name, kept)


def estimate_gradient(
    model: Any,
    targets: Sequence[str],
    examples: Sequence[Encoded],
    config: ExperimentConfig,
    *,
    ranks: Mapping[str, int],
    pad_id: int,
    processes: Processes,
    decode: Callable[[Encoded], str] | None = None,
) -> GradientEstimate:
    """Estimates the gradient of the training loss at the pretrained weights.

    The processes share the sample's batches.

    Args:
        model: The pretrained model, without adapters; quantised, sharded or neither.
        targets: Names of the layers whose weight gradient is wanted; no other is computed.
        examples: The training split, cut at ``init.max_length``.
        config: ``init`` names the sample, the estimator and what is made of it, ``model.loss_reduction``
            the loss.
        ranks: Adapter rank of each target.
        pad_id: Padding token.
        processes: Who shares the work.
        decode: Shows an example to people, when one has to be named.

    Raises:
        UserError: If a target's gradient is zero or does not arrive, or a batch's is not finite.
    """
    begin = time.perf_counter()
    indices, batches = sample_batches(examples, config, processes)
    estimator = choose_estimator(config, model, targets, ranks, len(indices) // processes.world_size)
    sample = _Sample(model, examples, batches, len(indices), pad_id, config, processes, decode)
    estimate = _exactly if estimator.name == "exact" else _streaming
    layers, errors = estimate(sample, targets, ranks, estimator)
    if sample.loss_scale != 1:
        layers = {name: _divided(layer, sample.loss_scale) for name, layer in layers.items()}
    return GradientEstimate(
        layers=layers,
        estimator=estimator.name,
        dropout=config.init.dropout,
        errors=errors,
        loss=float(processes.sum_(torch.tensor(sample.loss))),
        n_examples=len(indices),
        n_tokens=sum(len(examples[index].ids) for index in indices),
        seconds=time.perf_counter() - begin,
    )


@dataclass
class _Sample:
    """This process's share of the sample; ``run`` goes through it, ``loss`` is that of the last time."""

    model: Any
    examples: Sequence[Encoded]
    batches: Sequence[list[Slot]]
    n_examples: int
    pad_id: int
    config: ExperimentConfig
    processes: Processes
    decode: Callable[[Encoded], str] | None = None
    loss: float = 0.0

    @property
    def loss_scale(self) -> float:
        """Float16 ends at 6e-8, where a token's share of the gradient often is, and at 65,504."""
        return 2.0**12 if self.config.model.fp16 else 1.0

    def run(
        self,
        is_finite: Callable[[], bool],
        after_batch: Callable[[int], None] = lambda number: None,
        name: str = "gradient",
    ) -> None:
        """Runs every batch forward and backward.

        Args:
            is_finite: Whether everything that the backward passes left so far is finite.
            after_batch: Called with the number of batches done.
            name: Of the progress bar.

        Raises:
            UserError: Naming the batch whose loss or gradient is not finite.
        """
        self.loss = 0.0
        with self._shown(name) as show:
            for number, slots in enumerate(self.batches, start=1):
                self.loss += self._run_batch(number, slots)
                if not is_finite():
                    raise self._not_finite(number, slots, "its gradient is not finite")
                after_batch(number)
                show(number)

    def _run_batch(self, number: int, slots: list[Slot]) -> float:
        batch = collate_slots(self.examples, slots, self.pad_id)
        with _own_randomness(self.config, slots):
            loss = weighted_loss(self.model, to_device(batch, self.processes.device))
            if not torch.isfinite(loss):
                raise self._not_finite(number, slots, f"its loss is {loss.item()}")
            (loss * self.loss_scale).backward()
        return loss.item()

    def _not_finite(self, number: int, slots: list[Slot], what: str) -> UserError:
        indices = [index for index, _ in slots if index >= 0]
        where = ", ".join(str(index) for index in indices[:8]) + (", ..." if len(indices) > 8 else "")
        text = f" (the first: {self.decode(self.examples[indices[0]])!r})" if self.decode and indices else ""
        process = f" of process {self.processes.rank}" if self.processes.world_size > 1 else ""
        low = next((key for key in ("bf16", "fp16") if getattr(self.config.model, key)), None)
        precision = f", or compute in float32 (model.{low}=false)" if low else ""
        return UserError(
            f"gradient batch {number} of {len(self.batches)}{process}: {what}; look at examples {where} of "
            f"the encoded training split{text} and at the weights{precision}"
        )

    @contextmanager
    def _shown(self, name: str) -> Iterator[Callable[[int], None]]:
        """A bar over the tokens of all processes, and for the whole split, a line with the time expected."""
        own = [sum(len(self.examples[i].ids) for i, _ in slots if i >= 0) for slots in self.batches]
        everyone = self.processes.sum_(torch.tensor(float(sum(own)), dtype=torch.float64)).item()
        share = everyone / max(1, sum(own))
        announces = self.config.init.do_subsampling is False
        begin = time.perf_counter()
        with progress_bar(
            shown=self.processes.is_main, desc=name, total=round(everyone), unit=" tokens", unit_scale=True
        ) as bar:

            def show(number: int) -> None:
                bar.update(round(share * sum(own[:number])) - bar.n)
                if announces and number == min(_ANNOUNCE_AFTER, len(own)):
                    expected = (time.perf_counter() - begin) / number * len(own) / 60
                    self.processes.say(
                        f"init.do_subsampling=false: {name} of the whole training split, "
                        f"{self.n_examples:,} examples, expected {expected:.1f} min"
                    )

            yield show


def _divided(layer: LayerEstimate, scale: float) -> LayerEstimate:
    assert isinstance(layer, Triplets)  # check_combinations lets nothing else through
    return replace(layer, S_K=layer.S_K / scale, norm=layer.norm / scale)


@contextmanager
def _own_randomness(config: ExperimentConfig, slots: list[Slot]) -> Iterator[None]:
    """With dropout on, each batch draws its own masks: in every pass, on whatever process, the same."""
    if not config.init.dropout:
        yield
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.seed * 2**20 + slots[0][0] + 1)
        yield


def _exactly(
    sample: _Sample, targets: Sequence[str], ranks: Mapping[str, int], estimator: EstimatorChoice
) -> tuple[dict[str, LayerEstimate], tuple[float, ...]]:
    """Whole gradients, summed over batches and processes; then what the start needs of each."""
    config, processes = sample.config, sample.processes
    settings = {"dropout": config.init.dropout, "offload": config.init.offload}
    with collect_gradients(sample.model, targets, **settings) as sums:
        sample.run(lambda: sums.is_finite)
    for G_OI in sums.unique():
        processes.sum_(G_OI)
    start, generator = config.gradient_start(), torch.Generator().manual_seed(config.seed)
    layers = {}
    for name in progress_bar(targets, shown=processes.is_main, desc="decomposition", unit="layer"):
        G_OI = sums.G_OI.pop(name).to(processes.device)
        n_triplets = min(estimator.n_triplets, *G_OI.shape)
        layers[name] = reduce_gradient(name, G_OI, start, ranks[name], generator, n_triplets)
    return layers, ()


def _streaming(
    sample: _Sample, targets: Sequence[str], ranks: Mapping[str, int], estimator: EstimatorChoice
) -> tuple[dict[str, LayerEstimate], tuple[float, ...]]:
    """Sketches in one pass or two."""
    found: dict[str, SketchedGradient]
    config, processes = sample.config, sample.processes
    settings: dict[str, Any] = {"seed": config.seed, "dropout": config.init.dropout}
    if estimator.name == "sketch":
        with one_pass(sample.model, targets, estimator.size, **settings) as sketches:
            sample.run(sketches.are_finite)
        found = sketches.finish(processes)
    else:
        names = iter(("gradient, pass 1 of 2", "gradient, pass 2 of 2"))
        found = two_passes(
            sample.model,
            targets,
            estimator.size,
            run_pass=lambda sketches, after: sample.run(sketches.are_finite, after, next(names)),
            processes=processes,
            **settings,
        ).finish(processes)
    layers: dict[str, LayerEstimate] = {}
    for name, part in found.items():
        n_triplets = min(estimator.n_triplets, *shape_OI(sample.model.get_submodule(name)))
        layers[name] = part.triplets(name, n_triplets)
    return layers, tuple(part.error for part in found.values())
