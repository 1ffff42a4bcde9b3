"""One experiment, or a sweep with ``-m``.

    python run_exp.py                                         the embedded default, offline, on a CPU
    python run_exp.py -m ++init.direction=LoRA-One seed=0,1   a sweep
    python run_exp.py dataset=meta_math dry_run=true          the plan, without loading any weights

It exits with 0 when all is done, 1 on a failure, 2 on bad input, 130 on Ctrl-C, with 75 when SIGTERM or
SIGUSR1 asked it to stop: the run is unfinished then, and the same command goes on; and with 76 when
another program is making the run, and nothing else went wrong.

``run_experiment`` is the way of one experiment, a line a stage; the stages follow it in order, and
after them how a launch begins and ends.
"""

import gc
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eval.of_run import benchmarks_to_run, grade, graded, keep_result, run_benchmarks
from eval.tasks import check_benchmarks, check_examples
from lora_one import portable, sweeps, training
from lora_one.adapters import check_adapter
from lora_one.cards import model_card
from lora_one.comparison import sweeper as comparison
from lora_one.complaints import complain, explain
from lora_one.config import ExperimentConfig, parse_config
from lora_one.data.custom import spec_of
from lora_one.data.prepare import Data, prepare_data
from lora_one.digests import file_digest
from lora_one.errors import BusyError, DivergedError, PrunedError, UserError
from lora_one.files import write_text
from lora_one.gradient_cache import cached_estimate, describe_estimate, make_cache_folder
from lora_one.gradients import GradientEstimate, estimate_gradient
from lora_one.hub import push_folder
from lora_one.initialise import probe_logits, start_adapters
from lora_one.inits import AdapterInit
from lora_one.interruption import UNFINISHED, Unfinished, heeding_signals
from lora_one.memo import Memo
from lora_one.models import LoadedModel, adapter_ranks, check_model_type, load_model, load_tokenizer
from lora_one.overrides import named_keys, normalise_overrides
from lora_one.plan import describe_plan
from lora_one.plots import plot_run
from lora_one.probes.callback import FILE as PROBES_FILE
from lora_one.probes.callback import start_probes
from lora_one.probes.figures import plot_probes
from lora_one.processes import end_processes, start_processes
from lora_one.quiet import quieten_libraries
from lora_one.records import run_id
from lora_one.runs import Run
from lora_one.sample import gradient_batches, sample_indices
from lora_one.tracking import Tracker, check_tensorboard

CONF_DIR = Path(__file__).resolve().parent / "conf"
_data, _weights = Memo(), Memo()
FAILED, BAD_INPUT, BUSY, INTERRUPTED = 1, 2, 76, 130


def run_experiment(config: ExperimentConfig, run: Run) -> None:
    """Runs one experiment, from pretrained weights to a record and a plot.

    Raises:
        UserError: For bad input.
        PrunedError: If ``model.prune_above`` ends it.
    """
    run.begin(config)
    transformers.set_seed(config.seed)
    data, loaded = load(config, run)
    if config.eval.before_training and "test_before" not in run.record.metrics:
        evaluate("test_before", config, loaded.model, data, loaded, run)
    estimate = estimate_for_init(config, loaded, data, run)
    model, inits = initialise(config, loaded, estimate, data, run)
    with start_tracker(config, run) as tracker:
        train(config, model, inits, data, loaded, tracker, run)
        export_adapter(config, model, inits, run)
        evaluate("test", config, model, data, loaded, run)
        run_benchmarks(config.eval.tasks, config, model, loaded, run)
        tracker.summarise(run.record.figures())
    if run.processes.is_main:
        export_merged(config, model, loaded, run)
        write_cards(run)
        plot_run(run.record, run.folder)
        plot_probes(run.record, run.folder)


