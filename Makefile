# Each target sets up what it needs: `make serve` answers from three models, `make test` checks everything.
# Overridable: PYTHON (any 3.11 or newer), VENV, PIP_ARGS (for example an index of CPU-only wheels), CONFIG, ARGS.

VENV ?= .venv
CONFIG ?= configs/demo.yaml
PIP_ARGS ?=
ARGS ?=
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help serve test lint types imports unit cluster autoscaler redis clean

help:
	@echo 'make serve   set up $(VENV) and serve $(CONFIG)'
	@echo 'make test    set up $(VENV), then lint, types, import rules, tests'
	@echo 'make lint | types | imports | unit | cluster | autoscaler   one step of make test'

serve: $(VENV)/.runtime
	@exec $(BIN)/specfleet serve $(CONFIG) $(ARGS)

test: lint types imports unit cluster autoscaler

lint: $(VENV)/.development
	$(BIN)/ruff check .

types: $(VENV)/.development
	$(BIN)/mypy

imports: $(VENV)/.development
	$(BIN)/lint-imports

# A worker for every core; the tests of a module share its fixtures.
unit: $(VENV)/.development redis
	$(BIN)/python -m pytest -m 'not cluster and not autoscaler' -n auto --dist loadscope $(ARGS)

# Tests that start a Ray cluster share the machine's ports and cores, so they run one after the other, by themselves.
cluster: $(VENV)/.development redis
	$(BIN)/python -m pytest -m cluster $(ARGS)

# Ray's fake multi-node cluster ends every Ray of the machine, so this runs in namespaces of its own; where none may be made it is skipped,
# and says so in the last lines.
autoscaler: $(VENV)/.development
	$(BIN)/python -m pytest -m autoscaler $(ARGS)

redis:
	@command -v redis-server >/dev/null 2>&1 || sh -c ' \
	  if command -v apt-get >/dev/null 2>&1 && [ "$$(id -u)" = 0 ]; then \
	    echo "installing redis-server for the tests"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends redis-server </dev/null; \
	  else \
	    echo "The tests need redis-server: install it (Debian: apt-get install redis-server; macOS: brew install redis)." >&2; exit 1; \
	  fi'

$(BIN)/python:
	@PYTHON='$(PYTHON)'; \
	for candidate in $$PYTHON python3.11 python3.12 python3.13 python3 python; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "creating $(VENV) with $$candidate"; exec "$$candidate" -m venv $(VENV); \
	  fi; \
	done; \
	echo 'Specfleet needs Python 3.11 or newer; none was found. Name one with: make PYTHON=/path/to/python3.11 ...' >&2; exit 1

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing Specfleet into $(VENV)'
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.development: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing Specfleet and its tools into $(VENV)'
	@$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.runtime

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
