# make test | lint | demo | test-slow | test-gpu | test-weights. Each sets itself up: .venv, pinned by constraints.txt.
PYTHON ?= python3
# Idle threads must not spin: beside other jobs that makes small operations many times slower.
export OMP_WAIT_POLICY ?= passive
BIN := .venv/bin

.PHONY: test demo test-slow test-gpu test-weights lint format clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint,plot]'
	touch $@

test: .venv/.installed
	$(BIN)/python -m pytest

demo: .venv/.installed
	$(BIN)/python examples/tiny/demo.py

test-slow: .venv/.installed
	$(BIN)/python -m pytest -m slow

test-gpu: .venv/.installed
	$(BIN)/python -m pytest -m gpu

test-weights: .venv/.installed
	$(BIN)/python -m pytest -m weights

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv out *.egg-info .pytest_cache .ruff_cache