def load(config: ExperimentConfig, run: Run) -> tuple[Data, LoadedModel]:
    """Data first: its faults are found before any weights are read."""
    if config.cache_dir is not None and config.peft.use_peft and config.init.mode == "gradient":
        make_cache_folder(config.cache_dir)
    with run.stage("data"):
        check_model_type(config.model)
        if config.peft.use_peft and config.init.adapter is not None:
            check_adapter(config.init.adapter)
        tokenizer = load_tokenizer(config.model)
        data = _data.get(
            data_key(config), lambda: prepare_data(config, tokenizer, writes=run.processes.is_main)
        )
        run.note_source("data", data.summary())
        check_asked_of_data(config, data)
    for remark in data.remarks() + training.remarks(len(data.train.examples), config):
        run.processes.say(f"note: {remark}")
    if config.eval.task is not None and not data.texts.test:
        run.processes.say("note: there is no test split, so nothing is tested; give dataset.test_file")
    with run.stage("model"):
        memo = _weights if sweeps.journal().folder is not None else None
        loaded = load_model(config, tokenizer, run.processes.device, memo)
        run.note_source("model", loaded.summary())
    return data, loaded


def data_key(config: ExperimentConfig) -> object:
    """What the encoded data depends on within one sweep; None outside of one."""
    sweep = sweeps.journal().folder
    if sweep is None:
        return None
    model = config.model
    tokenizer = (model.name, model.type, model.revision, model.trust_remote_code)
    lengths = (model.max_length, config.gradient_max_length)
    return (sweep, config.dataset, tokenizer, lengths, config.token_cache_dir)


def check_asked_of_data(config: ExperimentConfig, data: Data) -> None:
    """Raises UserError for what the data cannot give, before any weights are read."""
    if config.peft.use_peft and config.init.needs_sample:
        sample_indices(len(data.gradient.examples), config.init, config.seed)
    has_labels = config.eval.task == "label" and spec_of(config.dataset).labels is not None
    if config.eval.task is not None and data.texts.test and not has_labels:
        limit = None if config.eval.task == "label" else config.eval.limit
        check_examples(config.eval.task, data.texts.test[:limit])


def evaluate(
    name: str, config: ExperimentConfig, model: Any, data: Data, loaded: LoadedModel, run: Run
) -> None:
    """The test split graded, stored under ``name``."""
    if config.eval.task is None or not data.texts.test:
        return
    with run.stage(name):
        keep_result(name, grade(config, model, data, data.texts.test, loaded, run, name), config, run)


def estimate_for_init(
    config: ExperimentConfig, loaded: LoadedModel, data: Data, run: Run
) -> GradientEstimate | None:
    """The gradient of the training loss at the pretrained weights, where the init needs it.

    Once for all runs of a sweep that differ in nothing that it depends on.
    """
    needs_gradient = config.peft.use_peft and config.init.mode == "gradient"
    if not needs_gradient or run.has_init:
        return None
    examples, ranks = data.gradient.examples, adapter_ranks(loaded.model, loaded.targets, config.peft)
    with run.stage("gradient"):
        estimate = cached_estimate(
            config.cache_dir,
            describe_estimate(config, loaded, examples, ranks, run.processes),
            lambda: estimate_gradient(
                loaded.model,
                loaded.targets,
                examples,
                config,
                ranks=ranks,
                pad_id=data.pad_id,
                processes=run.processes,
                decode=lambda example: str(loaded.tokenizer.decode(example.ids[:24])),
            ),
            run.processes,
        )
        run.record.gradient = estimate.summary()
    return estimate


def initialise(
    config: ExperimentConfig, loaded: LoadedModel, estimate: GradientEstimate | None, data: Data, run: Run
) -> tuple[Any, dict[str, AdapterInit]]:
    """The model to train, and the starts of its adapters where they have ``B A ≠ 0``."""
    if not config.peft.use_peft:
        return loaded.model.requires_grad_(True), {}
    device, n_examples = run.processes.device, len(data.train.examples)
    with run.stage("init"):
        model, inits, report = start_adapters(
            config,
            loaded,
            estimates=estimate.layers if estimate else None,
            stored=portable.load_init(run.init_file) if run.has_init else None,
            batches=gradient_batches(data.gradient.examples, config, data.pad_id, device),
            total_steps=training.plan_training(n_examples, config.model).n_steps,
            probe=lambda model: probe_logits(model, data.validation.examples[:4], data.pad_id, device),
        )
        if report is not None:
            run.record.init = asdict(report) | {"adapter": adapter_digest(config)}
            if run.processes.is_main and not run.has_init:
                portable.save_init(inits, run.init_file)
            for remark in report.remarks():
                run.processes.say(f"note: {remark}")
    return model, inits


