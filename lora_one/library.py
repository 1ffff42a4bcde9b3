"""LoRA-GA and LoRA-One in one's own training script, in PEFT's idiom.

    from lora_one import LoraConfig, LoraOneConfig, get_peft_model, preprocess_lora_one

    config = LoraConfig(r=8, init_lora_weights="lora_one", lora_one_config=LoraOneConfig())
    preprocess_lora_one(model, config, train_step)  # train_step runs forward and backward passes
    peft_model = get_peft_model(model, config)

It needs neither Hydra nor the experiment runner. What ``save_pretrained`` writes loads with stock PEFT on
the untouched base model.
"""

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_one import adapters
from lora_one.cache import identity, load_estimates, save_estimates
from lora_one.collect import Calls, GradientSums, collect_gradients
from lora_one.errors import UserError
from lora_one.layers import is_linear, read_weight, settle, shape_OI, why_unsupported
from lora_one.models import refuse_shared_modules
from lora_one.portable_model import make_portable
from lora_one.processes import Processes
from lora_one.settings import MARK, PREPROCESS, is_gradient_start, start_config, start_kind, stock_config
from lora_one.sketch import sketch_size, triplets_to_keep
from lora_one.starts import GradientStart, LayerEstimate, gradient_starts, reduce_gradient
from lora_one.streaming import one_pass
from lora_one.triplets import Triplets

_SAMPLED = 256
_QUANTISATION_ERROR = 0.5  # 4-bit weights are a tenth away, those of another model more than the whole


@dataclass(frozen=True)
class _Prepared:
    layers: dict[str, LayerEstimate]
    identity: dict[str, Any]


def preprocess_loraga(
    model: Any,
    lora_config: peft.LoraConfig,
    train_step: Callable[[], None] | None = None,
    cache_file: str | Path | None = None,
) -> None:
    """Estimates the gradients that ``get_peft_model`` starts the adapters from.

    The gradient is the mean over the model calls of ``train_step`` whose output takes part in a
    backward pass, summed in float32; with ``torch.distributed`` running, also over its processes.
    Dropout is off meanwhile. Gradients are taken away as they are made, so that zeroing them between
    batches does no harm; changing a weight is an error. The result stays with ``lora_config``, so
    that it also serves another copy of the model, such as a quantised one.

    Args:
        model: The pretrained model, without adapters; also in 4-bit or 8-bit (bitsandbytes), spread over
            devices by a device map, or sharded by ``fully_shard``.
        lora_config: With ``init_lora_weights="lora_ga"`` and a ``lora_ga_config``, or ``"lora_one"`` and a
            ``lora_one_config``.
        train_step: Runs forward and backward passes of ``model``. Not called where ``cache_file`` exists.
        cache_file: Where the estimates are kept (safetensors, whatever its name), and read if it exists.

    Raises:
        UserError: If the config has no gradient start, no backward pass reaches a target, its gradient
            is zero or not finite, a target cannot take an adapter, or the cache does not fit.
    """
    _check_model(model)
    start, estimator = start_config(lora_config).start(), start_config(lora_config).estimator
    made_for, conflict = identity(start, estimator), start.conflict()
    if conflict is not None:
        raise UserError(f"{conflict[0]}: {conflict[1]}")
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise UserError("the model already has adapters; estimate the gradients before get_peft_model")
    ranks = resolve_ranks(model, lora_config, start)
    cache = Path(cache_file) if cache_file is not None else None
    if cache is not None and _from_main(cache.is_file() and cache.stat().st_size > 0):
        layers, samples = _together(lambda: load_estimates(cache, made_for))
        _check_fit(model, layers, ranks, start, str(cache))
        _check_weights(model, samples, str(cache))
    elif train_step is None and cache is not None:
        raise UserError(f"{cache}: no such file yet; give a train_step, which makes it")
    else:
        layers = _estimate(model, ranks, start, estimator, train_step)
        if cache is not None:
            samples = _weight_samples(model, list(ranks))  # on every process: the weights may be sharded
            _together(lambda: save_estimates(cache, layers, made_for, samples))
    prepared: Any = lora_config
    prepared._lora_one_prepared = _Prepared(layers, made_for)
    prepared.init_lora_weights = f"{start_kind(lora_config)}{MARK}"


