"""Runs HumanEval samples, contained, and prints pass@k.

    python eval/evaluate_functional_correctness.py --sample_file=path/to/samples.jsonl --k=1
    python eval/evaluate_functional_correctness.py --sample_file=s.jsonl --k=1,10 --data=HumanEval.jsonl.gz

The sample file holds ``task_id`` and ``completion``, one JSON object a line, as HumanEval's own tools
write it. Every sample with its outcome goes to a file beside it, ``…_results.jsonl``.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.benchmarks.execution import add_execution_flags, chosen_limits
from eval.benchmarks.humaneval import read_problems, read_samples, run_samples
from eval.command import positive, print_figures, run_program
from eval.sandbox.outside import find_sandbox
from lora_one.files import write_text


def whole_numbers(text: str) -> list[int]:
    """``1,10,100`` as numbers, for argparse."""
    return sorted({positive(part) for part in text.split(",")})


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sample_file", type=Path, required=True)
    parser.add_argument("--k", type=whole_numbers, default=[1], help="one or several, as in 1,10,100 (1)")
    parser.add_argument("--data", "--problem_file", type=Path, help="HumanEval.jsonl(.gz) instead of the Hub")
    parser.add_argument("--limit", type=positive, help="the first so many problems only")
    add_execution_flags(parser)
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    problems = read_problems(options.data, options.limit)
    samples = read_samples(options.sample_file, problems)
    sandbox = find_sandbox(chosen_limits(options), unsafe=options.unsafe_execution)
    results = Path(f"{options.sample_file}_results.jsonl")
    kept = Path(f"{options.sample_file}_executed.jsonl")
    result = run_samples(
        problems, samples, sandbox, kept, options.k, "samples of a file", start, options.workers
    )
    write_text(results, result.samples_jsonl())
    kept.unlink()  # not earlier: should writing fail, nothing has to run again
    print_figures(result)
    print(f"{result.decoding}, {result.seconds:.1f} s; in {results}")


if __name__ == "__main__":
    run_program(main)
