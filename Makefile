# Every target sets up its own environment: python 3.11 or newer and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Programs whose drafters are exchanged with ours; their requirements contradict ours.
INTERCHANGE := $(VENV)-interchange
# Programs that people use with a server.
CLIENTS := $(VENV)-clients

.PHONY: generate test slow lint docs bench gates parity parity-transformers h100 h100-tests h100-rounds h100-kernels h100-steps gpu clean

generate: $(VENV)/base        ## real text from a real model, plain and speculative
	$(BIN)/python examples/generate.py

test: $(VENV)/test            ## the unit tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

slow: $(VENV)/test            ## the unit tests that compile much
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

lint: $(VENV)/test            ## style and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

docs: $(VENV)/test            ## the documentation as a site, in build/site
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --config-file .ci/mkdocs.yml

bench: $(VENV)/test           ## speed and acceptance, one run against plain decoding
	$(BIN)/python examples/benchmark.py

gates: $(VENV)/test $(CLIENTS)/ready   ## lossless on real prompts, training over several processes; long
	$(BIN)/python -m pip install --quiet --editable '.[notebook,browser]'
	XLA_FLAGS=--xla_backend_optimization_level=3 $(BIN)/python -m pytest -m gate

parity: parity-transformers $(INTERCHANGE)/ready   ## against transformers, z-lab's dflash, speculators
	$(BIN)/python -m pytest -m "parity and gate"

parity-transformers: $(VENV)/test
	$(BIN)/python -m pip install --quiet --editable '.[parity]'
	$(BIN)/python -m pytest -m "parity and not gate"

# An environment of its own, so that the ordinary one stays free of CUDA wheels.
H100 := $(VENV)-h100
H100_TESTS := tests

h100: h100-tests h100-rounds h100-kernels h100-steps   ## compiled for an H100 without one: tests, gates

h100-tests: $(H100)/ready
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=3 \
		$(H100)/bin/python -m pytest -m "h100 and not gate" -n 2 --dist worksteal $(H100_TESTS)

# Whole rounds, and the plans of more presets and numbers of devices: longer.
h100-rounds: $(H100)/ready
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=3 \
		$(H100)/bin/python -m pytest -m "h100 and gate" tests/planning

h100-kernels: $(H100)/ready
	$(H100)/bin/python -m pallas_kernels.h100 --quick

h100-steps: $(H100)/ready
	$(H100)/bin/python -m jaxspec.planning --quick

# Checks and timings on this machine's GPU; examples/gpu/README.md says what each row is.
# `make gpu GPU_PYTHON=python3` runs a Python that has JAX for CUDA, and installs nothing.
GPU_PYTHON = $(BIN)/python
GOLDEN := $(wildcard ../shared/golden)

gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/gpu)   ## checks and timings on the GPU of this machine
	PYTHON=$(GPU_PYTHON) GOLDEN=$(GOLDEN) examples/gpu/campaign.sh

$(INTERCHANGE)/ready: tests/interchange/requirements.txt tests/interchange/programs.txt
	$(PYTHON) -m venv $(INTERCHANGE)
	$(INTERCHANGE)/bin/python -m pip install --quiet -r tests/interchange/requirements.txt
	$(INTERCHANGE)/bin/python -m pip install --quiet --no-deps -r tests/interchange/programs.txt
	touch $@

$(CLIENTS)/ready: tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet -r tests/clients/requirements.txt
	touch $@

$(H100)/ready: pyproject.toml pallas_kernels/requirements-h100.txt
	$(PYTHON) -m venv $(H100)
	$(H100)/bin/python -m pip install --quiet --editable '.[test]' absl-py
	$(H100)/bin/python -m pip install --quiet --no-deps -r pallas_kernels/requirements-h100.txt
	touch $@

$(VENV)/python:
	$(PYTHON) -m venv $(VENV) && touch $@

$(VENV)/base: $(VENV)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable . && touch $@

$(VENV)/test: $(VENV)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]' && touch $@ $(VENV)/base

$(VENV)/gpu: $(VENV)/test
	$(BIN)/python -m pip install --quiet --editable '.[test,cuda]' && touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
