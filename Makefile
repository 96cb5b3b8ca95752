# Two commands need nothing but a checkout and Python: `make demo` and `make test`.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# torch comes first and by itself: the constraint then decides which build is taken, and what is installed afterwards
# finds it there instead of choosing one. A change of the dependencies makes the environment up to date again.
$(VENV)/.torch: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[all,dev]'
	@touch $@ $(VENV)/.demo

setup: $(VENV)/.dev  ## Create .venv with the package, every extra and the development tools (once).

demo: $(VENV)/.demo  ## Speed up a language model and show that its output is unchanged (offline, CPU, minutes).
	$(BIN)/hf-ext demo $(DEMO_ARGS)

test: check  ## Run the checks and all tests, as CI does; PYTEST_ARGS='-k layout' selects.
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

check: $(VENV)/.dev  ## Check formatting, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## Format the code and fix what lint can fix.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## Run every benchmarks/bench_*.py, one after the other; BENCH_ARGS goes to each.
	@set -e; for script in benchmarks/bench_*.py; do \
		test -e "$$script" || { echo "no benchmarks/bench_*.py here" >&2; exit 1; }; \
		echo "== $$script"; $(BIN)/python "$$script" $(BENCH_ARGS); \
	done

clean:  ## Remove the environment and what was built.
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
