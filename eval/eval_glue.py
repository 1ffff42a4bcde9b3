"""GLUE accuracy: the label whose first token is the likeliest after the prompt, of T5 and of causal models.

    python eval/eval_glue.py --model_name=path/to/merged --task=sst2
    python eval/eval_glue.py --model_name=path/to/t5-base --adapter=path/to/adapter --task=mrpc --data=dev.tsv
    accelerate launch --config_file accelerate_config.yaml eval/eval_glue.py --model_name=merged --task=qnli

``--task`` is the name of the dataset in ``conf/dataset``, ``--data`` its labelled split as a local file.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.benchmarks.labels import grade_labels
from eval.command import evaluate_program, make_parser, run_program
from eval.results import EvalResult
from eval.subject import Request, Subject
from lora_one.data.loading import held_out_examples
from lora_one.data.specs import SPECS
from lora_one.errors import UserError, nearest


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--task", required=True, help="sst2, cola, mrpc, qnli, …: a dataset with label words")
    options = parser.parse_args(arguments)
    known = [name for name, each in SPECS.items() if each.labels]
    if options.task not in known:
        what = (
            "has no label words"
            if options.task in SPECS
            else f"no such dataset{nearest(options.task, known)}"
        )
        raise UserError(f"--task {options.task}: {what}; there are {', '.join(known)}")
    spec = SPECS[options.task]
    # Before the model: a fault of the data is found at once. Labels are those of the whole split.
    examples = held_out_examples(options.task, options.data)

    def glue(subject: Subject, request: Request) -> EvalResult:
        asked = replace(request, labels=spec.labels or (), joiner=spec.joiner)
        result = grade_labels(subject, examples, asked)
        return replace(result, task=options.task)

    evaluate_program(glue, options.task, options)


if __name__ == "__main__":
    run_program(main)
