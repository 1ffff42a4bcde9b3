"""The starts of other methods, computed by PEFT: PiSSA, OLoRA, CorDA, EVA, and PEFT's own ``lora_ga``.

PEFT's ``lora_ga`` is offered for comparison: it is not the paper's formula (B carries the gradient's
singular values, the stable scale goes on B alone, ``random`` takes equal indices for both factors).
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict, get_peft_model
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda

from lora_one.adapters import ADAPTER, PREFIX, lora_config, lora_layers
from lora_one.config import ExperimentConfig
from lora_one.data.batches import IGNORED, Batch
from lora_one.errors import UserError
from lora_one.inits import AdapterInit
from lora_one.layers import quantisation, shape_OI
from lora_one.losses import pair_inputs, weighted_loss

PEFT_MODES = ("pissa", "olora", "corda", "eva", "peft_lora_ga")
_SCALES = {"gd": "gd_scale", "weightS": "weight_svd"}


def peft_starts(
    model: Any,
    targets: Sequence[str],
    config: ExperimentConfig,
    *,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    batches: Iterable[Batch],
) -> dict[str, AdapterInit]:
    """The start of every target as PEFT computes it. The model is as before afterwards.

    Args:
        model: The pretrained model, without adapters.
        targets: Full names of the layers.
        config: ``init.mode`` is one of ``PEFT_MODES``.
        ranks: Adapter rank of each target.
        alphas: Its alpha.
        batches: Of the sample, on the device; read where the method looks at data. Their weights make
            the sum of the losses the mean loss.

    Returns:
        The starts. EVA moves ranks between the layers: each start has its own, and a layer without
        any is left out.

    Raises:
        UserError: For a quantised layer.
    """
    mode = config.init.mode
    for name in targets:
        kind = quantisation(model.get_submodule(name))
        if kind is not None and mode != "eva":
            raise UserError(
                f"init.mode={mode}: {name} is quantised ({kind}), which PEFT's start does not support; "
                "use init=gradient or init=default, or model.quantization=null"
            )
    plain = config.peft.model_copy(update={"dora": False, "lora_dropout": 0.0})

    def settings(**start: Any) -> LoraConfig:
        return lora_config(targets, plain, ranks, alphas, **start)

    if mode == "eva":
        eva = settings(init_lora_weights="eva", eva_config=EvaConfig(rho=config.init.eva_rho))
        return _eva(model, eva, max(ranks.values()), list(batches))
    if mode == "corda":
        corda = CordaConfig(corda_method=config.init.corda_method)
        start = settings(init_lora_weights="corda", corda_config=corda)
        run_model = partial(_forward, model, batches)
        prepare: Callable[[], object] = partial(preprocess_corda, model, start, run_model)
    elif mode == "peft_lora_ga":
        start = settings(init_lora_weights="lora_ga", lora_ga_config=_peft_lora_ga(config))
        prepare = partial(preprocess_loraga, model, start, partial(_backward, model, list(batches)))
    else:
        start = settings(init_lora_weights=mode)
        prepare = bool  # nothing to do
    return _captured(model, targets, start, prepare, config.seed)


def _captured(
    model: Any, targets: Sequence[str], start: LoraConfig, prepare: Callable[[], object], seed: int
) -> dict[str, AdapterInit]:
    """The factors that PEFT starts with; the weights that it shifted are put back."""
    layers = {name: model.get_submodule(name) for name in targets}
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prepare()
        adapted = get_peft_model(model, start)
    factors = {
        name.removeprefix(PREFIX): (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
        for name, layer in lora_layers(adapted).items()
    }
    adapted.unload()
    if hasattr(model, "peft_config"):
        del model.peft_config
    with torch.no_grad():
        for name, weight in weights.items():
            layers[name].weight.data = weight
    for module, training in modes:
        module.training = training
    return {
        name: AdapterInit(A_RI.detach().cpu().float(), B_OR.detach().cpu().float(), shifts_base=True)
        for name, (A_RI, B_OR) in factors.items()
    }


def _eva(model: Any, start: LoraConfig, rank: int, batches: list[Batch]) -> dict[str, AdapterInit]:
    assert start.eva_config is not None
    needed = int(rank * start.eva_config.rho)
    most = max(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    if most < needed:
        raise UserError(
            f"init.mode=eva: its batches hold at most {most} target tokens, but {needed} components "
            "need as many; raise init.bsz, or lower peft.lora_r or init.eva_rho"
        )
    inputs = [{name: batch[name] for name in ("input_ids", "attention_mask", "labels")} for batch in batches]
    components = get_eva_state_dict(
        model, inputs, peft_config=start, gather_distributed_inputs=False, show_progress_bar=False
    )
    starts = {}
    for name, A_RI in components.items():
        own_rank, n_out = A_RI.shape[0], shape_OI(model.get_submodule(name))[0]
        if own_rank > 0:
            starts[name] = AdapterInit(A_RI.cpu().float(), torch.zeros(n_out, own_rank), shifts_base=False)
    return starts


def _peft_lora_ga(config: ExperimentConfig) -> LoraGAConfig:
    init = config.init
    direction: Any = "ArB2r" if init.direction == "LoRA-GA" else init.direction
    scale: Any = _SCALES.get(init.scale, init.scale)
    gamma: Any = init.gamma  # PEFT says int, and takes its root
    return LoraGAConfig(direction=direction, scale=scale, stable_gamma=gamma)


def _forward(model: Any, batches: Iterable[Batch]) -> None:
    """One example at a time, without padding: PEFT's CorDA reads the inputs of batches of one."""
    with torch.no_grad():
        for batch in batches:
            for ids_T, mask_T, labels_T in zip(
                batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
            ):
                inputs = {"input_ids": ids_T[mask_T.bool()][None]}
                if model.config.is_encoder_decoder:
                    alone = {
                        "attention_mask": mask_T[mask_T.bool()][None],
                        "labels": labels_T[labels_T != IGNORED][None],
                    }
                    inputs = pair_inputs(model, inputs | alone)
                model(**inputs, use_cache=False)


def _backward(model: Any, batches: Sequence[Batch]) -> None:
    """PEFT divides the sum of the gradients by the number of backward passes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        for batch in batches:
            (weighted_loss(model, batch) * len(batches)).backward()
