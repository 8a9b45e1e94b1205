# make demo   runtime only (no torch), then the example pictures in the example styles
# make test   everything the tests need, then pytest
# make test-all   and the long matrices
# make check  formatter, linter, types
# make full-size   SDXL at its true sizes (random weights): 35 GB of disk, 18 GB of memory, half an hour
# make gpu    a quarter of an hour on an NVIDIA GPU, results in runs/gpu; without one, on a simulated GPU
# Each target installs once and again only when pyproject.toml or constraints.txt change.
PYTHON ?= python3
RUNTIME := .venv
TESTS := .venv-test
ifeq ($(OS),Windows_NT)
BIN := Scripts
else
BIN := bin
endif

FULL_SIZE ?= runs/full-size

.PHONY: demo test test-long test-all check format full-size gpu clean

demo: $(RUNTIME)/.installed
	$(RUNTIME)/$(BIN)/std-rt demo -o demo

# One process a core, four at most: each takes 1.5 GB.
PYTEST := $(TESTS)/$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

test: $(TESTS)/.installed
	$(PYTEST) -m "not long"

test-long: $(TESTS)/.installed
	$(PYTEST) -m long

test-all: $(TESTS)/.installed
	$(PYTEST)

full-size: $(TESTS)/.installed
	mkdir -p $(FULL_SIZE)
	STD_RT_FULL_SIZE=$(FULL_SIZE) $(TESTS)/$(BIN)/python -m pytest tests/torch/export/test_full_size.py -s

gpu: $(TESTS)/.installed
	$(TESTS)/$(BIN)/python -m tools.gpu_session

check: $(TESTS)/.installed
	$(TESTS)/$(BIN)/ruff format --check .
	$(TESTS)/$(BIN)/ruff check .
	$(TESTS)/$(BIN)/mypy

format: $(TESTS)/.installed
	$(TESTS)/$(BIN)/ruff format .
	$(TESTS)/$(BIN)/ruff check --fix .

$(RUNTIME)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'std-rt needs Python 3.11 or newer: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(RUNTIME)
	$(RUNTIME)/$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(TESTS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'std-rt needs Python 3.11 or newer: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(TESTS)
	$(TESTS)/$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bulk,dev,export,int8,live,onnx,photos,rtx,serve,text,train,webrtc]"
	touch $@

clean:
	rm -rf $(RUNTIME) $(TESTS) demo build dist .mypy_cache .pytest_cache .ruff_cache
