"""MT-Bench, first half: the model's answers in FastChat's format; eval/judge_mt_bench.py grades them.

    python eval/eval_mt_bench.py --model_name=path/to/merged --data=path/to/question.jsonl
    python eval/eval_mt_bench.py --model_name=path/to/base --adapter=path/to/adapter --model_id=my-run

Writes ``model_answer/<model_id>.jsonl`` below the output folder. Temperatures are FastChat's, by category.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.benchmarks.mt_bench import TEMPLATES, mt_bench, read_questions
from eval.command import evaluate_program, make_parser, output_folder, positive, run_program
from eval.results import EvalResult
from eval.subject import Request, Subject
from lora_one.files import write_text


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--max_new_tokens", type=positive, default=1024, help="of each turn (1024)")
    parser.add_argument("--template", choices=TEMPLATES, default="auto", help="how turns become a prompt")
    parser.add_argument("--model_id", help="what the answers are called by; default: the model's folder")
    options = parser.parse_args(arguments)
    if options.data is not None:
        read_questions(options.data)  # a broken file is named before any weights are read
    model_id = (options.model_id or output_folder(options, "mt_bench").parent.name).replace("/", "--")

    def benchmark(subject: Subject, request: Request) -> EvalResult:
        result = mt_bench(subject, request, options.max_new_tokens, options.template, model_id)
        if subject.processes.is_main and request.folder is not None:
            # A folder of its own: FastChat reads every .jsonl that lies beside the answers.
            path = request.folder / "model_answer" / f"{model_id}.jsonl"
            path.parent.mkdir(exist_ok=True)
            write_text(path, result.samples_jsonl())
        return result

    evaluate_program(benchmark, "mt_bench", options)


if __name__ == "__main__":
    run_program(main)
