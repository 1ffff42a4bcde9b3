"""What is measured of a run: the test split by ``eval.task``, and the benchmarks of ``eval.tasks``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.labels import label_words
from eval.engine.generation import Decoding
from eval.results import EvalResult
from eval.subject import Request, Subject
from eval.tasks import GRADERS, find_task
from lora_one.config import ExperimentConfig
from lora_one.data.custom import spec_of
from lora_one.data.prepare import Data
from lora_one.data.specs import Example
from lora_one.files import write_text
from lora_one.models import LoadedModel
from lora_one.runs import Run


def run_benchmarks(
    names: Sequence[str], config: ExperimentConfig, model: Any, loaded: LoadedModel, run: Run
) -> None:
    """Benchmarks on the model as it stands."""
    for name in names:
        folder = run.folder / "answers" / name
        if run.processes.is_main:
            folder.mkdir(parents=True, exist_ok=True)
        run.processes.wait()
        data = config.eval.data.get(name)
        request = Request(Path(data) if data else None, config.eval.limit, config.seed, folder, name)
        with run.stage(name):
            result = find_task(name)(subject(config, model, loaded, run), request)
            keep_result(name, result, config, run)
            run.record.metrics[name] |= asked_of(name, config)


def subject(config: ExperimentConfig, model: Any, loaded: LoadedModel, run: Run) -> Subject:
    """The model as the benchmarks see it."""
    settings = config.eval
    return Subject(
        model, loaded.tokenizer, run.processes, run.record.run_id, settings.max_tokens, settings.batch_size
    )


def grade(
    config: ExperimentConfig,
    model: Any,
    data: Data,
    examples: Sequence[Example],
    loaded: LoadedModel,
    run: Run,
    name: str,
) -> EvalResult:
    """What ``eval.task`` makes of the model's answers to ``examples``."""
    assert config.eval.task is not None
    settings = config.eval
    decoding = Decoding(settings.max_new_tokens, settings.temperature, settings.top_p)
    spec = spec_of(config.dataset)
    request = Request(
        limit=settings.limit,
        seed=config.seed,
        description=name,
        labels=label_words_of(config, data),
        joiner=spec.joiner,
    )
    return GRADERS[config.eval.task](subject(config, model, loaded, run), examples, request, decoding)


def label_words_of(config: ExperimentConfig, data: Data) -> tuple[str, ...]:
    """The words that ``eval.task=label`` chooses from: one list for all splits."""
    if config.eval.task != "label":
        return ()
    splits = (data.texts.train, data.texts.validation, data.texts.test)
    return spec_of(config.dataset).labels or label_words(example for split in splits for example in split)


def keep_result(name: str, result: EvalResult, config: ExperimentConfig, run: Run) -> None:
    """The figures to the record, every answer to a file beside it."""
    run.record.metrics[name] = result.summary()
    run.record.metrics.pop(f"{name}_rating", None)  # a judge's, of other answers
    run.record.config["eval"] = config.eval.model_dump()
    if run.processes.is_main:
        path = run.folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)  # a benchmark's name may have a folder
        write_text(path, result.samples_jsonl())
    run.processes.say(f"{name}: {result}")


def benchmarks_to_run(config: ExperimentConfig, previous: dict[str, Any]) -> list[str]:
    """Those of ``eval.tasks`` that a finished run has no figures of, or has them otherwise asked for."""
    figures = previous["metrics"]
    return [
        name
        for name in config.eval.tasks
        if name not in figures
        or any(figures[name].get(key) != value for key, value in asked_of(name, config).items())
    ]


def asked_of(name: str, config: ExperimentConfig) -> dict[str, Any]:
    """What a benchmark's figures depend on beside the model."""
    return {"data": config.eval.data.get(name), "limit": config.eval.limit}


def graded(settings: dict[str, Any]) -> dict[str, Any]:
    """The part of the evaluation's settings that the test split's result depends on."""
    return {key: settings[key] for key in ("task", "limit", "max_new_tokens", "temperature", "top_p")}
