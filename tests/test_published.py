"""The papers' tables: every published value, from hand-written expectations and from the notes."""

import re
from statistics import mean

import pytest
from conftest import SHARED

from lora_one.errors import UserError
from lora_one.published import Cell, find_table, printed_mean, read_tables

TABLES = read_tables()
REFERENCE = SHARED / "REFERENCE.md"
GLUE = ("mnli", "sst2", "cola", "qnli", "mrpc", "avg")
ABLATIONS = {f"ablation_{what}" for what in ("direction", "scale", "gamma", "sample")}


def glue(*row: float) -> dict[str, float]:
    return dict(zip(GLUE, row, strict=True))


def line_of(table: str, method: str):
    (line,) = [line for line in TABLES[table].lines if line.method == method]
    return line


def values(table: str, method: str, source: str) -> dict[str, float]:
    """Column name: the value of one source."""
    cells = line_of(table, method).published
    return {name: c.value for name, found in cells.items() for c in found if c.source == source}


def test_the_tables_that_there_are():
    assert TABLES.keys() == ABLATIONS | {
        *("glue_t5", "math", "math_lora_ga", "math_full", "code", "code_lora_ga", "mmlu", "mt_bench"),
        *("ranks", "commonsense", "cost"),
    }
    for table in TABLES.values():
        assert table.title and table.source and table.seeds
        assert len({line.method for line in table.lines}) == len(table.lines)


@pytest.mark.parametrize(
    ("table", "method", "source", "expected"),
    [
        ("glue_t5", "LoRA", "LoRA-GA", glue(85.30, 94.04, 69.35, 92.96, 68.38, 82.08)),
        ("glue_t5", "LoRA", "LoRA-One", glue(85.30, 94.04, 72.84, 93.02, 68.38, 82.72)),
        ("glue_t5", "LoRA-One", "LoRA-One", glue(85.89, 94.53, 82.04, 93.37, 87.83, 88.73)),
        ("glue_t5", "full fine-tuning", "LoRA-GA", glue(86.33, 94.75, 80.70, 93.19, 84.56, 87.91)),
        ("glue_t5", "LoRA, grid of learning rates", "AltLoRA", {"cola": 81.31, "mrpc": 86.03, "avg": 87.88}),
        ("math", "LoRA-One", "LoRA-One", {"gsm8k": 60.44, "gsm8k_cot": 55.88}),
        ("mmlu", "LoRA-GA", "LoRA-One", {"mmlu": 45.15}),
        ("code", "LoRA", "LoRA-One", {"humaneval": 25.85}),
        ("mt_bench", "DoRA", "LoRA-GA", {"mt_bench": 5.97}),
        ("ranks", "LoRA-GA, rank 128", "LoRA-GA", {"gsm8k": 55.07, "humaneval": 23.05, "mt_bench": 6.13}),
        ("commonsense", "full fine-tuning", "TaRA", {"llama2": 76.63, "llama3": 85.47}),
        ("commonsense", "PiSSA", "TaRA", {"llama2": 77.89, "llama3": 85.13, "qwen3": 87.24}),
        (
            *("math_full", "LoRA-One", "LoRA-One"),
            {"epoch_1": 57.54, "epoch_2": 60.84, "epoch_3": 62.62, "epoch_4": 63.80},
        ),
        ("cost", "LoRA", "LoRA-One", {"hours": 6.33, "gigabytes": 21.6}),
    ],
)
def test_published_values(table, method, source, expected):
    assert values(table, method, source) == expected


def test_printed_averages_are_the_averages_of_the_cells_but_for_one():
    column = TABLES["glue_t5"].columns[-1]
    assert column.mean_of == GLUE[:-1]
    off = {}
    for line in TABLES["glue_t5"].lines:
        for cell in line.published["avg"]:
            computed = printed_mean(line, column, cell.source)
            if computed is not None and abs(computed - cell.value) > 0.0051:
                off[line.method, cell.source] = (cell.value, round(computed, 2))
    assert off == {("LoRA", "LoRA-GA"): (82.08, 82.01)}
    assert "82.01" in line_of("glue_t5", "LoRA").note
    assert printed_mean(line_of("glue_t5", "LoRA, grid of learning rates"), column, "AltLoRA") is None
    by_hand = mean([85.28, 93.88, 79.58, 93.00, 83.91])
    assert printed_mean(line_of("glue_t5", "P-LoRA"), column, "LoRA-One") == pytest.approx(by_hand)


