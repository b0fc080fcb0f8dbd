# make test | lint | demo | live | test-slow | test-gpu | test-weights. Each sets itself up: .venv, pinned by constraints.txt.
# make test-faults: damaged files, kills, signals and full disks, by chance from a seed: ten minutes on two cores.
# make test-live: the live page in headless Chromium, which apt-get installs if it is missing (as root): four minutes.
# make test-interop: what we write, read by diffusers and transformers, and the other way round; .venv-interop, 1.4 GB.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test demo live test-slow test-gpu test-weights test-faults test-live test-interop lint format clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint,plot]'
	touch $@

# Two files of tests at a time, each on one thread of torch and one of numpy's BLAS; idle ones must not spin where a
# test starts more processes.
# The demo has the machine for itself: threads spin, and malloc keeps its memory (a tenth of a training step).
test: .venv/.installed
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

demo: .venv/.installed
	MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 $(BIN)/python examples/tiny/demo.py

# The demo's model if there is one, else the small one that comes along. LIVE="--port 9000" adds options.
live: .venv/.installed
	@if test -f out/demo/dmd/dmd.safetensors; then \
		set -- --release out/demo/release --weights out/demo/dmd/dmd.safetensors --window 5 --anew; \
	else \
		$(BIN)/python examples/tiny/small.py && set -- --release out/live/release --weights out/live/small.safetensors --window 9 --recache; \
	fi && exec $(BIN)/python live.py "$$@" --size 64x64 \
		--example "a red ring moves left" $(LIVE)

test-slow: .venv/.installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m slow

test-gpu: .venv/.installed
	$(BIN)/python -m pytest -m gpu

test-weights: .venv/.installed
	$(BIN)/python -m pytest -m weights

test-faults: .venv/.installed
	$(BIN)/python tools/faults

test-live: .venv/.installed
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
		{ apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium chromium-driver; } || \
		{ echo "test-live needs chromium and chromedriver: install them, or run it as root where apt-get can"; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m live tests/live

.venv-interop/.installed: pyproject.toml constraints.txt tests/interop/requirements.txt
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -r tests/interop/requirements.txt -e '.[test]'
	touch $@

test-interop: .venv-interop/.installed
	HF_HUB_OFFLINE=1 .venv-interop/bin/python -m pytest -m interop tests/interop

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-interop out *.egg-info .pytest_cache .ruff_cache
