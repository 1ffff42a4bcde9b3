"""Training by Hugging Face's Trainer, on batches and a loss of ours."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from lora_one.budget import micro_batch_limits
from lora_one.callbacks import AdaLora, EarlyStopping, KeepBest, Log, Progress, PruneAbove, best_step
from lora_one.checkpoints import broken_file, last_checkpoint, partial_folder, step_of, whole_checkpoint
from lora_one.config import ExperimentConfig, ModelConfig
from lora_one.data.batches import Batch, Limits, WindowLoader, WindowSampler, collate_slots, split_window
from lora_one.data.encoding import Encoded
from lora_one.divergence import StopOnDivergence
from lora_one.errors import UserError
from lora_one.files import write_text
from lora_one.fused import faster
from lora_one.interruption import StopOnSignal
from lora_one.layers import settle
from lora_one.losses import to_device, weighted_loss
from lora_one.modes import in_mode
from lora_one.optimizers import loraplus_optimizer, n_escalated, optimizer_class
from lora_one.packing import attending, choose_packing
from lora_one.processes import Processes
from lora_one.steps import Steps
from lora_one.tracking import MetricsFile, Tracker


@dataclass(frozen=True)
class TrainPlan:
    """How the examples become optimiser steps."""

    steps_per_epoch: int
    n_steps: int

    def eval_steps(self, config: ModelConfig) -> int:
        """Steps between two validation losses."""
        if config.eval_points is not None:
            return max(1, self.n_steps // config.eval_points)
        return max(1, round(config.eval_epochs * self.steps_per_epoch))


@dataclass(frozen=True)
class TrainResult:
    """What training did; ``seconds`` of all starts, ``tokens_per_second`` of the last.

    ``escalated_dampings``: r x r matrices that a preconditioned optimiser had to damp by more than δ; None
    with the others. ``best_step``: the step that the weights are of with ``model.keep_best``, else None.
    ``stopped_early``: by ``model.early_stopping_patience``. ``pruned``: why ``model.prune_above`` ended it.
    """

    n_steps: int
    final_train_loss: float
    validation_loss: float
    seconds: float
    tokens_per_second: float
    resumed_from_step: int
    escalated_dampings: int | None = None
    best_step: int | None = None
    stopped_early: bool = False
    pruned: str | None = None


def plan_training(n_examples: int, config: ModelConfig) -> TrainPlan:
    """Counts the optimiser steps of ``model.real_batch_size`` examples; an epoch's last takes the rest."""
    steps_per_epoch = -(-n_examples // config.real_batch_size)
    n_steps = max(1, round(config.epochs * steps_per_epoch))
    if config.max_steps is not None:
        n_steps = min(n_steps, config.max_steps)
    return TrainPlan(steps_per_epoch, n_steps)


def remarks(n_examples: int, config: ExperimentConfig) -> list[str]:
    """What a person may not expect of the steps to come."""
    plan, model = plan_training(n_examples, config.model), config.model
    lines = []
    if model.max_steps is not None and plan.n_steps < model.max_steps:
        lines.append(
            f"{model.epochs:g} epochs end after {plan.n_steps} steps, "
            f"before model.max_steps={model.max_steps}"
        )
    if model.warmup(plan.n_steps) >= plan.n_steps:
        key = "warmup_steps" if model.warmup_ratio is None else "warmup_ratio"
        lines.append(f"model.{key}={getattr(model, key)} covers all {plan.n_steps} steps")
    return lines


def train(
    model: Any,
    train_examples: Sequence[Encoded],
    validation_examples: Sequence[Encoded],
    config: ExperimentConfig,
    *,
    pad_id: int,
    processes: Processes,
    folder: Path,
    tracker: Tracker,
    exact_match: Callable[[Any], float] | None = None,
    probes: TrainerCallback | None = None,
) -> TrainResult:
    """Trains ``model``'s trainable parameters in place, resuming from the folder's last checkpoint.

    Args:
        model: A PEFT model, or a plain one for full fine-tuning.
        train_examples: Encoded training split.
        validation_examples: Encoded validation split.
        config: The experiment.
        pad_id: Padding token.
        processes: Who trains together.
        folder: The run's folder; gets ``checkpoints/`` and ``metrics.jsonl``.
        tracker: Receives the logged points.
        exact_match: Measured with every validation loss, where given.
        probes: Looks at the model on the way.

    Raises:
        UserError: If a loss is not finite, only damaged checkpoints are left, or the model is sharded.
        RunError: If a checkpoint cannot be written.
        Unfinished: If a signal asks to stop; the checkpoint of the step has been written.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UserError(
            "the model's weights are sharded (FSDP2), which this training does not take; "
            "give it the whole model, or write the loop yourself as docs/scaling.md says"
        )
    settle(model)
    packing = choose_packing(model, config.model, train_examples, pad_id, processes)
    plan = plan_training(len(train_examples), config.model)
    limits = micro_batch_limits(model, config.model, train_examples, pad_id, processes, packing=packing)
    processes.say(f"micro-batches of {limits}")
    sampler = _sampler(train_examples, limits, config, processes)
    checkpoint = processes.from_main(last_checkpoint(folder, processes.say))
    resumed_from = step_of(checkpoint) if checkpoint else 0
    steps = Steps(sampler)
    stop = StopOnSignal(processes, keeps_checkpoints=not config.peft.adalora)
    progress = Progress(plan.n_steps, steps, processes.is_main)
    callbacks = [stop, StopOnDivergence(steps, folder), progress, *_asked_for(config)]
    seconds_before = 0.0
    if processes.is_main:
        metrics = MetricsFile(folder / "metrics.jsonl", keep_through_step=resumed_from)
        seconds_before = metrics.kept_seconds
        tracker.go_on_after(resumed_from)
        callbacks.append(Log(metrics, tracker, config.model.logging_steps))
    if probes is not None:
        callbacks.append(probes)
    trainer = _WindowTrainer(
        model=model,
        args=_arguments(config, plan, folder),
        callbacks=callbacks,
        train_dataset=train_examples,
        eval_dataset=validation_examples,
        loader=WindowLoader(sampler, pad_id),
        validation=validation_examples,
        pad_id=pad_id,
        processes=processes,
        config=config,
        exact_match=exact_match,
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    done_file = folder / "checkpoints" / "trained.json"
    if checkpoint is not None and processes.from_main(_is_trained(checkpoint, done_file, config, plan)):
        # Interrupted after its last step: the Trainer would take one more.
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        compute = faster(model, config.model)
        with stop.deferring(), closing(progress), compute, attending(model, packing):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if processes.is_main and not stop.stopped and not _pruned(callbacks):
                write_text(done_file, json.dumps({"step": trainer.state.global_step}))
    seconds = time.perf_counter() - start
    pruned = _pruned(callbacks)
    history, last_loss = trainer.state.log_history, _final_validation_loss(trainer)
    best = best_step(history) if config.model.keep_best and pruned is None else None
    if best not in (None, trainer.state.global_step):
        _load_best(trainer, folder / "checkpoints" / f"checkpoint-{best}")
    return TrainResult(
        n_steps=trainer.state.global_step,
        final_train_loss=_all(history, "loss")[-1],
        validation_loss=last_loss if best is None else min(_all(history, "eval_loss")),
        seconds=round(seconds_before + seconds, 3),
        tokens_per_second=steps.tokens(resumed_from, trainer.state.global_step) / seconds,
        resumed_from_step=resumed_from,
        escalated_dampings=_escalated(trainer, checkpoint),
        best_step=best,
        stopped_early=pruned is None and trainer.state.global_step < plan.n_steps,
        pruned=pruned,
    )


def _pruned(callbacks: Sequence[TrainerCallback]) -> str | None:
    (reason,) = [callback.reason for callback in callbacks if isinstance(callback, PruneAbove)] or [None]
    return reason


def _sampler(
    examples: Sequence[Encoded], limits: Limits, config: ExperimentConfig, processes: Processes
) -> WindowSampler:
    return WindowSampler(
        examples,
        real_batch_size=config.model.real_batch_size,
        limits=limits,
        reduction=config.model.loss_reduction,
        seed=config.seed,
        rank=processes.rank,
        world_size=processes.world_size,
    )


def _asked_for(config: ExperimentConfig) -> list[TrainerCallback]:
    """What the configuration adds to the steps."""
    callbacks: list[TrainerCallback] = []
    if config.model.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(config.model.early_stopping_patience))
    if config.model.prune_above is not None:
        callbacks.append(PruneAbove(config.model.prune_above))
    if config.model.keep_best:
        callbacks.append(KeepBest())
    if config.peft.adalora:
        callbacks.append(AdaLora())
    return callbacks


def validation_loss(
    model: Any,
    examples: Sequence[Encoded],
    *,
    reduction: str,
    limits: Limits,
    pad_id: int,
    processes: Processes,
) -> float:
    """The training loss over the whole split, exact for any micro-batches and number of processes."""
    batches = split_window(
        examples,
        range(len(examples)),
        limits=limits,
        reduction=reduction,
        world_size=processes.world_size,
    )[processes.rank]
    total = torch.zeros((), dtype=torch.float64)
    with in_mode(model, training=False), torch.no_grad():
        for slots in batches:
            batch = collate_slots(examples, slots, pad_id, packed=limits.packed)
            total += weighted_loss(model, to_device(batch, processes.device)).item()
    return float(processes.sum_(total))


class _WindowTrainer(Trainer):
    """Trainer whose batches carry their weights, so that it has nothing to normalise."""

    def __init__(
        self,
        *,
        loader: WindowLoader,
        validation: Sequence[Encoded],
        pad_id: int,
        processes: Processes,
        config: ExperimentConfig,
        exact_match: Callable[[Any], float] | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.exact_match = exact_match
        self.loader = loader
        self.validation = validation
        self.pad_id = pad_id
        self.processes = processes

    def get_train_dataloader(self) -> WindowLoader:
        return self.loader

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward over the micro-batches of one optimiser step; returns the window's share."""
        model.train()
        window: list[Batch] = inputs
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(window, start=1):
            is_last = number == len(window)
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = weighted_loss(model, to_device(batch, self.args.device))
                total += loss.detach()
                if is_last and self.config.peft.adalora:
                    loss = loss + adalora_penalty(self.model) / self.processes.world_size
                # DDP averages gradients over processes; the weights ask for their sum.
                self.accelerator.backward(loss * self.processes.world_size)
        return total * self.processes.world_size

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0

    def store_flos(self) -> None:
        """Nothing to gather from all processes at every step."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(partial_folder(Path(super()._get_output_dir(trial))))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        checkpoints = Path(super()._get_output_dir(trial))
        best = best_step(self.state.log_history) if self.config.model.keep_best else None
        with whole_checkpoint(checkpoints, self.state.global_step, self.processes, keep=best):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, *arguments: Any, **settings: Any) -> None:
        # PEFT loads adapters in float32, whatever they were.
        model: Any = self.model
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        super()._load_from_checkpoint(*arguments, **settings)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])

    def create_optimizer(self, *arguments: Any) -> torch.optim.Optimizer:
        # Not earlier: loading a checkpoint may put other parameters in the factors' place.
        if self.optimizer is None:
            adapted: Any = self.model
            self.optimizer_cls_and_kwargs = optimizer_class(self.config, adapted)
            if self.config.peft.use_loraplus:
                self.optimizer = loraplus_optimizer(self.config, adapted, *self.optimizer_cls_and_kwargs)
        return super().create_optimizer(*arguments)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        loss = validation_loss(
            self.model,
            self.validation,
            reduction=self.config.model.loss_reduction,
            limits=self.loader.windows.limits,
            pad_id=self.pad_id,
            processes=self.processes,
        )
        metrics = {"eval_loss": loss}
        if self.exact_match is not None:
            metrics["eval_exact_match"] = self.exact_match(self.model)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _arguments(config: ExperimentConfig, plan: TrainPlan, folder: Path) -> TrainingArguments:
    model = config.model
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        use_cpu=not torch.accelerator.is_available(),
        # One item of the loader is one optimiser step, whatever its micro-batches.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        num_train_epochs=model.epochs,
        max_steps=plan.n_steps,
        learning_rate=model.learning_rate,
        weight_decay=model.weight_decay,
        max_grad_norm=model.max_grad_norm,
        # The Trainer's "constant" would ignore the warm-up.
        lr_scheduler_type="constant_with_warmup" if model.lr_scheduler == "constant" else model.lr_scheduler,
        warmup_steps=model.warmup(plan.n_steps),
        bf16=model.bf16,
        fp16=model.fp16,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=plan.eval_steps(model),
        # AdaLoRA's importance scores live outside the model: such a run starts over when interrupted.
        save_strategy="no" if config.peft.adalora else "steps",
        save_steps=model.save_steps,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # language models' are constants
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        seed=config.seed,
    )
    # One process uses one device; with several in sight the Trainer would copy the model to all of them.
    assert arguments.device is not None
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def adalora_penalty(model: Any) -> torch.Tensor:
    """AdaLoRA's orthogonality penalty, as PEFT adds it to a loss of the model's own: the mean of
    ``‖P Pᵀ - I‖_F`` over the factors (their short side), times ``orth_reg_weight``.
    """
    weight = model.peft_config["default"].orth_reg_weight
    terms = []
    for name, factor in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
            terms.append(torch.linalg.norm(gram - torch.eye(len(gram)).to(gram)))
    return weight * torch.stack(terms).mean()


def _load_best(trainer: "_WindowTrainer", checkpoint: Path) -> None:
    broken = broken_file(checkpoint) if checkpoint.is_dir() else checkpoint
    if broken is not None:
        raise UserError(f"{broken}: damaged or gone; use model.keep_best=false to keep the last weights")
    trainer._load_from_checkpoint(str(checkpoint))


def _final_validation_loss(trainer: Trainer) -> float:
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if evaluated and evaluated[-1]["step"] == trainer.state.global_step:
        return evaluated[-1]["eval_loss"]
    return trainer.evaluate()["eval_loss"]


def _is_trained(checkpoint: Path, done_file: Path, config: ExperimentConfig, plan: TrainPlan) -> bool:
    """Whether a checkpoint was the training's last, where that ended before it could say so too."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    patience = config.model.early_stopping_patience
    return (
        state.global_step >= plan.n_steps
        or (patience is not None and EarlyStopping(patience).is_over(state.log_history))
        or (done_file.exists() and json.loads(done_file.read_text())["step"] == state.global_step)
    )


def _all(history: list[dict[str, float]], key: str) -> list[float]:
    return [entry[key] for entry in history if key in entry]


def _escalated(trainer: Trainer, checkpoint: Path | None) -> int | None:
    """Of this start's optimiser; where training had ended before, of the last checkpoint's."""
    if trainer.optimizer is not None or checkpoint is None:
        return n_escalated(trainer.optimizer)
    (first, *_) = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    return first.get("n_escalated")