def rows_of(head: str) -> list[list[str]]:
    """The rows of the notes' table that begins with ``head``."""
    part = REFERENCE.read_text().split(head, 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in part.splitlines()[2:]]


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


@pytest.mark.skipif(not REFERENCE.exists(), reason="../shared/REFERENCE.md is not here")
def test_every_number_of_the_notes_is_here_and_no_other():
    glue = rows_of("| method | MNLI | SST-2")
    llama = rows_of("| method | GSM8K | GSM8K 8-shot")
    noted = sorted(n for row in glue for cell in row[1:-1] for n in numbers(cell) if n != 82.01)
    found = [c.value for line in TABLES["glue_t5"].lines for cells in line.published.values() for c in cells]
    assert sorted(found) == noted
    noted = sorted(n for row in llama for cell in row[1:-1] for n in numbers(cell))
    names = ("math", "math_lora_ga", "code", "code_lora_ga", "mmlu", "mt_bench", "ranks")
    lines = [line for name in names for line in TABLES[name].lines if line.method != "LoRA-GA, rank 8"]
    found = [c.value for line in lines for cells in line.published.values() for c in cells]
    assert sorted(found) == noted


def test_the_lines_of_an_ablation_quote_only_cells_of_glue_t5():
    known = {c for line in TABLES["glue_t5"].lines for cells in line.published.values() for c in cells}
    for name in ABLATIONS:
        for line in TABLES[name].lines:
            is_row_of_glue = all(text.startswith("glue_t5/") for text in line.experiments.values())
            assert bool(line.published) == is_row_of_glue
            assert {c for cells in line.published.values() for c in cells} <= known


def test_columns_are_measured_computed_or_explained():
    for table in TABLES.values():
        measured = {column.name for column in table.columns if column.metric is not None}
        for column in table.columns:
            assert (column.metric is None) == bool(column.mean_of or column.note), column
            assert set(column.mean_of) <= measured
        for line in table.lines:
            assert set(line.experiments) <= {column.name for column in table.columns if not column.mean_of}
    assert [c.name for c in TABLES["mt_bench"].columns if not c.percent] == ["mt_bench"]


def test_a_line_spans_several_experiments():
    line = line_of("glue_t5", "LoRA")
    assert line.experiments["sst2"] == "glue_t5/lora dataset=sst2"
    assert "avg" not in line.experiments
    assert line_of("glue_t5", "LoRA, grid of learning rates").experiments == {}
    assert line.published["cola"] == (Cell(69.35, None, "LoRA-GA"), Cell(72.84, None, "LoRA-One"))
    assert TABLES["math_full"].experiments()[0] == "math_full/lora"


GOOD = """
title: t
source: s
seeds: [1]
columns: {a: {title: A, metric: test}}
lines: [{method: m, published: {p: {a: [1.5, 0.25]}}}]
"""


def test_a_standard_deviation_is_read(tmp_path):
    (tmp_path / "own.yaml").write_text(GOOD)
    table = read_tables(tmp_path)["own"]
    assert table.lines[0].published == {"a": (Cell(1.5, 0.25, "p"),)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("title: [", "not a table"),
        ("[]", "not a table"),
        (GOOD.replace("title: t", "heading: t"), "not a table .KeyError: 'title'"),
        (GOOD.replace("{p: {a:", "{p: {b:"), "line m: there is no column b"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path, text, words):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_tables(tmp_path)
    assert "own.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_table_names_the_nearest():
    with pytest.raises(UserError, match=r"no such table: 'maths' .did you mean 'math'"):
        find_table("maths")
