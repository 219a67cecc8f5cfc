# make demo   builds the environment and runs the main job on the embedded stream
# make test   builds the environment and runs the tests
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# With a GPU: make EXTRA=cuda. The CPU build of torch, where the default index serves the CUDA one:
# make TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"
EXTRA ?= cpu
TORCH_INDEX ?=

.PHONY: setup demo test lint clean

setup: $(VENV)/ready-$(EXTRA)

$(VENV)/ready-$(EXTRA): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip wheel "setuptools>=77,<81" ninja
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH_INDEX) torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[$(EXTRA),dev]"
	$(if $(filter cpu,$(EXTRA)),$(BIN)/pip install --quiet --disable-pip-version-check --no-deps torchrec==1.8.0)
	touch $@

demo: setup
	$(BIN)/python run.py pipeline --config configs/demo.yaml

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs
