# `make help` lists what there is.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# With a GPU: make EXTRA=cuda. The CPU build of torch, where the default index serves the CUDA one:
# make TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"
EXTRA ?= cpu
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help setup check-python demo test test-fast lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "error: '$(PYTHON)' is not one of Python 3.11 to 3.13, which exfm-ray needs (DeepSpeed," \
	  "TorchRec and fbgemm are tried with these). Name one: make PYTHON=/path/to/python3.13" >&2; \
	  exit 2; }

setup: $(VENV)/ready-$(EXTRA) ## build the environment in .venv

$(VENV)/ready-$(EXTRA): pyproject.toml | check-python
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip wheel "setuptools>=77,<81" ninja
	$(PIP) $(TORCH_INDEX) torch==2.13.0
	$(PIP) --editable ".[$(EXTRA),dev]"
	$(if $(filter cpu,$(EXTRA)),$(PIP) --no-deps torchrec==1.8.0)
	touch $@

demo: setup ## run the main job on the synthetic stream (about 2 minutes)
	$(BIN)/python run.py pipeline --config configs/demo.yaml

test: setup lint ## lint, check types, run the tests (about 15 minutes)
	$(BIN)/python -m pytest

test-fast: setup ## run the tests that need no other process and no seconds (under a minute)
	$(BIN)/python -m pytest -m "not slow and not heavy"

lint: setup ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## format the code and sort the imports
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and all runs
	rm -rf $(VENV) runs
