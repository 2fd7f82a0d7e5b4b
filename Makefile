# The project's commands. On a fresh machine with Python 3.11 or later and make, `make demo` and
# `make test` set everything up by themselves.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# A CPU build where the index offers one under this version; any torch >= 2.11 will do.
TORCH  ?= torch==2.13.0
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check bench wheel sglang-cpu test-sglang

help: ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(VENV)/.demo ## Set up, then watch nano answer one wide and one look question
	$(BIN)/swarm demo

test: $(VENV)/.dev ## Set up, then run the tests with coverage
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered -m "not sglang and not slow"

test-slow: $(VENV)/.dev ## Run the tests that take minutes: 1,000 sandboxes, counted before and after
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev ## Lint, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(VENV)/.dev ## Run the quick form of every benchmark
	@for name in parity engine atlas_eval orchestration scale budgets crash faults sandbox \
		parl_step swarm_vs_single; do \
		$(BIN)/python benchmarks/$$name.py --json --quick || exit 1; done

wheel: $(VENV)/.dev ## Build the wheel and the source archive into dist/
	$(BIN)/python -m build

sglang-cpu: ## Build .venv-sglang: SGLang on the CPU
	tests/sglang/setup.sh

test-sglang: $(VENV)/.dev ## Test against a real SGLang server on the CPU (builds .venv-sglang)
	tests/sglang/run.sh
