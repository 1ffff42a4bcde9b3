"""Every dataset in its true columns and in every file format; custom ones; streams; disjoint splits."""

import csv
import gzip
import json
import re
import shlex
from pathlib import Path

import datasets
import pyarrow
import pytest
from conftest import ROOT, SHARED, only_run
from pyarrow import parquet

from lora_one.config import DatasetConfig
from lora_one.data import rows as rows_module
from lora_one.data.custom import spec_of
from lora_one.data.loading import held_out_examples, load_splits
from lora_one.data.rows import HubSource, Wanted, open_hub
from lora_one.data.specs import SPECS, Example
from lora_one.errors import UserError

OPENING = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)


def alpaca(instruction: str) -> str:
    return f"{OPENING}### Instruction:\n{instruction}\n\n### Response:\n"


GSM8K = {"question": "What is 1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}
META_MATH = {
    "type": "MATH_Rephrased",
    "query": "Add 1, 1",
    "original_question": "1 + 1?",
    "response": "2\nThe answer is: 2",
}
# For every dataset a row as it is published (on the Hub unless its own files say otherwise), with the
# prompt and target that it must become; written out by hand.
ROWS = {
    "tiny": (GSM8K, "Q: What is 1 + 1?\nA: ", GSM8K["answer"]),
    "tiny_one_step": (GSM8K, "Q: What is 1 + 1?\nA: ", GSM8K["answer"]),
    "tiny_shuffled": (GSM8K, "Q: What is 1 + 1?\nA: ", GSM8K["answer"]),
    "gsm8k": (GSM8K, "Q: What is 1 + 1?\nA: ", GSM8K["answer"]),
    "meta_math": (META_MATH | {"type": "GSM_AnsAug"}, "Q: Add 1, 1\nA: ", "2"),
    "meta_math_full": (META_MATH, "Q: Add 1, 1\nA: ", "2"),
    "alpaca": (
        {"output": "E, G", "input": "G, E", "instruction": "Sort"},
        "### Instruction:\nSort\n\n### Input:\nG, E\n\n### Response:\n",
        "E, G",
    ),
    "alpaca_gpt4": (
        {"instruction": "Say hi", "input": "", "output": "Hi.", "text": f"{alpaca('Say hi')}Hi."},
        alpaca("Say hi"),
        "Hi.",
    ),
    "wizard_lm": (
        {"output": "Yes.", "instruction": "Ok?", "output_zh": "是", "instruction_zh": "好吗"},
        alpaca("Ok?"),
        "Yes.",
    ),
    "codefeedback": (
        {
            "query": "Print 1",
            "answer": "So:\n```python\nprint(1)\n```\nor\n```python\nprint('1')\n```",
            "resource": "evol_instruct",
            "lang": "python",
        },
        alpaca("Print 1"),
        "So:\n```python\nprint(1)\n```",
    ),
    "flan": ({"inputs": "Is it?", "targets": "It is", "task": "x"}, alpaca("Is it?"), "It is"),
    "flan_v2": (
        {"inputs": "Is it?\nOPTIONS: yes, no", "targets": "yes", "task": "x"},
        "Is it?\nOPTIONS: yes, no",
        "yes",
    ),
    "commonsense_reasoning": (
        {"instruction": "True?", "input": "", "output": "the correct answer is true", "answer": "true"},
        alpaca("True?"),
        "the correct answer is true",
    ),
    "sst2": (
        {"sentence": "fine , really ", "label": 1, "idx": 0},
        "classify the sentiment of the text: fine , really \nresult: ",
        "positive",
    ),
    "cola": (
        {"sentence": "Him goes.", "label": 0, "idx": 7},
        "classify the grammaticality of the text: Him goes.\nresult: ",
        "unacceptable",
    ),
    "qqp": (
        {"question1": "a?", "question2": "b?", "label": 0, "idx": 1},
        "classify the semantic similarity of the text: a?\nb?\nresult: ",
        "different",
    ),
    "mrpc": (
        {"sentence1": "a .", "sentence2": "b .", "label": 1, "idx": 1},
        "classify the semantic similarity of the text: a .\nb .\nresult: ",
        "equivalent",
    ),
    "mnli": (
        {"premise": "a .", "hypothesis": "b .", "label": 2, "idx": 1},
        "classify the semantic similarity of the text: a .\nb .\nresult: ",
        "contradiction",
    ),
    "qnli": (
        {"question": "a?", "sentence": "b.", "label": 1, "idx": 1},
        "classify the semantic similarity of the question and the sentence: a?\nb.\nresult: ",
        "not_entailment",
    ),
    "rte": (
        {"sentence1": "a.", "sentence2": "b.", "label": 0, "idx": 1},
        "determine if the hypothesis is entailed by the premise: \npremise: a.\nhypothesis: b.\nresult: ",
        "entailment",
    ),
    "boolq": (
        {"question": "is it so", "passage": "It is.", "idx": 0, "label": 1},
        "determine if the statement is true or false based on the passage: It is.\n"
        "Question: is it so\nresult: ",
        "true",
    ),
    "cb": (
        {"premise": "a", "hypothesis": "b", "idx": 0, "label": 1},
        "classify the relationship between the premise and hypothesis: \npremise: a\nhypothesis: b\nresult: ",
        "contradiction",
    ),
    "copa": (
        {"premise": "p", "choice1": "c", "choice2": "d", "question": "cause", "idx": 0, "label": 1},
        "choose the correct cause: \npremise: p\nchoice 1: c\nchoice 2: d\nresult: ",
        "choice 2",
    ),
    "wic": (
        {
            "word": "bed",
            "sentence1": "a bed",
            "sentence2": "the bed",
            "start1": 2,
            "start2": 4,
            "end1": 5,
            "end2": 7,
            "idx": 0,
            "label": 0,
        },
        "determine if the word has the same meaning in both sentences: \nword: bed\nsentence1: a bed\n"
        "sentence2: the bed\nresult: ",
        "false",
    ),
    "emo": (
        {"text": "so happy for you", "label": 3},
        "classify the emotion of the text: so happy for you\nresult: ",
        "angry",
    ),
    "squad": (
        {
            "id": "5",
            "title": "T",
            "context": "In 1900, or 1901.",
            "question": "When?",
            "answers": {"text": ["1900", "1901"], "answer_start": [3, 12]},
        },
        "answer the question: When?\ncontext: In 1900, or 1901.\nresult: ",
        "1900, 1901",
    ),
    "wikitext": ({"text": " A paragraph . \n"}, "", "A paragraph ."),
}


def write_rows(path: Path, rows: list[dict]) -> str:
    """Writes rows in the format that the name says."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    cells = [
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
        for row in rows
    ]
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        elif kind == "json":
            json.dump(rows, file)
        elif kind == "csv":
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(cells)
        else:
            lines = [list(rows[0]), *(list(row.values()) for row in cells)]
            file.writelines("\t".join(line) + "\n" for line in lines)
    return str(path)


def fits_tsv(row: dict) -> bool:
    return not any("\n" in str(value) or "\t" in str(value) for value in row.values())


CASES = [
    (name, kind)
    for name in ROWS
    for kind in ("jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "csv.gz")
    if kind != "tsv" or fits_tsv(ROWS[name][0])
]


def no_limit(texts: list[str]) -> list[int]:
    return [0] * len(texts)


def test_every_dataset_has_a_row_here():
    assert ROWS.keys() == SPECS.keys()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_dataset_is_read_from_every_format(tmp_path, name, kind):
    row, prompt, target = ROWS[name]
    file = write_rows(tmp_path / f"rows.{kind}", [row])
    config = DatasetConfig(name=name, train_file=file, validation_file=file)
    with pytest.raises(UserError, match="of 1 rows none is left for the train split"):
        load_splits(config, no_limit)  # its only row is the validation split
    spec = SPECS[name]
    wanted = Wanted(spec.columns, spec.optional_columns, spec.aliases, spec.headerless)
    ((_, read),) = rows_module.placed_file_rows(Path(file), wanted)
    example = spec.to_example(read)
    assert (example.prompt, example.target) == (prompt, target)


OWN_FILES = {
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t5\t6\t" a " he said .\tb .',
        '" a " he said .\nb .',
        "equivalent",
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "0\t1\t2\ta?\tb?\t1",
        "a?\nb?",
        "duplicate",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\ta?\tb.\tentailment", "a?\nb.", "entailment"),
    "sst2": ("sentence\tlabel", "it 's bad \t0", "it 's bad ", "negative"),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1n\tx\ta\tb\tneutral\tneutral",
        "a\nb",
        "neutral",
    ),
    "cola": (None, "gj04\t1\t\tIt is.", "It is.", "acceptable"),
}


@pytest.mark.parametrize("name", OWN_FILES)
def test_glues_own_files(tmp_path, name):
    header, line, text, word = OWN_FILES[name]
    path = tmp_path / "dev.tsv"
    path.write_text(f"{header}\n{line}\n" if header else f"{line}\n", encoding="utf-8")
    (example,) = held_out_examples(name, path)
    assert example.prompt.endswith(f": {text}\nresult: ")
    assert (example.target, example.answer) == (word, word)


def test_superglues_own_files_have_words_and_truth_values(tmp_path):
    row = {"question": "is it", "passage": "No.", "idx": 0, "label": False}
    assert held_out_examples("boolq", Path(write_rows(tmp_path / "a.jsonl", [row])))[0].target == "false"
    row = {"premise": "a", "hypothesis": "b", "label": "not_entailment", "idx": 0}
    assert (
        held_out_examples("rte", Path(write_rows(tmp_path / "b.jsonl", [row])))[0].target == "not_entailment"
    )


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.labels])
def test_label_words_are_different_and_in_the_order_of_their_numbers(name):
    spec, (row, _, target) = SPECS[name], ROWS[name]
    assert len(set(spec.labels)) == len(spec.labels)
    for number, word in enumerate(spec.labels):
        texts = {key: str(value) for key, value in row.items()}
        assert spec.to_example(texts | {"label": str(number)}).target == word
        assert spec.to_example(texts | {"label": word}).target == word
    assert target == spec.labels[row["label"]]


@pytest.mark.parametrize(
    ("label", "words"), [("-1", "not public"), ("2", "not one of 0 or"), ("x", "not one of")]
)
def test_a_label_that_is_none_is_named_with_its_line(tmp_path, label, words):
    path = tmp_path / "train.tsv"
    path.write_text(f"sentence\tlabel\nfine\t1\nbad\t{label}\n")
    with pytest.raises(UserError, match=rf"train.tsv, line 3: label '?{label}'?: .*{words}"):
        load_splits(DatasetConfig(name="sst2", train_file=str(path)), no_limit)


def test_rows_that_the_papers_leave_out():
    wizard, code, meta = (SPECS[name].to_example for name in ("wizard_lm", "codefeedback", "meta_math"))
    assert wizard({"instruction": "a", "output": "I'm Sorry, no"}) is None
    assert wizard({"instruction": "a", "output": "As an AI I"}) is None
    assert code({"query": "a", "answer": "no code"}) is None
    assert code({"query": "a", "answer": "x ```y"}).target == "x ```y```"
    assert meta({"type": "MATH_AnsAug", "query": "q", "response": "r"}) is None
    wikitext = SPECS["wikitext"].to_example
    assert wikitext({"text": ""}) is None
    assert wikitext({"text": " = = A heading = = \n"}) is None


def many_rows(name: str, n: int, start: int = 0) -> list[dict]:
    """Rows of a dataset that differ in a text."""
    row = ROWS[name][0]
    changed = (
        {"original_question"} if "original_question" in row else {"context"} if "context" in row else set()
    )
    changed |= {
        "query",
        "question",
        "sentence",
        "text",
        "instruction",
        "inputs",
        "premise",
        "sentence1",
        "question1",
    }
    return [
        row | {key: f"{row[key]} {i}" for key in changed & row.keys() if name != "copa" or key == "premise"}
        for i in range(start, start + n)
    ]


@pytest.mark.parametrize("name", SPECS)
def test_splits_are_disjoint_by_group(tmp_path, name):
    # Rows that are there twice, and rows that are in train and in test.
    rows = many_rows(name, 40)
    train = write_rows(tmp_path / "train.jsonl", rows + rows[:10])
    reader = SPECS[SPECS[name].test] if SPECS[name].test else SPECS[name]
    tested = next(key for key, spec in SPECS.items() if spec is reader)
    test = write_rows(tmp_path / "test.jsonl", many_rows(tested, 10, start=35))
    config = DatasetConfig(name=name, train_file=train, test_file=test, validation_size=6)
    splits = load_splits(config, no_limit)
    parts = {part: {e.group for e in getattr(splits, part)} for part in ("train", "validation", "test")}
    assert parts["train"] and len(splits.validation) == 6 and len(splits.test) == 10
    assert not parts["train"] & parts["validation"]
    assert not parts["train"] & parts["test"]
    assert not parts["validation"] & parts["test"]
    assert len(splits.train) + len(splits.validation) + splits.n_overlapping == 50
    order = [e.prompt + e.target for e in splits.train]
    again = load_splits(config, no_limit)
    assert order == [e.prompt + e.target for e in again.train]
    in_file_order = [
        e.prompt + e.target
        for row in rows
        if (
            e := SPECS[name].to_example(
                {k: str(v) if not isinstance(v, dict) else json.dumps(v) for k, v in row.items()}
            )
        )
    ]
    assert order != [text for text in in_file_order if text in set(order)]


REAL = [
    ("cola", "glue/CoLA/train.tsv", 8551),
    ("sst2", "glue/SST-2/train.tsv", 67349),
    ("mrpc", "glue/MRPC/train.tsv", 3667),
    ("rte", "glue/RTE/train.tsv", 2490),
    ("qnli", "glue/QNLI/dev.tsv", 5463),
    ("gsm8k", "gsm8k/train.jsonl", 7473),
    ("alpaca", "alpaca/alpaca_5000.json", 5000),
    ("alpaca", "code/code_alpaca_2k.json", 2017),
    ("commonsense_reasoning", "commonsense/train_mix_20k.json", 20_000),
    ("wikitext", "wikitext2/train_5k.txt", None),
]


@pytest.mark.parametrize(("name", "file", "n_rows"), REAL)
def test_real_files(name, file, n_rows):
    path = SHARED / "data" / file
    if not path.is_file():
        pytest.skip(f"needs ../shared/data/{file}")
    examples = held_out_examples(name, path)
    assert len(examples) == n_rows if n_rows else len(examples) > 1000
    assert all(example.target.strip() for example in examples if name not in ("alpaca",))
    if SPECS[name].labels:
        assert {example.target for example in examples} == set(SPECS[name].labels)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (
            "a.csv",
            "question,answer\nq,a\nq2,a,b\n",
            r"a.csv, line 3: has 3 cells where the header has 2; .*quotes",
        ),
        ("a.csv", 'question,answer\nq,"a\n', "a.csv, line .*: not valid CSV"),
        ("a.csv", "question,question\nq,a\n", "line 1: column 'question' is there twice"),
        (
            "a.csv",
            "question,anwser\nq,a\n",
            "no column 'answer'; it has: question, anwser .did you mean 'anwser'",
        ),
        ("a.csv", "q,a\n1,2\n", "line 2: no columns 'question', 'answer'; it has: q, a"),
        ("a.csv", "", "split is empty"),
        ("a.tsv", "question\tanswer\n", "split is empty"),
        ("a.tsv", "question\tanswer\nq\n", "a.tsv, line 2: has 1 cells where the header has 2"),
        ("a.parquet", "no parquet", "a.parquet: not a whole Parquet file"),
        ("a.parquet", "", "a.parquet: not a whole Parquet file"),
        ("a.jsonl.gz", "no gzip", "a.jsonl.gz: not a whole gzip file"),
        ("a.csv.gz", b"\x1f\x8b\x08\x00", "a.csv.gz: not a whole gzip file"),
        ("a.parquet.gz", "x", "cannot read .gz"),
        ("a.txt", "x", "cannot read .txt; give .jsonl, .json, .csv"),
        ("a.csv", b"question,answer\n\xff,a\n", "not UTF-8 text"),
        ("a.csv", "question,answer\nq,a\x00\n", None),
    ],
)
def test_bad_files_in_one_line(tmp_path, file, content, words):
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = DatasetConfig(name="gsm8k", train_file=str(path))
    with pytest.raises(UserError, match=words) as raised:
        load_splits(config, no_limit)
    assert "\n" not in str(raised.value)


def test_a_gzip_file_that_is_cut_short(tmp_path):
    path = Path(write_rows(tmp_path / "a.jsonl.gz", many_rows("gsm8k", 500)))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="not a whole gzip file"):
        load_splits(DatasetConfig(name="gsm8k", train_file=str(path)), no_limit)


def custom(tmp_path, rows, **settings) -> DatasetConfig:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    return DatasetConfig(name="custom", train_file=file, **settings)


def test_custom_templates(tmp_path):
    rows = [{"my question": f"{i}?", "a": f"is {{{i}}}", "n": i} for i in range(9)]
    config = custom(
        tmp_path, rows, prompt=r"{{Q}}: {my question}\nA: ", target="a", answer="n", validation_size=2
    )
    splits = load_splits(config, no_limit)
    examples = {e.prompt: e for e in (*splits.train, *splits.validation)}
    assert examples["{Q}: 3?\nA: "] == Example("{Q}: 3?\nA: ", "is {3}", "3", "{Q}: 3?\nA: ")
    assert spec_of(config).joiner == ""
    config = custom(tmp_path, rows, prompt="{n}", target="{a}; {n}")
    assert {e.answer for e in load_splits(config, no_limit).train} <= {f"is {{{i}}}; {i}" for i in range(9)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target": "a"}, "dataset.prompt: is required with dataset=custom"),
        ({"prompt": "{q}"}, "dataset.target: is required with dataset=custom"),
        (
            {"prompt": "{quest}", "target": "a"},
            "line 1: no column 'quest'; it has: q, a, m$",
        ),
        ({"prompt": "{q}", "target": "{b} {c}"}, "line 1: no columns 'b', 'c'; it has: q, a, m"),
        ({"prompt": "{q}", "target": "a", "answer": "gold"}, "no column 'gold'; it has: q, a, m"),
        ({"prompt": "{q", "target": "a"}, r"dataset.prompt='\{q': .*write \{column\}"),
        ({"prompt": "{q!r}", "target": "a"}, "only {column} can be filled in"),
        ({"prompt": "{}", "target": "a"}, "only {column} can be filled in"),
        ({"messages": "m"}, "dataset.messages=m: conversations need a chat template; add dataset.chat=true"),
        ({"messages": "m", "prompt": "{q}", "chat": True}, "leave out dataset.prompt"),
        ({"messages": "m", "chat": True}, "line 1: column 'm': expected a list of {\"role\""),
    ],
)
def test_custom_mistakes(tmp_path, settings, words):
    config = custom(tmp_path, [{"q": f"{i}", "a": "x", "m": "text"} for i in range(5)], **settings)
    with pytest.raises(UserError, match=words):
        load_splits(config, no_limit)


def test_custom_needs_a_file():
    with pytest.raises(UserError, match=r"dataset.train_file: is required with dataset=custom"):
        load_splits(DatasetConfig(name="custom", prompt="{a}", target="b"), no_limit)


class Hub:
    """Stands in for ``datasets.load_dataset``: local rows, counted as they are read."""

    def __init__(self, n: int, row) -> None:
        self.n, self.row, self.n_read, self.calls = n, row, 0, []

    def load_dataset(self, path, config, **settings):
        self.calls.append((path, config, settings))
        if not settings["streaming"]:
            return datasets.Dataset.from_list([self.row(i) for i in range(self.n)])

        def rows():
            for i in range(self.n):
                self.n_read += 1
                yield self.row(i)

        return datasets.IterableDataset.from_generator(rows)


@pytest.fixture
def hub(monkeypatch):
    fake = Hub(60_000, lambda i: {"inputs": f"{i}?", "targets": f"{i}.", "task": "t"})
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    return fake


def test_a_stream_is_read_no_further_than_needed(hub):
    config = DatasetConfig(name="flan_v2", train_size=300, validation_size=20)
    limits = lambda texts: [600 if text.startswith("1") else 10 for text in texts]  # noqa: E731
    splits = load_splits(config, limits)
    assert (len(splits.train), len(splits.validation)) == (300, 20)
    assert hub.n_read <= 10_000 + 2_000  # the buffer that shuffles, and what is read ahead
    assert not any(e.prompt.startswith("1") for e in splits.train)
    assert splits.n_too_long > 0
    numbers = [int(e.prompt[:-1]) for e in splits.train]
    assert numbers != sorted(numbers)
    assert load_splits(config, limits).fingerprint == splits.fingerprint
    (_, _, settings), *_ = hub.calls
    assert settings["data_files"] == {"train": "*_train.jsonl.gz"}
    assert (
        splits.sources["train"]["commit"]
        == settings["revision"]
        == SPECS["flan_v2"].sources["train"].revision
    )


def test_streaming_is_a_choice(hub):
    with pytest.raises(UserError, match=r"dataset.train_size: is required where rows are streamed"):
        load_splits(DatasetConfig(name="flan"), no_limit)
    whole = load_splits(DatasetConfig(name="flan", streaming=False, validation_size=10), no_limit)
    assert len(whole.train) == 59_990
    assert hub.n_read == 0


def test_a_revision_is_passed_on_and_recorded(hub, monkeypatch):
    monkeypatch.setattr(rows_module, "_newest_commit", lambda path: "c" * 40)
    source = HubSource("some/data", "train")
    _, origin = open_hub(source, Wanted(("inputs",)), "")
    assert (hub.calls[-1][2]["revision"], origin["commit"], origin["revision"]) == ("c" * 40, "c" * 40, None)
    splits = load_splits(DatasetConfig(name="flan", revision="v2", train_size=5, validation_size=2), no_limit)
    assert hub.calls[-1][2]["revision"] == splits.sources["train"]["revision"] == "v2"
    assert splits.sources["train"]["commit"] is None  # a stream does not say


def test_a_revision_is_of_the_training_data_alone(hub, monkeypatch):
    rows = {
        "meta-math/MetaMathQA": [
            {**META_MATH, "type": "GSM_x", "original_question": f"{i}"} for i in range(40)
        ],
        "openai/gsm8k": [GSM8K],
    }
    seen = {}

    def load_dataset(path, config, **settings):
        seen[path] = settings["revision"]
        return datasets.Dataset.from_list(rows[path])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_splits(DatasetConfig(name="meta_math", revision="abc", validation_size=2), no_limit)
    assert seen == {"meta-math/MetaMathQA": "abc", "openai/gsm8k": SPECS["gsm8k"].sources["test"].revision}


def test_a_stream_that_breaks_is_told_in_one_line(hub):
    def broken(i):
        if i == 500:
            raise ConnectionError("gone")
        return {"inputs": f"{i}?", "targets": "x"}

    hub.row = broken
    with pytest.raises(
        UserError, match="dataset Muennighoff/flan: the Hugging Face Hub cannot be reached"
    ) as raised:
        load_splits(DatasetConfig(name="flan", train_size=1000), no_limit)
    assert "\n" not in str(raised.value)


def test_pinned_revisions_are_commits():
    for spec in SPECS.values():
        for source in spec.sources.values():
            revision = source.revision
            assert (
                revision is None or revision == "refs/convert/parquet" or len(bytes.fromhex(revision)) == 20
            )


def test_a_run_on_custom_files(cli, tmp_path):
    rows = [{"q": f"{i} + 1", "a": f"{i + 1}", "gold": f"#### {i + 1}"} for i in range(30)]
    train, test = (
        write_rows(tmp_path / name, rows[part])
        for name, part in (("a.csv", slice(24)), ("b.parquet", slice(24, 30)))
    )
    arguments = ["dataset=custom", "model=tiny", f"dataset.train_file={train}", f"dataset.test_file={test}"]
    arguments += [r"dataset.prompt=Q: {q}\nA: ", "dataset.target={a} #### {a}", "dataset.answer=gold"]
    arguments += ["eval.task=gsm8k", "eval.max_new_tokens=4", "model.max_steps=2", "model.real_batch_size=4"]
    done = cli(*arguments, "init=default", "wandb.mode=disabled")
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path)
    sample = json.loads((folder / "test.jsonl").read_text().splitlines()[0])
    assert (sample["prompt"], sample["reference"]) == ("Q: 24 + 1\nA: ", "25")
    planned = cli(*arguments, "dry_run=true")
    assert "train 23, validation 1, test 6" in planned.stdout
    wrong = cli(*arguments, r"dataset.prompt={question}", "dry_run=true")
    assert wrong.returncode == 2
    assert "b.parquet, row 1: no column 'question'; it has: q, a, gold" in wrong.stderr


PAGE = (ROOT / "docs" / "datasets.md").read_text()
COMMANDS = [
    shlex.split(line)[2:]
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]


def test_the_page_names_every_dataset():
    for path in (ROOT / "conf" / "dataset").glob("*.yaml"):
        assert f"`{path.stem}`" in PAGE or f"dataset={path.stem}" in PAGE


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_the_commands_of_the_page_plan(cli, tmp_path, arguments):
    for name in ("train", "test"):
        write_rows(tmp_path / f"{name}.jsonl", many_rows("gsm8k", 40, start=40 * (name == "test")))
    done = cli(
        *(argument.replace("path/to/", f"{tmp_path}/") for argument in arguments),
        "dataset.validation_size=2",
        "dry_run=true",
    )
    assert done.returncode == 0, done.stderr
    assert "train 38, validation 2" in done.stdout


def test_the_plan_of_a_stream_says_what_will_be_taken(cli):
    done = cli("dataset=flan", "dry_run=true")
    assert "train 100,000, validation 1,000, test unknown offline" in done.stdout
    assert "3,125 of 32 examples" in done.stdout