preprocess_lora_one = preprocess_loraga


def get_peft_model(
    model: Any, peft_config: peft.PeftConfig, adapter_name: str = "default", **settings: Any
) -> Any:
    """PEFT's ``get_peft_model``, with the starts ``lora_ga`` and ``lora_one``.

    Args:
        model: The pretrained model; for LoRA-GA its weights are shifted in place.
        peft_config: What ``preprocess_loraga`` has prepared, or any other config of PEFT's.
        adapter_name: Name of the adapter.
        settings: Passed on to PEFT.

    Returns:
        A PEFT model. Its ``save_pretrained`` writes an adapter for the untouched base model (LoRA-GA: of
        rank 2r), its ``init_report`` says what the start did.

    Raises:
        UserError: If the gradients were not prepared, or for another model.
    """
    if not is_gradient_start(peft_config):
        return peft.get_peft_model(model, peft_config, adapter_name=adapter_name, **settings)
    assert isinstance(peft_config, peft.LoraConfig)
    config = start_config(peft_config)
    prepared = getattr(peft_config, "_lora_one_prepared", None)
    if prepared is None:
        name = PREPROCESS[start_kind(peft_config)]
        raise UserError(f"no gradients: call {name}(model, lora_config, train_step) before get_peft_model")
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise UserError("the model already has adapters; a gradient start needs a model without")
    start = config.start()
    asked = identity(start, config.estimator)
    if asked != prepared.identity:
        raise UserError(f"prepared with {prepared.identity}, but {asked} is asked for; prepare them again")
    ranks = resolve_ranks(model, peft_config, start)
    shift = getattr(config, "shift", "auto")
    if peft_config.use_dora and start.shifts_base:
        for name in ranks:
            adapters.check_dora(name, model.get_submodule(name), shift)
    _check_fit(model, prepared.layers, ranks, start, "the prepared gradients")
    settle(model)
    adapted = peft.get_peft_model(model, stock_config(peft_config), adapter_name=adapter_name, **settings)
    inits = gradient_starts(
        {name: prepared.layers[name] for name in ranks},
        start,
        ranks=ranks,
        scalings=adapters.scalings(adapted, adapter_name),
        read_weight=adapters.weight_reader(adapted),
    )
    report = adapters.apply_init(adapted, inits, shift=shift, adapter=adapter_name)
    settle(model)
    if report.shift and peft_config.lora_dropout > 0:
        warnings.warn(
            "lora_dropout > 0 with LoRA-GA: dropout acts on the adapter and not on the shifted base, so the "
            "model starts at the pretrained function in eval mode only; use lora_dropout=0",
            stacklevel=2,
        )
    return make_portable(adapted, adapters.stored_init(adapted, inits, adapter_name), report, adapter_name)


def resolve_ranks(model: Any, config: peft.LoraConfig, start: GradientStart) -> dict[str, int]:
    """The layers that PEFT would adapt, and the rank of each.

    Raises:
        UserError: If there is none, one cannot take an adapter, or has too few directions for its rank.
    """
    if config.target_parameters or config.layer_replication:
        raise UserError("target_parameters, layer_replication: not with a gradient start; use target_modules")
    resolved: Any = copy.copy(config)
    if resolved.target_modules is None and not hasattr(model, "config"):
        raise UserError("target_modules: is required for this model")
    if resolved.target_modules is None:
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
        if known is None:
            raise UserError(f"target_modules: is required for a {model.config.model_type} model")
        resolved.target_modules = set(known)
    resolved = _maybe_include_all_linear_layers(resolved, model)
    _check_targets(model, resolved.target_modules)
    ranks = {}
    for name, module in model.named_modules():
        if not name or not check_target_module_exists(resolved, name):
            continue
        reason = why_unsupported(module)
        if reason is not None:
            raise UserError(f"target_modules: {name} cannot take an adapter, {reason}")
        pattern = config.rank_pattern or {}
        ranks[name] = rank = pattern.get(get_pattern_key(list(pattern), name), config.r)
        needed, limit = start.triplets_needed(rank), min(shape_OI(module))
        if needed > limit:
            raise UserError(
                f"rank {rank}: the start needs {needed} directions, but {name} has rank {limit}; "
                "lower r, or its rank_pattern"
            )
    if not ranks:
        raise UserError(
            f"target_modules={config.target_modules}: no layer is left with exclude_modules="
            f"{config.exclude_modules}, layers_to_transform={config.layers_to_transform}"
        )
    refuse_shared_modules(model, tuple(ranks))
    return ranks


