r"""The commonsense sets of LLM-Adapters by generation, decoded as published unless told otherwise.

    python eval/commonsense_evaluate.py --dataset boolq --base_model path/to/merged --name my-run \
        --batch_size 1 --data dataset
    python eval/commonsense_evaluate.py --dataset all --base_model path/to/base \
        --adapter path/to/adapter --data dataset

``--data`` is the folder dataset/ of github.com/AGI-Edgerunners/LLM-Adapters, with {name}/test.json for
each set, or one such file. ``--dataset all`` prints the eight sets and their mean.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.benchmarks.commonsense import ALL, GREEDY, PUBLISHED, SETS, grade_sets, read_sets
from eval.command import evaluate_program, make_parser, run_program
from lora_one.errors import UserError, nearest


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = make_parser(__doc__, ("--base_model", "--model_name"))
    parser.add_argument("--dataset", required=True, help=f"{', '.join(SETS)} or all")
    parser.add_argument("--name", help="folder of the results in --output_dir; default: the model's name")
    parser.add_argument(
        "--decoding", choices=("published", "greedy"), default="published", help=f"published: {PUBLISHED}"
    )
    options = parser.parse_args(arguments)
    if options.dataset not in {*SETS, "all"}:
        hint = nearest(options.dataset, [*SETS, "all"])
        raise UserError(f"--dataset {options.dataset}: no such set{hint}; there are {', '.join(SETS)}, all")
    name = ALL if options.dataset == "all" else options.dataset
    # Before any weights: what is wrong with the data is said at once.
    sets = read_sets(name, options.data, options.limit)
    decoding = PUBLISHED if options.decoding == "published" else GREEDY
    evaluate_program(lambda subject, request: grade_sets(subject, sets, request, decoding), name, options)


if __name__ == "__main__":
    run_program(main)
