"""The model to train: adapters on the targets, started as the configuration says."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lora_one import adapters
from lora_one.adapters import InitReport
from lora_one.baselines import PEFT_MODES, peft_starts
from lora_one.config import ExperimentConfig
from lora_one.data.batches import IGNORED, Batch, collate
from lora_one.data.encoding import Encoded
from lora_one.inits import AdapterInit, clip_to_weight, simple_factors
from lora_one.layers import shape_OI
from lora_one.losses import pair_inputs, to_device
from lora_one.models import LoadedModel, adapter_alphas, adapter_rank, adapter_ranks
from lora_one.modes import in_mode
from lora_one.starts import LayerEstimate, gradient_starts, weight_starts

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def start_adapters(
    config: ExperimentConfig,
    loaded: LoadedModel,
    *,
    estimates: Mapping[str, LayerEstimate] | None,
    stored: Mapping[str, AdapterInit] | None,
    batches: Iterable[Batch],
    total_steps: int,
    probe: Callable[[Any], Tensor],
) -> tuple[PeftModel, dict[str, AdapterInit], InitReport | None]:
    """Adds the adapters and starts them.

    Args:
        config: The experiment.
        loaded: The pretrained model; becomes part of the result.
        estimates: What is known of the gradients, with ``init.mode=gradient``.
        stored: The starts of an interrupted run, which are taken as they are.
        batches: The sample, for the starts of PEFT that look at data.
        total_steps: Optimiser steps to come; AdaLoRA plans with them.
        probe: Logits of a model on a few examples.

    Returns:
        The model, the starts as the adapters hold them (none for PEFT's own, with ``B = 0``), and what
        they did.
    """
    model, targets, dtype = loaded.model, loaded.targets, _DTYPES[config.init.dtype]
    if config.init.mode == "adapter":
        assert config.init.adapter is not None
        adapted, report = adapters.continue_adapter(model, config.init.adapter, dtype, probe)
        return adapted, {}, report
    common: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM" if config.model.is_pair else "CAUSAL_LM"}
    if config.peft.train_embeddings:
        common |= trained_along(model)
    if config.peft.adalora:
        rank = adapter_rank(model, config.peft)
        adalora = adapters.adalora_config(targets, config.peft, rank, total_steps, **common)
        return adapters.add_adapter(model, adalora, config.seed, dtype), {}, None
    ranks, alphas = adapter_ranks(model, targets, config.peft), adapter_alphas(targets, config.peft)
    inits = dict(stored) if stored is not None else None
    if inits is None and config.init.mode in PEFT_MODES:
        inits = peft_starts(model, targets, config, ranks=ranks, alphas=alphas, batches=batches)
    if inits is not None:
        # EVA moves ranks between the layers, and keeps each layer's alpha / r.
        targets = tuple(inits)
        alphas = {name: alphas[name] * inits[name].A_RI.shape[0] / ranks[name] for name in inits}
        ranks = {name: init.A_RI.shape[0] for name, init in inits.items()}
    peft_config = adapters.lora_config(targets, config.peft, ranks, alphas, **common)
    adapted = adapters.add_adapter(model, peft_config, config.seed, dtype)
    if inits is None:
        inits = _own_starts(config, adapted, targets, ranks, estimates)
    if not inits:
        return adapted, {}, None
    report = adapters.apply_init(adapted, inits, shift=config.init.shift, probe=lambda: probe(adapted))
    return adapted, adapters.stored_init(adapted, inits), report


def trained_along(model: Any) -> dict[str, Any]:
    """PEFT's settings to train the embeddings and the output head in full, tied where they are tied."""
    names = {id(module): name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return {"modules_to_save": [names[id(embeddings)]]}
    is_tied = head.weight is embeddings.weight
    saved = [names[id(embeddings)]] if is_tied else [names[id(embeddings)], names[id(head)]]
    return {"modules_to_save": saved, "ensure_weight_tying": is_tied}


@torch.no_grad()
def probe_logits(model: Any, examples: Sequence[Encoded], pad_id: int, device: torch.device) -> Tensor:
    """The model's logits on a few examples, in eval mode, padding left out; of pairs, the decoder's."""
    batch = to_device(collate([(example, 0.0) for example in examples], pad_id), device)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    is_read = batch["attention_mask"].bool()
    if model.config.is_encoder_decoder:
        inputs, is_read = pair_inputs(model, batch), batch["labels"] != IGNORED
    with in_mode(model, training=False):
        output = model(**inputs, use_cache=False)
    return output.logits[is_read].float()


def _own_starts(
    config: ExperimentConfig,
    model: PeftModel,
    targets: Sequence[str],
    ranks: Mapping[str, int],
    estimates: Mapping[str, LayerEstimate] | None,
) -> dict[str, AdapterInit]:
    init, read_weight = config.init, adapters.weight_reader(model)
    scalings = adapters.scalings(model)
    if init.mode == "gradient":
        assert estimates is not None
        return gradient_starts(
            estimates, config.gradient_start(), ranks=ranks, scalings=scalings, read_weight=read_weight
        )
    if init.mode == "svd":
        return weight_starts(
            tuple(targets),
            scale=init.scale,
            gamma=init.gamma,
            norm_clip=init.norm_clip,
            ranks=ranks,
            scalings=scalings,
            read_weight=read_weight,
        )
    if init.is_plain_lora:
        return {}
    return _simple_starts(config, model, targets, ranks, scalings)


def _simple_starts(
    config: ExperimentConfig,
    model: PeftModel,
    targets: Sequence[str],
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
) -> dict[str, AdapterInit]:
    init, generator = config.init, torch.Generator().manual_seed(config.seed)
    read_weight, layers = adapters.weight_reader(model), adapters.lora_layers(model)
    starts = {}
    for name in targets:
        start = simple_factors(
            shape_OI(layers[adapters.PREFIX + name].get_base_layer()),
            rank=ranks[name],
            kind_A=init.lora_A,
            kind_B=init.lora_B,
            std_A=init.lora_A_std,
            std_B=init.lora_B_std,
            generator=generator,
        )
        if init.norm_clip:
            start = clip_to_weight(start, read_weight(name).cpu(), scalings[name])
        starts[name] = start
    return starts
