"""HumanEval: samples of every problem, and with --execute their pass@k.

    python eval/eval_humaneval.py --model_name=path/to/merged --num_sample=1
    python eval/eval_humaneval.py --model_name=path/to/merged --num_sample=10 --execute
    python eval/eval_humaneval.py --model_name=path/to/base --prompt=completion --temperature=0 --execute

Without --execute nothing that a model wrote is run; evaluate_functional_correctness.py runs it later.
``--data`` takes HumanEval.jsonl or HumanEval.jsonl.gz.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.benchmarks.execution import add_execution_flags, chosen_limits
from eval.benchmarks.humaneval import Sampling, containment, sample_and_run, sample_only
from eval.command import evaluate_program, make_parser, output_folder, positive, run_program
from eval.results import EvalResult
from eval.subject import Request, Subject
from lora_one.errors import UserError


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--num_sample", type=positive, default=1, help="samples of each problem (1)")
    parser.add_argument("--prompt", choices=("alpaca", "completion"), default="alpaca")
    parser.add_argument("--temperature", type=float, help="0: greedy; default .1, .6 or .8 by --num_sample")
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--max_new_tokens", type=positive, default=512)
    parser.add_argument("--execute", action="store_true", help="run the samples too, contained")
    add_execution_flags(parser)
    options = parser.parse_args(arguments)
    if options.temperature is not None and options.temperature < 0:
        raise UserError(f"--temperature={options.temperature}: must not be below 0")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top_p={options.top_p}: must be above 0 and at most 1")
    sampling = Sampling(
        options.num_sample, options.prompt, options.temperature, options.top_p, options.max_new_tokens
    )

    def benchmark(subject: Subject, request: Request) -> EvalResult:
        if not options.execute:
            return sample_only(subject, request, sampling)
        sandbox = containment(subject, chosen_limits(options), unsafe=options.unsafe_execution)
        return sample_and_run(subject, request, sampling, sandbox, options.workers)

    evaluate_program(benchmark, "humaneval", options)
    if not options.execute:
        samples = output_folder(options, "humaneval") / "samples.jsonl"
        flags = [f"--{key}={value}" for key in ("data", "limit") if (value := getattr(options, key))]
        second = ["python", "eval/evaluate_functional_correctness.py", f"--sample_file={samples}", *flags]
        print(f"next: {shlex.join([*second, '--k=1'])}")


if __name__ == "__main__":
    run_program(main)