def _check_targets(model: nn.Module, wanted: Any) -> None:
    """Raises UserError for a regular expression that is none, and for an entry that matches nothing."""
    names = [name for name, _ in model.named_modules() if name]
    known = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if is_linear(module)})
    try:
        missing = [] if any(re.fullmatch(wanted, name) for name in names) else [wanted]
    except re.error as error:
        raise UserError(f"target_modules={wanted!r}: no regular expression ({error})") from None
    except TypeError:  # a list of name endings
        missing = [end for end in wanted if not any(f".{name}".endswith(f".{end}") for name in names)]
    if missing:
        raise UserError(f"target_modules: {missing[0]!r} matches no layer; the model has: {', '.join(known)}")


def _estimate(
    model: Any,
    ranks: Mapping[str, int],
    start: GradientStart,
    estimator: str,
    train_step: Callable[[], None] | None,
) -> dict[str, LayerEstimate]:
    if not callable(train_step):
        raise UserError("train_step: give a function that runs forward and backward passes of the model")
    if estimator == "exact":
        with collect_gradients(model, list(ranks)) as sums:
            _run(model, ranks, train_step, sums)
        return _decompose(model, ranks, start, sums)
    needed = {name: start.triplets_needed(rank) for name, rank in ranks.items()}
    size = sketch_size(triplets_to_keep(max(needed.values())), two_passes=False)
    with one_pass(model, list(ranks), size, seed=start.seed) as sketches:
        _run(model, ranks, train_step, sketches.calls)
    processes = _processes()
    n_calls = int(processes.sum_(torch.tensor(sketches.calls.n_calls)))
    found = sketches.finish(processes)
    return {name: part.triplets(name, needed[name], divided_by=n_calls) for name, part in found.items()}


def _run(model: Any, ranks: Mapping[str, int], train_step: Callable[[], None], calls: Calls) -> None:
    """Runs the user's passes, and checks what they did; fails on every process if on one."""
    before = {name: _version(model.get_submodule(name)) for name in ranks}
    trouble: Exception | None = None
    try:
        with torch.enable_grad():
            train_step()
        _check_reached(model, calls, ranks, before)
    except StopIteration:
        trouble = UserError(f"train_step: its data ran out after {calls.n_calls} batches; take fewer")
    except Exception as error:
        trouble = error
    _raise_together(trouble)


def _decompose(
    model: Any, ranks: Mapping[str, int], start: GradientStart, sums: GradientSums
) -> dict[str, LayerEstimate]:
    processes = _processes()
    n_calls = int(processes.sum_(torch.tensor(sums.n_calls)))
    for tensor in sums.unique():
        processes.sum_(tensor)
    generator = torch.Generator().manual_seed(start.seed)
    layers = {}
    for name, rank in ranks.items():
        weight = model.get_submodule(name).weight
        device = processes.device if weight.is_meta else weight.device
        layers[name] = reduce_gradient(name, sums.G_OI[name].to(device) / n_calls, start, rank, generator)
    return layers


def _version(layer: Any) -> int | None:
    """Counts the changes of a weight; that of a sharded one also moves."""
    return None if isinstance(layer.weight, DTensor) else layer.weight._version


