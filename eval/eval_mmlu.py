"""MMLU by the logits of the four letters, five worked examples before each question.

    python eval/eval_mmlu.py path/to/merged
    python eval/eval_mmlu.py path/to/base --adapter=path/to/adapter --data=path/to/mmlu --limit=570
    accelerate launch --config_file accelerate_config.yaml eval/eval_mmlu.py path/to/merged --shots=0

``--data`` takes the folder of the original files, with ``dev/`` and ``test/``. ``--limit`` takes the first
questions of every subject in turn.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.benchmarks.mmlu import examine
from eval.benchmarks.mmlu_data import read_exams
from eval.benchmarks.mmlu_subjects import SUBJECTS
from eval.command import evaluate_program, make_parser, run_program
from eval.results import EvalResult
from eval.subject import Request, Subject


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = make_parser(__doc__, ("model_name",))
    parser.add_argument("--shots", type=int, choices=range(6), default=5, help="worked examples (5)")
    parser.add_argument("--subjects", help="only these, with commas between them")
    parser.add_argument(
        "--shared_prefix",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read a subject's worked examples once for all its questions",
    )
    options = parser.parse_args(arguments)
    subjects = options.subjects.split(",") if options.subjects else SUBJECTS
    # Before the model: a fault of the data is found at once.
    exams = read_exams(options.data, subjects, options.shots)

    def benchmark(subject: Subject, request: Request) -> EvalResult:
        return examine(subject, request, exams, options.shots, shares_prefix=options.shared_prefix)

    evaluate_program(benchmark, "mmlu", options)


if __name__ == "__main__":
    run_program(main)
