"""MT-Bench, second half: grades the answers of eval/eval_mt_bench.py by any OpenAI-compatible chat model.

    python eval/judge_mt_bench.py --answers=model_answer/my-run.jsonl --questions=path/to/question.jsonl \
        --references=path/to/gpt-4.jsonl --base_url=http://localhost:8000/v1 --model=my-judge

The judgments are appended in FastChat's format, so that the same command goes on. With
``--judge_prompts`` FastChat's own prompts are used; only then, and with its judge gpt-4, scores compare with
published ones.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.benchmarks.endpoint import Endpoint
from eval.benchmarks.judge import (
    NO_RATING,
    OWN_PROMPTS,
    Match,
    check_answers,
    judge_all,
    make_matches,
    mean_rating,
    read_answers,
    read_prompts,
)
from eval.benchmarks.mt_bench import TEMPERATURES, hub_file, read_questions
from eval.command import positive, run_program
from eval.results import EvalResult, Figure
from lora_one.errors import UserError
from lora_one.files import write_text
from lora_one.records import add_figure
from lora_one.tables import markdown_table

RATING = "mt_bench_rating"  # in the metrics of a run's record


def main(arguments: list[str]) -> None:
    """The command line."""
    options = read_options(arguments)
    start = time.perf_counter()
    questions = read_questions(options.questions or hub_file("question.jsonl", "--questions=question.jsonl"))
    answers = read_answers(options.answers)
    check_answers(questions, answers[1], options.answers)
    prompts = read_prompts(options.judge_prompts) if options.judge_prompts else OWN_PROMPTS
    chosen = questions[: options.limit]
    _, references = read_answers(
        options.references or hub_file("reference_answer/gpt-4.jsonl", "--references=gpt-4.jsonl")
    )
    matches = make_matches(chosen, answers, references, prompts, options.answers)
    path = options.judgments or default_path(
        options.answers, options.model, options.judge_prompts is not None
    )
    try:
        scores = judge_all(matches, make_endpoint(options), path, options.parallel, options.asks)
    except OSError as error:
        raise UserError(f"--judgments={path}: cannot write there ({error.strerror})") from None
    result = make_result(scores, options, time.perf_counter() - start)
    print(markdown_table(table(scores)))
    print(f"{result}; judged by {options.model}; in {path}")
    figure = result.summary() | {"limit": options.limit}
    write_text(path.with_name(f"{answers[0]}-{path.stem}.json"), json.dumps(figure, indent=2) + "\n")
    if add_figure(options.answers.parent, RATING, figure):
        print(f"added to {options.answers.parent / 'record.json'} as {RATING}")


def read_options(arguments: list[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--answers", type=Path, required=True, help="FastChat's model_answer/<model>.jsonl")
    parser.add_argument("--questions", type=Path, help="question.jsonl; default: from the Hub")
    parser.add_argument("--references", type=Path, help="reference answers; default: gpt-4's, from the Hub")
    parser.add_argument("--base_url", required=True, help="such as https://api.openai.com/v1")
    parser.add_argument("--model", required=True, help="the judge's name there")
    parser.add_argument("--api_key_env", default="OPENAI_API_KEY", help="environment variable with the key")
    parser.add_argument("--judge_prompts", type=Path, help="FastChat's judge_prompts.jsonl, used verbatim")
    parser.add_argument("--judgments", type=Path, help="file to append to; default: beside the answers")
    parser.add_argument("--parallel", type=positive, default=1, help="requests under way at once (1)")
    parser.add_argument("--limit", type=positive, help="the first so many questions only")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds an attempt may be silent (120)")
    parser.add_argument("--attempts", type=positive, default=6, help="before a failing endpoint is given up")
    parser.add_argument("--asks", type=positive, default=3, help="of a judge that gives no rating (3)")
    parser.add_argument("--first_wait", type=float, default=1.0, help="seconds before the second attempt (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the waits' jitter (0)")
    return parser.parse_args(arguments)


def make_endpoint(options: argparse.Namespace) -> Endpoint:
    """The judge that the flags describe."""
    if not options.base_url.startswith(("http://", "https://")):
        raise UserError(f"--base_url={options.base_url}: must start with http:// or https://")
    return Endpoint(
        options.base_url,
        options.model,
        options.api_key_env,
        os.environ.get(options.api_key_env),
        options.timeout,
        options.attempts,
        options.first_wait,
        options.seed,
    )


def default_path(answers: Path, judge: str, is_fastchats: bool) -> Path:
    """Where FastChat keeps judgments, as seen from its folder of answers; else beside the answers.

    Judgments by other prompts have a file of their own, since FastChat averages all that are in one.
    """
    name = f"{judge.replace('/', '--')}{'' if is_fastchats else '-own'}_single.jsonl"
    if answers.parent.name == "model_answer":
        return answers.parent.parent / "model_judgment" / name
    return answers.with_name(f"{answers.stem}-{name}")


def make_result(scores: dict[Match, float], options: argparse.Namespace, seconds: float) -> EvalResult:
    """The average over turns and categories; and each turn, category, and category and turn."""
    others: dict[str, Figure] = {f"turn {turn}": mean_rating(scores, turn=turn) for turn in (1, 2)}
    for category in _categories(scores):
        others[category] = mean_rating(scores, category)
        others |= {f"{category}, turn {turn}": mean_rating(scores, category, turn) for turn in (1, 2)}
    prompts = f"FastChat's prompts ({options.judge_prompts})" if options.judge_prompts else "own prompts"
    return EvalResult(
        task="mt_bench",
        metric="rating",
        figure=mean_rating(scores),
        decoding=f"judged by {options.model} at {options.base_url}, {prompts}",
        seconds=seconds,
        samples=(),
        others=others,
        counts={"without a rating": sum(score == NO_RATING for score in scores.values())},
    )


def table(scores: dict[Match, float]) -> list[list[str]]:
    """Categories by turns."""
    rows = [["category", "turn 1", "turn 2", "both"]]
    rows += [_row(category, category, scores) for category in _categories(scores)]
    return [*rows, _row("all", None, scores)]


def _row(name: str, category: str | None, scores: dict[Match, float]) -> list[str]:
    figures = [mean_rating(scores, category, turn) for turn in (1, 2, None)]
    return [name, *(str(figure) if figure.n else "none" for figure in figures)]


def _categories(scores: dict[Match, float]) -> list[str]:
    return [name for name in TEMPERATURES if any(match.question.category == name for match in scores)]


if __name__ == "__main__":
    run_program(main)