def adapter_digest(config: ExperimentConfig) -> str | None:
    """Of the local adapter that is trained on: its name alone does not tell what it holds."""
    if not config.peft.use_peft or config.init.adapter is None:
        return None
    weights = Path(config.init.adapter) / "adapter_model.safetensors"
    return file_digest(weights, None) if weights.is_file() else None


def start_tracker(config: ExperimentConfig, run: Run) -> Tracker:
    """The main process's tracker; the others have none."""
    mode = config.wandb.mode if run.processes.is_main else "disabled"
    settings = config.wandb.model_copy(update={"mode": mode})
    tensorboard = config.tensorboard and run.processes.is_main
    return Tracker(settings, run.record.run_id, run.folder, config.model_dump(), tensorboard)


def train(
    config: ExperimentConfig,
    model: Any,
    inits: dict[str, AdapterInit],
    data: Data,
    loaded: LoadedModel,
    tracker: Tracker,
    run: Run,
) -> None:
    """Trains in place; an interrupted run goes on from its last complete checkpoint.

    Raises:
        PrunedError: If ``model.prune_above`` ends it.
    """
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # How far it is can be told from outside.
    run.record.training = {"n_steps": training.plan_training(len(data.train.examples), config.model).n_steps}
    with run.stage("training"):
        result = training.train(
            model,
            data.train.examples,
            data.validation.examples,
            config,
            pad_id=data.pad_id,
            processes=run.processes,
            folder=run.folder,
            tracker=tracker,
            exact_match=exact_match(config, data, loaded, run),
            probes=start_probes(
                config,
                model,
                inits,
                data.train.examples,
                pad_id=data.pad_id,
                processes=run.processes,
                folder=run.folder,
                tracker=tracker,
            ),
        )
        total = sum(parameter.numel() for parameter in model.parameters())
        run.record.training = {"trainable_parameters": trainable, "parameters": total, **asdict(result)}
        run.record.metrics["validation_loss"] = result.validation_loss
    if result.pruned is not None:
        raise PrunedError(result.pruned)


def exact_match(
    config: ExperimentConfig, data: Data, loaded: LoadedModel, run: Run
) -> Callable[[Any], float] | None:
    """What measures the share of right answers on the validation split: the test split is for the end."""
    if config.eval.task is None or not config.eval.during_training:
        return None
    examples = data.texts.validation
    return lambda model: grade(config, model, data, examples, loaded, run, "validation").figure.value


def export_adapter(config: ExperimentConfig, model: Any, inits: dict[str, AdapterInit], run: Run) -> None:
    """The portable adapter: right after training, so that nothing later can lose it."""
    if config.peft.use_peft and run.processes.is_main:
        with run.stage("export"):
            portable.export_adapter(model, inits, run.folder / "adapter")


def export_merged(config: ExperimentConfig, model: Any, loaded: LoadedModel, run: Run) -> None:
    """The whole model: the result of full fine-tuning, or base and adapter in one where asked.

    Last of all, because the other processes have nothing left to wait for.
    """
    if config.peft.use_peft and not config.model.saving:
        return
    with run.stage("merge"):
        if config.peft.use_peft:
            portable.merge_adapter(loaded, config.model, run.folder / "adapter", run.folder / "merged")
        else:
            portable.save_model(model, loaded.tokenizer, run.folder / "merged")


def write_cards(run: Run) -> None:
    """A model card beside everything that can be taken away."""
    for folder in (run.folder / "adapter", run.folder / "merged"):
        if folder.is_dir():
            write_text(folder / "README.md", model_card(run.record, folder))


def publish(config: ExperimentConfig, run: Run) -> None:
    """The finished adapter, or the fully fine-tuned model, to the Hub where asked.

    Raises:
        UserError: If the Hub refuses; the run is finished all the same, and the same command tries again.
    """
    if config.model.push_to_hub is None or not run.processes.is_main:
        return
    folder = run.folder / ("adapter" if config.peft.use_peft else "merged")
    run.processes.say(f"pushed to {push_folder(folder, config.model.push_to_hub)}")


