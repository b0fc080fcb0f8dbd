# make test | lint | demo | test-slow | test-gpu | test-weights | test-faults. Each sets itself up: .venv, pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test demo test-slow test-gpu test-weights test-faults lint format clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint,plot]'
	touch $@

# Tests run processes side by side, whose idle threads must not spin; the demo has the machine for itself, so they do,
# and malloc keeps its memory (a tenth of a training step).
test: .venv/.installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

demo: .venv/.installed
	MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 $(BIN)/python examples/tiny/demo.py

test-slow: .venv/.installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m slow

test-gpu: .venv/.installed
	$(BIN)/python -m pytest -m gpu

test-weights: .venv/.installed
	$(BIN)/python -m pytest -m weights

# Damaged files, kills, signals and full disks, by chance from a seed: 20 minutes on two cores.
test-faults: .venv/.installed
	$(BIN)/python tools/faults

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv out *.egg-info .pytest_cache .ruff_cache