def _check_reached(
    model: nn.Module, calls: Calls, ranks: Mapping[str, int], before: Mapping[str, int | None]
) -> None:
    if not calls.reached:
        raise UserError(
            "train_step: no gradient arrived; call loss.backward() on a loss of this model, for every batch"
        )
    if calls.n_calls == 0:
        raise UserError(
            "train_step: the loss does not come from a call of the model itself, so the number of batches "
            "is unknown; call model(...), not a part of it"
        )
    for name in ranks:
        if name not in calls.reached:
            raise UserError(
                f"{name}: no gradient reached it; the forward pass of train_step does not use this layer, "
                "leave it out of target_modules"
            )
        if _version(model.get_submodule(name)) != before[name]:
            raise UserError(f"{name}: train_step changed its weight; run forward and backward passes only")


def _raise_together(trouble: Exception | None) -> None:
    """Raises on every process what went wrong on any, so that none waits for another."""
    messages = [f"{trouble}" if trouble is not None else None]
    if _n_processes() > 1:
        messages = [None] * _n_processes()
        dist.all_gather_object(messages, f"{trouble}" if trouble is not None else None)
    if trouble is not None:
        raise trouble
    for rank, message in enumerate(messages):
        if message is not None:
            raise UserError(f"process {rank}: {message}")


def _together(act: Callable[[], Any]) -> Any:
    """What the main process alone does, on every process; fails on all of them if there."""
    value, trouble = None, None
    if _is_main():
        try:
            value = act()
        except Exception as error:
            trouble = error
    _raise_together(trouble)
    return _from_main(value)


def _processes() -> Processes:
    """Those that ``torch.distributed`` runs; the user's program has started them."""
    if _n_processes() == 1:
        return Processes(rank=0, world_size=1, device=torch.device("cpu"))
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    return Processes(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)


def _weight_samples(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """A few entries of the first, the middle and the last target: enough to tell two models apart."""
    samples = {}
    for name in dict.fromkeys((names[0], names[len(names) // 2], names[-1])):
        flat = read_weight(model.get_submodule(name)).flatten()
        samples[name] = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].cpu().clone()
    return samples


def _check_weights(model: nn.Module, samples: Mapping[str, Tensor], what: str) -> None:
    """Raises UserError if the weights are not those of the estimate, quantisation apart."""
    for name, ours in _weight_samples(model, list(samples)).items():
        if torch.linalg.norm(ours - samples[name]) > _QUANTISATION_ERROR * torch.linalg.norm(samples[name]):
            raise UserError(f"{what}: made for other weights than those of {name}; give another cache_file")


def _check_fit(
    model: nn.Module,
    layers: Mapping[str, LayerEstimate],
    ranks: Mapping[str, int],
    start: GradientStart,
    what: str,
) -> None:
    """Raises UserError if estimates were made for other layers, shapes or ranks."""
    for name, rank in ranks.items():
        layer = layers.get(name)
        if layer is None:
            raise UserError(f"{what}: hold nothing on {name}; estimate them for this model and these targets")
        if isinstance(layer, Triplets):
            shape = (len(layer.U_OK), len(layer.V_IK))
            enough = layer.S_K.numel() >= start.triplets_needed(rank)
        else:
            shape = (len(layer.B_OR), layer.A_RI.shape[1])
            enough = layer.A_RI.shape[0] == rank
        if shape != shape_OI(model.get_submodule(name)):
            raise UserError(f"{what}: {name} is {shape[0]} x {shape[1]} there; they belong to another model")
        if not enough:
            raise UserError(f"{what}: made for another rank than {rank} of {name}; estimate them again")


def _check_model(model: Any) -> None:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UserError("the model is wrapped for several devices; give model.module")
    if not isinstance(model, nn.Module):
        raise UserError(f"the first argument is the model, the second the config; got {type(model).__name__}")


def _n_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _is_main() -> bool:
    return _n_processes() == 1 or dist.get_rank() == 0


def _from_main(value: Any) -> Any:
    """The main process's value, so that all take the same way."""
    box = [value]
    if _n_processes() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]