def add_outputs(config: ExperimentConfig, run: Run) -> None:
    """A finished run is left alone; asked for another output, only that is made."""
    assert run.previous is not None
    run.check_complete(config)
    if (run.record.init or {}).get("adapter") != adapter_digest(config):
        raise UserError(
            f"init.adapter={config.init.adapter}: has changed since {run.folder} was made from it; "
            "restore it, or use another results_dir"
        )
    wants_test = config.eval.task is not None and graded(run.previous["config"]["eval"]) != graded(
        config.eval.model_dump()
    )
    wants_merged = config.model.saving and not (run.folder / "merged").exists()
    asked = benchmarks_to_run(config, run.previous)
    if config.probes.is_on and not (run.folder / PROBES_FILE).exists():
        run.processes.say(
            "note: probes look at a training, and this run was trained without; to train it again with them, "
            "use another results_dir"
        )
    wants_test, wants_merged, asked = run.processes.from_main((wants_test, wants_merged, asked))
    if not (wants_merged or wants_test or asked):
        run.processes.say(f"{run.folder}: this run is finished, nothing to do")
        return
    run.processes.say(f"{run.folder}: this run is finished, adding what is new")
    data, loaded = load(config, run)
    if wants_test or asked:
        if wants_test and config.eval.before_training:
            evaluate("test_before", config, loaded.model, data, loaded, run)
        trained = portable.load_trained(loaded, run.folder)
        if wants_test:
            evaluate("test", config, trained, data, loaded, run)
        run_benchmarks(asked, config, trained, loaded, run)
    if run.processes.is_main:
        if wants_merged:
            export_merged(config, None, loaded, run)
        write_cards(run)
    run.processes.say(run.summary())


def start(composed: DictConfig, outcome: sweeps.Outcome) -> None:
    """One job of a launch: checks the config, then runs, resumes, or returns; ``outcome`` notes it."""
    # As they were written: an interpolation in one is no business of the others.
    overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    config = parse_config(composed, named_keys(overrides))
    outcome.run_id, outcome.results_dir = run_id(config), config.results_dir
    processes = start_processes()
    named = named_keys(overrides)
    is_default = not named & {"model", "model.name", "experiment"}
    origin = (
        f" (the model of dataset {config.dataset.name}; choose another with model=…)" if is_default else ""
    )
    processes.say(f"model {config.model.name}{origin}")
    if not config.peft.use_peft:
        processes.say("peft=full_ft: all weights are trained, init is ignored")
    if config.model.device_map is not None and processes.world_size > 1:
        raise UserError(
            f"model.device_map={config.model.device_map}: spreads the model over all GPUs of one process; "
            "start without accelerate launch"
        )
    if "model.prec_reg" in named and not config.optimizer.is_preconditioned:
        processes.say(f"note: model.prec_reg has no effect with optimizer={config.optimizer.name}")
    if config.tensorboard:
        check_tensorboard()
    check_benchmarks(config.eval.tasks, config.eval.data)
    if config.dry_run:
        processes.say(describe_plan(config, processes.world_size))
        outcome.state = "planned"
        return
    run = Run(config, processes)
    try:
        if run.is_finished:
            add_outputs(config, run)
        elif run.was_pruned(config):
            raise PrunedError(run.record.error)
        else:
            processes.say(f"run {run.folder}" + (" (resuming)" if run.previous else ""))
            run_experiment(config, run)
            processes.say(run.summary())
        run.close()
    except PrunedError as reason:
        run.close(reason)
        processes.say(f"{run.folder}: {reason}; without the limit, or with a higher one, it goes on")
    except BaseException as error:
        run.close(error)
        raise
    outcome.end(run.record)
    if run.record.status == "finished":
        publish(config, run)


