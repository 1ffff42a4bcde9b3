"""GSM8K by generation: greedy unless a temperature is given.

    python eval/eval_gsm8k.py --model_name=path/to/merged --wandb_name=my-run
    python eval/eval_gsm8k.py --model_name=path/to/base --adapter=path/to/adapter --limit=100
    accelerate launch --config_file accelerate_config.yaml eval/eval_gsm8k.py --model_name=path/to/merged

``--data`` takes the test split as a local file with the columns question and answer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.benchmarks.gsm8k import PROMPT, grade_numbers, read_problems
from eval.command import evaluate_program, make_parser, positive, run_program
from eval.engine.generation import Decoding


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    # The published command spells it with three dashes.
    parser.add_argument("--top_p", "---top_p", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=positive, default=512)
    parser.add_argument("--prompt", default=PROMPT, help=f"with {{question}}; default {PROMPT!r}")
    options = parser.parse_args(arguments)
    decoding = Decoding(options.max_new_tokens, options.temperature, options.top_p)
    # Before any weights: what is wrong with the data is said at once.
    problems = read_problems(options.data, options.limit, options.prompt)
    evaluate_program(
        lambda subject, request: grade_numbers(subject, problems, request, decoding), "gsm8k", options
    )


if __name__ == "__main__":
    run_program(main)
