# Two commands need nothing but a checkout and Python: `make demo` and `make test`.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
MODEL ?= $(HF_EXT_SHARED_DATA)/stories260k
SPEECH ?= $(HF_EXT_SHARED_DATA)/speech
TEXT ?= $(HF_EXT_SHARED_DATA)/text
ADAPTER ?= out/stories260k-mtp
STEPS ?= 1000
DEMO_ARGS ?=

VENV := .venv
VENV_TORCHAUDIO := .venv-torchaudio
BIN := $(VENV)/bin
BENCH := $(BIN)/python benchmarks/mtp
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-torchaudio check format bench clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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

demo: $(VENV)/.demo  ## Text in fewer steps, compute by difficulty, typed phrases in speech (offline, CPU, minutes).
	$(BIN)/hf-ext demo $(DEMO_ARGS)

test: check  ## Run the checks and all tests, as CI does; PYTEST_ARGS='-k layout' selects.
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

# The only torch beside which torchaudio loads: an environment of its own, several gigabytes, and not a part of `make test`.
$(VENV_TORCHAUDIO)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV_TORCHAUDIO)
	$(VENV_TORCHAUDIO)/bin/python -m pip install --disable-pip-version-check torch==2.11.0 torchaudio==2.11.0
	$(VENV_TORCHAUDIO)/bin/python -m pip install --disable-pip-version-check --editable '.[audio]' pytest
	@touch $@

test-torchaudio: $(VENV_TORCHAUDIO)/.dev  ## Compare the audio front end with torchaudio's.
	$(VENV_TORCHAUDIO)/bin/python -m pytest -s tests_torchaudio $(PYTEST_ARGS)

check: $(VENV)/.dev  ## Check formatting, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## Format the code and fix what lint can fix.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## Measure what benchmarks/README.md lists; MODEL, ADAPTER, SPEECH and TEXT name what on.
	$(BENCH)/prompts.py --model $(MODEL) --training_text $(ADAPTER)
	$(BENCH)/acceptance.py --model $(MODEL) --adapter $(ADAPTER) --training_text $(ADAPTER)
	$(BENCH)/wall_clock.py --model $(MODEL) --adapter $(ADAPTER) --draft_model tiny-lm $(BENCH_ARGS)
	$(BENCH)/training_step.py
	$(BENCH)/ablations.py --model $(MODEL) --training_text $(ADAPTER) --steps $(STEPS)
	$(BIN)/python -m benchmarks.dynamoe.speed
	$(BIN)/python -m benchmarks.dynamoe.tradeoff --model $(MODEL)
	$(BIN)/python -m benchmarks.dynamoe.routers --model $(MODEL)
	$(BIN)/python -m benchmarks.kws.cost
	$(BIN)/python -m benchmarks.kws.detection --max_clips 400 \
	  --folders $(addprefix $(SPEECH)/,speech_commands wake_words spoken_digits coffee_orders sentences) \
	  --text_files $(TEXT)/wikitext2/valid.txt $(TEXT)/librispeech_dev_clean/transcripts.txt

clean:  ## Remove the environment and what was built.
	rm -rf $(VENV) $(VENV_TORCHAUDIO) build dist .pytest_cache .mypy_cache .ruff_cache
