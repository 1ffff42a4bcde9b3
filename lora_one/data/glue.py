"""Classification as text to text: GLUE, SuperGLUE and EmoContext, with the published prompts.

The labels of GLUE's and SuperGLUE's test splits are not public: their validation splits are the test
here, and validation is carved from train.
"""

from collections.abc import Callable, Mapping

from lora_one.data.example import DatasetSpec, Example, RowError
from lora_one.data.rows import HubSource, Row

_GLUE = ("nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")
_SUPER_GLUE = ("aps/super_glue", "3de24cf8022e94f4ee4b9d55a6f539891524d646")


def label_word(value: str, labels: tuple[str, ...]) -> str:
    """The word of a label, which is given as that word or as its number.

    Raises:
        RowError: For anything else, and for -1, which stands for a label that is not public.
    """
    if value in labels:
        return value
    if value.isdecimal() and int(value) < len(labels):
        return labels[int(value)]
    if value == "-1":
        raise RowError("label -1: this split's labels are not public; give another split")
    known = ", ".join(f"{number} or {word}" for number, word in enumerate(labels))
    raise RowError(f"label {value!r}: not one of {known}")


def _classifier(prompt: str, labels: tuple[str, ...]) -> Callable[[Row], Example]:
    def to_example(row: Row) -> Example:
        text = prompt.format(**row)
        word = label_word(row["label"], labels)
        return Example(text, word, word, text)

    return to_example


def _task(
    repository: tuple[str, str],
    name: str,
    columns: tuple[str, ...],
    prompt: str,
    labels: tuple[str, ...],
    *,
    test: str = "validation",
    aliases: Mapping[str, str] | None = None,
    headerless: tuple[str, ...] = (),
) -> DatasetSpec:
    path, revision = repository
    return DatasetSpec(
        columns=(*columns, "label"),
        to_example=_classifier(prompt, labels),
        sources={
            "train": HubSource(path, "train", name, revision),
            "test": HubSource(path, test, name, revision),
        },
        labels=labels,
        aliases=aliases or {},
        headerless=headerless,
    )


def _copa_row(row: Row) -> Example:
    if row["question"] not in ("cause", "effect"):
        raise RowError(f"question {row['question']!r}: neither cause nor effect")
    text = (
        f"choose the correct {row['question']}: \npremise: {row['premise']}\n"
        f"choice 1: {row['choice1']}\nchoice 2: {row['choice2']}\nresult: "
    )
    word = label_word(row["label"], _CHOICES)
    return Example(text, word, word, text)


_CHOICES = ("choice 1", "choice 2")
_EMOTIONS = ("others", "happy", "sad", "angry")
_SIMILAR = "classify the semantic similarity of the text: "
_PAIR = ("sentence1", "sentence2")
_HYPOTHESIS = ("premise", "hypothesis")
_HYPOTHESIS_PROMPT = "{}: \npremise: {{{}}}\nhypothesis: {{{}}}\nresult: "

CLASSIFICATION: dict[str, DatasetSpec] = {
    "sst2": _task(
        *(_GLUE, "sst2", ("sentence",)),
        "classify the sentiment of the text: {sentence}\nresult: ",
        ("negative", "positive"),
    ),
    "cola": _task(
        *(_GLUE, "cola", ("sentence",)),
        "classify the grammaticality of the text: {sentence}\nresult: ",
        ("unacceptable", "acceptable"),
        headerless=("source", "label", "mark", "sentence"),
    ),
    "qqp": _task(
        *(_GLUE, "qqp", ("question1", "question2")),
        _SIMILAR + "{question1}\n{question2}\nresult: ",
        ("different", "duplicate"),
        aliases={"is_duplicate": "label"},
    ),
    "mrpc": _task(
        *(_GLUE, "mrpc", _PAIR),
        _SIMILAR + "{sentence1}\n{sentence2}\nresult: ",
        ("different", "equivalent"),
        aliases={"Quality": "label", "#1 String": "sentence1", "#2 String": "sentence2"},
    ),
    "mnli": _task(
        *(_GLUE, "mnli", _HYPOTHESIS),
        _SIMILAR + "{premise}\n{hypothesis}\nresult: ",
        ("entailment", "neutral", "contradiction"),
        test="validation_matched",
        aliases={"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
    ),
    "qnli": _task(
        *(_GLUE, "qnli", ("question", "sentence")),
        "classify the semantic similarity of the question and the sentence: {question}\n{sentence}\nresult: ",
        ("entailment", "not_entailment"),
    ),
    # The published program reads the same rows from SuperGLUE.
    "rte": _task(
        *(_GLUE, "rte", _PAIR),
        _HYPOTHESIS_PROMPT.format("determine if the hypothesis is entailed by the premise", *_PAIR),
        ("entailment", "not_entailment"),
        aliases={"premise": "sentence1", "hypothesis": "sentence2"},
    ),
    "boolq": _task(
        *(_SUPER_GLUE, "boolq", ("passage", "question")),
        "determine if the statement is true or false based on the passage: {passage}\n"
        "Question: {question}\nresult: ",
        ("false", "true"),
        aliases={"answer": "label"},
    ),
    "cb": _task(
        *(_SUPER_GLUE, "cb", _HYPOTHESIS),
        _HYPOTHESIS_PROMPT.format(
            "classify the relationship between the premise and hypothesis", *_HYPOTHESIS
        ),
        ("entailment", "contradiction", "neutral"),
    ),
    "copa": DatasetSpec(
        **{
            **vars(_task(_SUPER_GLUE, "copa", ("premise", "choice1", "choice2", "question"), "", _CHOICES)),
            "to_example": _copa_row,
        }
    ),
    "wic": _task(
        *(_SUPER_GLUE, "wic", ("word", *_PAIR)),
        "determine if the word has the same meaning in both sentences: \nword: {word}\n"
        "sentence1: {sentence1}\nsentence2: {sentence2}\nresult: ",
        ("false", "true"),
    ),
    # The Hub has it as a program, which datasets no longer runs, and as Parquet on a branch of its own.
    "emo": DatasetSpec(
        columns=("text", "label"),
        to_example=_classifier("classify the emotion of the text: {text}\nresult: ", _EMOTIONS),
        sources={
            split: HubSource(
                "SemEvalWorkshop/emo",
                split,
                revision="refs/convert/parquet",
                data_files=f"emo2019/{split}/*.parquet",
            )
            for split in ("train", "test")
        },
        labels=_EMOTIONS,
    ),
}
