"""Combinations of settings that cannot be, or would have no effect: each is refused in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_one.errors import UserError

if TYPE_CHECKING:
    from lora_one.config import ExperimentConfig, InitConfig, PeftConfig

_SVD_SCALES = ("default", "stable", "unit", "normalized")
_GRADIENT_SCALES = ("stable", "gd", "gd_scale", "unit", "weightS", "weight_svd")
_SAMPLE_KEYS = {"bsz", "iters", "max_length", "do_subsampling", "sub_size"}
_OWN_START_KEYS = {"dtype", "shift"}
# What each mode reads; any other key of ``init`` would have no effect.
_MODE_KEYS: dict[str, set[str]] = {
    "simple": {"lora_A", "lora_B", "lora_A_std", "lora_B_std", "norm_clip"},
    "svd": {"scale", "stable_gamma", "norm_clip"},
    "gradient": {
        "direction",
        "scale",
        "stable_gamma",
        "normalize",
        "objective",
        "estimator",
        "n_triplets",
        "offload",
        "dropout",
        "norm_clip",
        *_SAMPLE_KEYS,
    },
    "pissa": set(),
    "olora": set(),
    "eva": {"eva_rho", *_SAMPLE_KEYS},
    "corda": {"corda_method", *_SAMPLE_KEYS},
    "peft_lora_ga": {"direction", "scale", "stable_gamma", *_SAMPLE_KEYS},
    "adapter": {"adapter"},
}
# Those that full fine-tuning leaves out.
FACTOR_PROBES = {"subspaces", "spectrum", "variance", "reference"}
# What init.mode=adapter does not take from the adapter.
_OWN_PEFT_KEYS = {"use_peft", "use_loraplus", "loraplus_lr_ratio"}


def check_combinations(config: ExperimentConfig, named: frozenset[str] | set[str]) -> None:
    """Raises UserError for the first of them.

    Args:
        config: All settings.
        named: Keys that were named on the command line.
    """
    peft, init = config.peft, config.init
    asked = sorted(key for key in named if key == "init" or key.startswith("init."))
    if not peft.use_peft and not init.is_plain_lora and asked:
        raise UserError(
            f"{asked[0]}: full fine-tuning has no adapter to initialise; leave it out, or use peft=all"
        )
    if peft.use_peft:
        _check_adapter(peft, init)
        if init.mode == "adapter":
            _check_continued(peft, init)
        _check_mode(init, named)
        _check_scale(init)
        if init.estimator not in ("auto", "exact") and init.objective != "gradient":
            raise UserError(
                f"init.objective={init.objective}: needs every entry of the gradient, which "
                f"init.estimator={init.estimator} never forms; use init.estimator=exact"
            )
        if config.model.fp16 and (init.objective != "gradient" or init.mode == "peft_lora_ga"):
            raise UserError(
                "model.fp16=true: this start would read gradients that underflow in float16; use "
                "model.fp16=false, or init=gradient with init.objective=gradient"
            )
        conflict = config.gradient_start().conflict() if init.mode == "gradient" else None
        if conflict is not None:
            raise UserError(f"init.{conflict[0]}={getattr(init, conflict[0])}: {conflict[1]}")
    shifts = init.mode == "gradient" and config.gradient_start().shifts_base
    if config.model.quantization and peft.dora and shifts and init.shift == "auto":
        raise UserError(
            "peft.dora=true: on a quantised base DoRA needs the norm of the shifted weight; "
            "use init.shift=weight, or init.direction=LoRA-One"
        )
    if {"model.warmup_steps", "model.warmup_ratio"} <= set(named) and config.model.warmup_ratio is not None:
        raise UserError("model.warmup_steps, model.warmup_ratio: two lengths of one warm-up; leave one out")
    if "model.warmup_steps" in named and config.model.warmup_ratio is not None:
        raise UserError(
            f"model.warmup_steps: model.warmup_ratio={config.model.warmup_ratio:g} sets the warm-up; "
            "add model.warmup_ratio=null"
        )
    if {"model.eval_epochs", "model.eval_points"} <= set(named) and config.model.eval_points is not None:
        raise UserError("model.eval_epochs, model.eval_points: two rhythms of one measurement; leave one out")
    if config.model.max_tokens_per_device and config.model.per_device_batch_size:
        raise UserError(
            "model.max_tokens_per_device, model.per_device_batch_size: two sizes of a micro-batch; "
            "leave one out"
        )
    if config.model.bf16 and config.model.fp16:
        raise UserError("model.bf16=true, model.fp16=true: two number formats; leave one out")
    if config.model.fp16 and init.dtype == "bf16" and peft.use_peft:
        raise UserError("model.fp16=true, init.dtype=bf16: a scaled loss wants fp32 factors; leave one out")
    if config.model.keep_best and peft.adalora:
        raise UserError("model.keep_best=true: AdaLoRA runs write no checkpoints; leave it out")
    if config.model.is_pair:
        _check_pair(config)
    if config.optimizer.is_preconditioned and (peft.adalora or not peft.use_peft):
        what = "AdaLoRA's three factors have rules of their own" if peft.adalora else "there are no factors"
        raise UserError(f"optimizer={config.optimizer.name}: {what}; use optimizer=adamw")
    if config.model.quantization and not peft.use_peft:
        raise UserError("model.quantization: quantised weights cannot be trained; use peft=all")
    _check_probes(config)
    _check_effects(config, named)


def _check_probes(config: ExperimentConfig) -> None:
    probes, model = config.probes, config.model
    if probes.is_on and config.peft.adalora:
        raise UserError("probes: AdaLoRA moves ranks between its three factors; use probes=none")
    if probes.snapshots and config.peft.use_peft:
        raise UserError("probes.snapshots=true: keeps the weights of full fine-tuning; use peft=full_ft")
    if probes.is_on and not config.peft.use_peft and set(probes.names) <= FACTOR_PROBES:
        raise UserError(
            f"probes: {', '.join(probes.names)} look at an adapter's factors, and full fine-tuning has none; "
            "use probes=[update,curvature]"
        )
    if probes.reference is not None and config.peft.dora:
        raise UserError(
            "probes.reference: not with DoRA, whose magnitudes move the weights too; leave it out"
        )
    if not probes.curvature:
        return
    attention = model.attn_implementation or ""
    for key, is_so in (
        (f"model.quantization={model.quantization}", model.quantization is not None),
        ("model.fp16=true", model.fp16),
        (f"model.attn_implementation={attention}", "flash" in attention or "flex" in attention),
    ):
        if is_so:
            raise UserError(f"{key}: cannot be differentiated twice; use probes.curvature=false")


def _check_pair(config: ExperimentConfig) -> None:
    """What does not go with an encoder and a decoder."""
    if config.dataset.chat:
        raise UserError(
            f"dataset.chat=true: a chat template writes one text, for a decoder alone (model.type="
            f"{config.model.type}); use dataset.chat=false"
        )
    if config.model.packing:
        raise UserError(
            f"model.packing=true: an encoder reads across the examples of one row (model.type="
            f"{config.model.type}); use model.packing=false"
        )
    if not config.peft.use_peft:
        return
    if config.peft.train_embeddings:
        raise UserError(
            f"peft.train_embeddings=true: PEFT cannot train what encoder, decoder and head share (model.type="
            f"{config.model.type}); use peft=all or peft=full_ft"
        )
    if config.init.mode == "eva":
        raise UserError(
            f"init.mode=eva: PEFT's EVA chooses tokens by one mask for all layers, which encoder and decoder "
            f"have not (model.type={config.model.type}); use init=gradient or another start"
        )


def _check_mode(init: InitConfig, named: frozenset[str] | set[str]) -> None:
    """A key that the mode does not read is refused, not ignored."""
    idle = sorted(init.model_fields_set - {"mode"} - _MODE_KEYS[init.mode] - _OWN_START_KEYS)
    if idle:
        key = f"init.mode={init.mode}" if "init.mode" in named else f"init.{idle[0]}"
        group = "init=default" if init.mode == "simple" else f"init={init.mode}"
        raise UserError(
            f"{key}: {idle[0]} has no effect with init.mode={init.mode}; use {group} alone, "
            "or the mode that reads it"
        )


def _check_scale(init: InitConfig) -> None:
    valid = {"svd": _SVD_SCALES, "gradient": _GRADIENT_SCALES}.get(init.mode)
    if init.mode == "peft_lora_ga":
        valid = ("stable", "weight_svd", "gd_scale", "unit")
        if init.direction == "LoRA-One":
            raise UserError("init.direction=LoRA-One: PEFT's lora_ga has no such direction; use LoRA-GA")
    if valid is not None and init.scale not in valid:
        raise UserError(f"init.scale={init.scale}: not for init.mode={init.mode}; valid: {', '.join(valid)}")


def _check_adapter(peft: PeftConfig, init: InitConfig) -> None:
    if peft.adalora and not init.is_plain_lora:
        raise UserError("peft.adalora=true: AdaLoRA has its own start; use init=default")
    if peft.adalora and (peft.dora or peft.use_loraplus or peft.rank_pattern or peft.alpha_pattern):
        raise UserError(
            "peft.adalora=true: does not go with dora, use_loraplus, rank_pattern or alpha_pattern"
        )
    if init.mode == "simple" and (init.lora_A, init.lora_B) == ("zeros", "zeros"):
        raise UserError("init.lora_A=zeros, init.lora_B=zeros: two zero factors never learn; change one")
    if peft.dora and init.shift == "adapter":
        raise UserError(
            "init.shift=adapter: DoRA needs the norm of the shifted weight; use init.shift=weight"
        )


def _check_continued(peft: PeftConfig, init: InitConfig) -> None:
    if init.adapter is None:
        raise UserError(
            "init.adapter: is required with init.mode=adapter; give an adapter's folder or Hub id"
        )
    for key, field in type(peft).model_fields.items():
        if key not in _OWN_PEFT_KEYS and getattr(peft, key) != field.default:
            raise UserError(f"peft.{key}: init.mode=adapter takes it from the adapter; leave it out")


def _check_effects(config: ExperimentConfig, named: frozenset[str] | set[str]) -> None:
    peft, init, optimizer = config.peft, config.init, config.optimizer
    peft_keys = set(type(peft).model_fields)
    without_effect = [(f"peft.{key}", not peft.use_peft, "peft=all") for key in sorted(peft_keys)]
    without_effect += [
        *(
            (f"peft.{key}", init.mode == "adapter", "another init")
            for key in sorted(peft_keys - _OWN_PEFT_KEYS)
        ),
        ("init.offload", init.estimator.startswith("sketch"), "init.estimator=exact"),
        ("init.n_triplets", init.objective == "adam", "init.objective=gradient"),
        ("init.sub_size", init.do_subsampling is None, "init.do_subsampling=true"),
        ("init.normalize", init.direction != "LoRA-One", "init.direction=LoRA-One"),
        ("init.stable_gamma", init.scale != "stable", "init.scale=stable"),
        ("init.shift", init.mode == "gradient" and init.direction == "LoRA-One", "init.direction=LoRA-GA"),
        ("init.lora_A_std", init.lora_A != "gaussian", "init.lora_A=gaussian"),
        ("init.lora_B_std", init.lora_B != "gaussian", "init.lora_B=gaussian"),
        ("peft.lora_r", peft.lora_relative_r is not None, "peft.lora_relative_r=null"),
        ("peft.use_rslora", peft.adalora, "peft.adalora=false"),
        ("peft.loraplus_lr_ratio", not peft.use_loraplus, "peft.use_loraplus=true"),
        *((f"probes.{key}", not config.probes.is_on, "probes=all") for key in ("every", "n_examples")),
        ("probes.products", not config.probes.curvature, "probes.curvature=true"),
        *(
            (f"dataset.{key}", config.dataset.name != "custom", "dataset=custom")
            for key in ("prompt", "target", "answer", "messages")
        ),
        ("dataset.revision", config.dataset.train_file is not None, "the dataset of the Hub"),
        ("dataset.streaming", config.dataset.train_file is not None, "the dataset of the Hub"),
        ("eval.during_training", config.eval.task is None, "eval.task=gsm8k"),
    ]
    without_effect += [
        (f"optimizer.{key}", not optimizer.reads(key), f"another optimizer than {optimizer.name}")
        for key in type(optimizer).model_fields
    ]
    for key, is_idle, remedy in without_effect:
        if key in named and is_idle and key != "peft.use_peft":
            raise UserError(f"{key}: has no effect here; leave it out, or use {remedy}")
