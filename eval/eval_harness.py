"""Tasks of lm-evaluation-harness on a model, with an adapter that is not merged for it.

    python eval/eval_harness.py --tasks=gsm8k_cot --model_name=path/to/base --adapter=path/to/adapter
    python eval/eval_harness.py --tasks=gsm8k_cot --model_name=path/to/merged --data=path/to/test.jsonl
    python eval/eval_harness.py --tasks=mine,arc_easy --model_name=path/to/merged --include_path=path/to/tasks

``--data`` replaces the problems of gsm8k_cot by those of a local file; ``--include_path`` is a folder of task
files. Writes ``result.json``, ``samples.jsonl`` and lm-eval's own ``lm_eval.json``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.command import evaluate_program, make_parser, run_program
from eval.results import EvalResult
from eval.subject import Request, Subject
from lora_one.errors import UserError


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", required=True, help="names, separated by commas")
    parser.add_argument("--num_fewshot", type=int, help="examples before each question; default: the task's")
    parser.add_argument("--include_path", type=Path, help="folder of task files, beside lm-eval's own")
    options = parser.parse_args(arguments)
    names = list(dict.fromkeys(name.strip() for name in options.tasks.split(",") if name.strip()))
    if not names:
        raise UserError("--tasks: names no task; give one or more, separated by commas")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UserError(f"--num_fewshot={options.num_fewshot}: must be at least 0")
    for flag, path in (("--data", options.data), ("--include_path", options.include_path)):
        if path is not None and not path.exists():
            raise UserError(f"{flag}={path}: no such file or folder")
    if options.data is not None and options.include_path is not None:
        raise UserError("--data and --include_path: give one of them")
    from eval.benchmarks import harness  # takes seconds

    tasks = harness.load_tasks(names, options.data or options.include_path)

    def benchmark(subject: Subject, request: Request) -> EvalResult:
        return harness.run_tasks(subject, request, names, tasks, options.num_fewshot)

    evaluate_program(benchmark, "lm_eval-" + "-".join(names)[:80], options)


if __name__ == "__main__":
    run_program(main)
