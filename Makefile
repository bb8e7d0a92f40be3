# make demo        train the embedded model on a reward, a few minutes on two cores
# make test        all tests;  make test-fast leaves the slow ones out
# make test-quantize   tests of quantised weights, in an environment of their own with torchao and bitsandbytes
# make lint        ruff and mypy;  make format mends what ruff can
#
# On Linux, pip takes the CUDA build of PyTorch, some gigabytes. `make demo TORCH=cpu` takes the CPU build. Any other
# name of PyTorch's builds will do too, such as TORCH=cu126.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH ?=
WORKERS ?= 2

BIN := $(VENV)/bin
QUANTIZED := tests/families/test_quantized.py tests/planning/test_quantized.py tests/training/test_optimizers.py
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
TORCH_INDEX := $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH))

.PHONY: demo test test-fast test-quantize lint format docs clean

demo: $(VENV)/.installed
	$(BIN)/draftplus train demo

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-fast: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-quantize:
	$(MAKE) VENV=$(VENV)-quantize $(VENV)-quantize/.installed-quantize
	OMP_NUM_THREADS=1 $(VENV)-quantize/bin/python -m pytest $(QUANTIZED)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.installed
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_architecture.py

clean:
	rm -rf $(VENV) $(VENV)-quantize build dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "draftplus needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python constraints.txt
	@echo "Installing PyTorch$(if $(TORCH), ($(TORCH)))"
	@$(PIP) --no-deps $(TORCH_INDEX) torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "Installing draftplus and what it needs (a minute or two)"
	@$(PIP) --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the tools for tests and checks"
	@$(PIP) --quiet --editable '.[dev]'
	@touch $@

$(VENV)/.installed-quantize: $(VENV)/.installed-dev
	@$(PIP) --quiet --editable '.[quantize]'
	@touch $@