def job(composed: DictConfig) -> float | None:
    """Runs one job; a failed one is reported and does not stop the next.

    Returns:
        What a sweeper is to make small: the validation loss; None where there is none.

    Raises:
        Unfinished: If a signal asks this process to stop: that is meant for the whole sweep.
    """
    quieten_libraries()
    journal = sweeps.journal()
    outcome = journal.begin()
    try:
        if journal.is_stopping:
            outcome.stop("not begun: the sweep was asked to stop", UNFINISHED)
            return outcome.objective
        sweeps.join_cluster_job()
        with heeding_signals():  # here for launchers that do not come by main
            start(composed, outcome)
    except BusyError as error:
        complain(str(error))
        outcome.stop(str(error), BUSY, "busy")
    except UserError as error:
        complain(str(error))
        outcome.fail(str(error), BAD_INPUT, math.inf if isinstance(error, DivergedError) else None)
    except Exception as error:
        text = explain(error, Path(composed.results_dir))
        complain(text)
        outcome.fail(text, FAILED)
    except Unfinished as stop:
        stop_job(stop, outcome, journal)
    except KeyboardInterrupt:
        outcome.stop("interrupted", INTERRUPTED)
        raise
    finally:
        journal.keep(outcome)
        # The last job's model must be gone before the next one's is loaded.
        gc.collect()
        torch.cuda.empty_cache()
    if outcome.exit_code not in (0, UNFINISHED) and is_launched_with_others():
        # The other processes may wait for this one: end the whole launch, the sweep can be repeated.
        sys.stdout.flush()
        os._exit(outcome.exit_code)
    return outcome.objective


def stop_job(stop: Unfinished, outcome: sweeps.Outcome, journal: sweeps.Journal) -> None:
    """A signal came: ends the sweep if that is here, else this job alone.

    Raises:
        Unfinished: If the sweep is here.
    """
    outcome.stop(stop.reason, UNFINISHED)
    if stop.together:
        end_processes()  # the first to leave would have the launcher end the others
    if stop.hand_on is not None:
        journal.keep(outcome)  # this may be the end of the process
        stop.hand_on()
    if not journal.is_elsewhere:
        raise stop
    complain(str(stop))


def is_launched_with_others() -> bool:
    """Whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch_jobs() -> int:
    """Hands the command line to Hydra, which starts ``job`` once or for every job of a sweep.

    Returns:
        The exit code of the launch itself; the jobs have theirs.
    """
    try:
        sys.argv[1:], notes = normalise_overrides(sys.argv[1:], CONF_DIR)
        for note in notes if os.environ.get("RANK", "0") == "0" else []:
            print(f"note: {note}", file=sys.stderr)
        sys.argv[1:] = sweeps.prepare_engines(sys.argv[1:], CONF_DIR)
        comparison.register()
        launch = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
        with heeding_signals(pass_on=lambda: sweeps.journal().pass_on()):
            launch(job)()
    # Hydra has a bare ValueError too; what a job raises does not come here.
    except (ValueError, HydraException, OmegaConfBaseException, OSError) as error:
        complain(" ".join(str(error).split()))
        return BAD_INPUT
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on from the last checkpoint")
        return INTERRUPTED
    except Unfinished as stop:
        if os.environ.get("RANK", "0") == "0":
            complain(str(stop))
        if is_launched_with_others():
            os._exit(UNFINISHED)  # where one alone was asked, the others may wait for it
        return UNFINISHED
    except Exception as error:  # a launcher's or a sweeper's own: a worker or a node has died
        first = str(error).strip().splitlines()[:1]
        complain(": ".join([type(error).__name__, *first]) + "; the same command starts what is missing")
        return FAILED
    end_processes()
    return 0


def main() -> None:
    """The command line."""
    quieten_libraries()
    # Hydra shall raise, not print a traceback.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sweeps.make_importable(CONF_DIR.parent)
    sweeps.set_journal(sweeps.Journal())
    code = launch_jobs()
    outcomes = sweeps.journal().close()
    codes = [outcome.exit_code for outcome in outcomes]
    failed = sum(code not in (0, UNFINISHED, BUSY) for code in codes)
    if failed and len(codes) > 1:
        print(f"error: {failed} of {len(codes)} jobs failed", file=sys.stderr)
    # Whoever tries again because of a busy run would try a failing one again too.
    sys.exit(code or max([code for code in codes if code not in (0, BUSY)] or codes, default=0))


if __name__ == "__main__":
    main()
