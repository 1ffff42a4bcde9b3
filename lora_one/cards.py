"""The model card: what a trained adapter is, for whoever finds it without its run folder."""

import json
from pathlib import Path
from typing import Any

from lora_one.config import PRECONDITIONED, InitConfig, ModelConfig, OptimizerConfig, PeftConfig
from lora_one.records import RunRecord
from lora_one.tables import figure_text

_PIPELINES = {"CausalLM": "text-generation", "ConditionalGeneration": "text2text-generation"}
_TRAINING = (
    "real_batch_size",
    "learning_rate",
    "lr_scheduler",
    "warmup_steps",
    "max_length",
    "loss_reduction",
)
_ADAPTER = ("lora_r", "lora_alpha", "use_rslora", "lora_dropout", "lora_target_modules")
# Shown where they are not at their defaults.
_RARE = {
    "model": ("quantization", "bf16", "weight_decay"),
    "peft": (
        "dora",
        "adalora",
        "use_loraplus",
        "train_embeddings",
        "rank_pattern",
        "alpha_pattern",
        "lora_exclude_modules",
        "layers_to_transform",
    ),
    "init": ("shift", "norm_clip", "dtype"),
    "optimizer": tuple(OptimizerConfig.model_fields),
}
_SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "peft": PeftConfig,
    "init": InitConfig,
    "optimizer": OptimizerConfig,
}
_INIT = {
    "gradient": ("direction", "scale", "stable_gamma", "normalize", "objective"),
    "svd": ("scale",),
    "simple": ("lora_A", "lora_B"),
    "eva": ("eva_rho",),
    "corda": ("corda_method",),
    "peft_lora_ga": ("direction", "scale", "stable_gamma"),
}


def model_card(record: RunRecord, folder: Path) -> str:
    """The card of a run's result as Markdown with the Hub's header.

    Args:
        record: Of the finished run.
        folder: What the card lies in: an adapter, or a whole model.
    """
    is_adapter = (folder / "adapter_config.json").exists()
    parts = [
        _header(record, is_adapter),
        f"# {record.run_id}",
        _what(record, folder, is_adapter),
        _table("Settings", _settings(record)),
        _table("Results", _results(record)),
        f"Made by lora-one {record.code.get('version')} (commit {record.code.get('commit')}).",
    ]
    return "\n\n".join(parts) + "\n"


def _header(record: RunRecord, is_adapter: bool) -> str:
    name = record.config["model"]["name"]
    # The Hub takes its own names only; a local folder is named in the text.
    is_local = str(record.model.get("source")) != name or Path(name).exists()
    lines = [
        "---",
        f"library_name: {'peft' if is_adapter else 'transformers'}",
        f"pipeline_tag: {_PIPELINES[record.config['model']['type']]}",
    ]
    lines += [] if is_local else [f"base_model: {name}"]
    lines += ["tags:", "- lora-one", f"- {record.method.lower()}", *(["- lora"] if is_adapter else []), "---"]
    return "\n".join(lines)


def _what(record: RunRecord, folder: Path, is_adapter: bool) -> str:
    base, data = record.config["model"]["name"], record.config["dataset"]["name"]
    fingerprint = f"`{base}` (weights `{record.model.get('fingerprint')}`)"
    if not is_adapter:
        return f"{fingerprint}, all weights fine-tuned on `{data}`."
    rank = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("r")
    shifted = (record.init or {}).get("shift")
    text = f"A LoRA adapter ({record.method}) for {fingerprint}, fine-tuned on `{data}`."
    if shifted:
        text += (
            f" Training started from a shifted base; this is the exact difference to the *unshifted* one, an "
            f"adapter of rank {rank}."
        )
    return text + (
        " It loads on the base model as it is:\n\n```python\nfrom peft import PeftModel\n"
        'model = PeftModel.from_pretrained(base_model, "this folder")\n```'
    )


def _settings(record: RunRecord) -> list[tuple[str, Any]]:
    config = record.config
    rows = [(f"model.{key}", config["model"][key]) for key in _TRAINING]
    if config["peft"]["use_peft"]:
        rows += [(f"peft.{key}", config["peft"][key]) for key in _ADAPTER]
        mode = config["init"]["mode"]
        rows += [("init.mode", mode), *((f"init.{key}", config["init"][key]) for key in _INIT.get(mode, ()))]
    for group, keys in _RARE.items():
        fields = _SECTIONS[group].model_fields
        rows += [(f"{group}.{k}", config[group][k]) for k in keys if config[group][k] != fields[k].default]
    if config["optimizer"]["name"] in PRECONDITIONED:
        damping = config["model"]["prec_reg"] or OptimizerConfig(**config["optimizer"]).default_damping
        rows.append(("model.prec_reg", damping))
    if record.gradient:
        rows.append(("gradient sample", f"{record.gradient['n_examples']} examples"))
    return [*rows, ("seed", record.seed), ("steps", record.training.get("n_steps"))]


def _results(record: RunRecord) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in record.metrics.items():
        if isinstance(value, dict):
            rows.append((f"{name} {value['metric']}", figure_text(value)))
        else:
            rows.append((name.replace("_", " "), f"{value:.4f}"))
    return rows


def _table(title: str, rows: list[tuple[str, Any]]) -> str:
    body = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## {title}\n\n| | |\n|---|---|\n{body}"
