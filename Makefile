PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: run test test-slurm lint sweep clean

run: $(VENV)/.run ## the embedded experiment: install, train, evaluate
	$(BIN)/python run_exp.py

test: $(VENV)/.dev ## all tests
	$(BIN)/python -m pytest

test-slurm: $(VENV)/.dev ## the tests on a Slurm node of their own, installed where that can be done
	$(BIN)/python tests/slurm_node.py install
	$(BIN)/python -m pytest -s -n 0 -m slurm --durations=10 $(PYTEST_FLAGS) tests/test_slurm.py

lint: $(VENV)/.dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .mypy_cache
