# Each target sets up .venv by itself, and again when the dependencies change.
#   make serve                                 the reference model on http://127.0.0.1:8000
#   make serve PORT=9000 ARGS="expert_slots=25% routing=predicted"
#   make test TESTS="tests/common -k config"
#   make bench BENCH=expert_store ARGS="--help"
PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8000
ARGS   ?=
TESTS  ?= tests
BENCH  ?= engine

BIN      := $(VENV)/bin
INSTALL   = $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
INPUTS   := pyproject.toml constraints.txt

export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: serve test lint format bench clean

serve: $(VENV)/.installed
	$(BIN)/python -m deployments --port $(PORT) $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder --durations 12 $(TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.$(BENCH) $(ARGS)

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	$(INSTALL) --editable ".[test,bench,lint]"
	touch $@ $(VENV)/.installed
