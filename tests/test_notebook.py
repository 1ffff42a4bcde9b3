"""The notebook runs, in short; and both that run and the committed one bear its text out."""

import itertools
import json

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "Toy_Experiments.ipynb"
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOY_QUICK", "1")
        client = nbclient.NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources=place, coalesce_streams=True
        )
        return client.execute()


def findings_of(notebook) -> dict:
    """What its last cell printed."""
    (output,) = notebook.cells[-1].outputs
    return json.loads(output.text)


@pytest.mark.parametrize("which", ["committed", pytest.param("executed", marks=pytest.mark.slow)])
def test_what_the_text_says_is_in_the_numbers(which, request):
    found = findings_of(request.getfixturevalue(which))
    check_start_and_alignment(found)
    check_convergence(found)
    check_choice_of_subspace(found)
    check_relu(found)


def check_start_and_alignment(found):
    assert found["start_error_infinite"] < 1e-12
    assert found["start_error_10000"] < found["start_error_1000"] / 2 < found["start_error_100"] / 4
    assert found["plain_sine_B_exact"] < 1e-10
    assert found["one_sine_at_start"] < 1e-10
    for shrink in ("1", "0.3", "0.03"):
        assert found[f"plain_sine_B_{shrink}"] < found[f"plain_first_sine_B_{shrink}"] / 3
        assert found[f"plain_sine_A_{shrink}"] < 0.3
    assert found["plain_sine_A_0.3"] < found["plain_sine_A_1"]


def check_convergence(found):
    plain, shy, one = (
        found[f"steps_to_1e-4_{name}"] for name in ("plain LoRA", "LoRA-One, γ = 128", "LoRA-One")
    )
    assert one < shy < plain
    assert found["one_linear_R2"] > 0.995
    assert found["one_rate_theory"] < found["one_rate"] < found["one_rate_theory"] + 0.1
    steps = found["steps_by_condition_gradient descent"]
    assert all(6 < after / before < 14 for before, after in itertools.pairwise(steps))
    for form in ("classic", "symmetric"):
        steps = found[f"steps_by_condition_scaled GD {form}"]
        assert steps[-1] <= steps[0] + 4 * len(steps)
    assert found["left_by_condition_AdamW"][-1] > 5 * found["left_by_condition_scaled AdamW"][-1]


def check_choice_of_subspace(found):
    shifted = ("LoRA-GA, c = 1", "LoRA-GA, c = 0.3", "A2rBr, c = 1")
    for name in shifted:
        assert found[f"cosine_exact_{name}"] > 0.999
        assert found["cosine_tail_LoRA-One"] < found[f"cosine_tail_{name}"] < 1
    assert found["cosine_exact_plain LoRA"] < 0.5
    assert found["sine_B_at_start_LoRA-GA, c = 1"] > 0.999
    assert found["sine_B_at_start_A2rBr, c = 1"] < 1e-10 > found["sine_B_at_start_LoRA-One"]
    floors = [found[f"end_exact_{name}"] for name in shifted[:2]]
    assert floors[0] > 3 * floors[1] > 0.01
    for name in ("LoRA-One", "plain LoRA", "A2rBr, c = 1"):
        assert found[f"end_exact_{name}"] < 1e-4
    for name in ("LoRA-GA, c = 1", "A2rBr, c = 1"):
        assert found[f"end_tail_{name}"] < 0.95 * found["end_tail_LoRA-One"]
    assert found["end_κ = 20_A2rBr, c = 1"] < found["end_κ = 20_LoRA-One"] / 100


def check_relu(found):
    assert found["relu_steps_to_1e-3_LoRA-One"] < found["relu_steps_to_1e-3_plain LoRA"] / 1.5
    assert found["relu_steps_to_1e-3_LoRA-GA, c = 0.3"] is None
    assert found["relu_start_error_LoRA-One"] < 0.5
    first, last = found["relu_sine_B_plain LoRA"][1:]
    assert last < first / 2
    assert 0.01 < found["relu_sine_B_LoRA-One"][-1] < 0.3  # near the gradient's subspace, not in it
    for form in ("classic", "symmetric"):
        assert found[f"relu_ill_end_scaled GD {form}"] < found["relu_ill_end_gradient descent"] / 100


def test_the_committed_outputs_are_whole_and_clean(committed):
    assert NOTEBOOK.stat().st_size < 1_000_000
    cells = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    assert set(committed.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in committed.cells)


def test_the_short_run_ends_with_the_same_kinds_of_output(committed, executed):
    for before, after in zip(committed.cells, executed.cells, strict=True):
        assert before.source == after.source
        kinds = [[output.output_type for output in cell.get("outputs", [])] for cell in (before, after)]
        assert kinds[0] == kinds[1]
    assert findings_of(committed).keys() == findings_of(executed).keys()
