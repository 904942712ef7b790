# Every target is a few lines that a person could type. On a fresh machine `make demo` and `make test` need Python 3.11,
# git and make; the first call installs the locked packages into .venv (1.5 GB on disk).
# ARGS goes through: make test ARGS="-k world --seed 42", make demo ARGS="--seconds 20".

SHELL  := /bin/bash
PYTHON ?= $(firstword $(foreach name,python3.11 python3,$(shell $(name) -c 'import sys; sys.version_info < (3, 11) or print(sys.executable)' 2>/dev/null)))
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=
export PATH := $(PATH):/usr/sbin:/sbin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-slow chaos world fuzz lint format bench soak lock clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(STAMP)  ## the whole road on this machine, on real recordings, then a reconciliation
	$(BIN)/headwater demo $(ARGS)

test: $(STAMP) lint  ## everything that must hold before a change lands
	.ci/need mosquitto
	$(BIN)/pytest -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: $(STAMP)  ## the tests without servers and processes
	$(BIN)/pytest -m "not slow" tests/unit tests/contract $(ARGS)

test-slow: $(STAMP)  ## the tests that need minutes
	.ci/need mosquitto
	$(BIN)/pytest -m slow $(ARGS)

chaos: $(STAMP)  ## half an hour of kills, freezes, store trouble and bad releases, with real processes; ARGS="--seed N" for another schedule
	.ci/need mosquitto
	$(BIN)/pytest -m slow tests/integration/test_kill.py tests/integration/test_store_trouble.py tests/integration/test_rollout_trouble.py $(ARGS)

world: $(STAMP)  ## two million steps of the protocol's model; ARGS="--first N --seeds M" for others
	$(BIN)/python -m tests.simulation.world $(ARGS)

fuzz: $(STAMP)  ## the property tests with fifty times the examples
	$(BIN)/pytest tests/property tests/contract -m "not slow" --hypothesis-profile=long --timeout=3600 $(ARGS)

lint: $(STAMP)  ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## a table of measurements, and benchmarks/results/latest.json
	.ci/need mosquitto
	$(BIN)/python -m benchmarks $(ARGS)

soak: $(STAMP)  ## an hour of the demo, watched for memory that grows; ARGS="--minutes 300"
	$(BIN)/python -m benchmarks.soak $(ARGS)

# Keeps the versions that are locked already; UPGRADE=--upgrade takes the newest that pyproject.toml allows.
LOCK = $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
	--only-binary :all: --emit-build-options --custom-compile-command "make lock" $(UPGRADE)
lock: $(STAMP)  ## write requirements/*.txt anew from pyproject.toml
	$(LOCK) --extra all --output-file requirements/all.txt
	$(LOCK) --extra edge --constraint requirements/all.txt --output-file requirements/edge.txt
	$(LOCK) --extra gateway --constraint requirements/all.txt --output-file requirements/gateway.txt

clean:  ## remove what the checks left behind (.venv stays)
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(STAMP): pyproject.toml requirements/all.txt
	PYTHON='$(PYTHON)' .ci/need venv
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements/all.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
