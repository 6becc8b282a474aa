# Everything happens in .venv, which is made when it is missing or when what it is made from has changed.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.ONESHELL:
.PHONY: help venv demo test exhaustive lint clean

PYTHON ?= python3
# More threads than idle cores make small tensor operations several times slower.
OMP_NUM_THREADS ?= 2
export OMP_NUM_THREADS
PYTEST_ARGS ?=
# One process for each core, but no more than memory has room for.
SPREAD := -n auto --maxprocesses 4 --dist worksteal

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
SOURCES := sd_plugin kernels patches
TYPECHECK := build/typecheck

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## Make the virtual environment .venv (PYTHON=python3.12 chooses another Python)

# OpenNMT-py pins an old torch, so it is installed without its dependencies, which an extra lists instead. seqeval comes
# as source that an old pip builds without what it needs, unless told to do it the new way.
$(STAMP): pyproject.toml setup.py sd_plugin.pth sd_plugin.start constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install --no-deps OpenNMT-py==3.5.1
	$(BIN)/python -m pip install --use-pep517 -c constraints.txt -e '.[opennmt-unpinned,demo,plot,test]'
	touch $@

demo: $(STAMP)  ## Train a small translator with structured dropout on the CPU, in minutes
	$(BIN)/python scripts/demo.py

# The kernels with several threads, which wait for each other without turning in circles; then the rest with one, since
# most of it is programs that the tests start. Each half runs whatever became of the other. Exit status 5: PYTEST_ARGS selects
# nothing there, which is an error if it is so in both.
test: $(STAMP)  ## Run the tests (PYTEST_ARGS='-k name' selects some)
	trap 'exit 130' INT; kernels=0; rest=0
	OMP_WAIT_POLICY=passive $(BIN)/pytest $(SPREAD) -m 'not exhaustive' $(PYTEST_ARGS) tests/kernels || kernels=$$?
	OMP_NUM_THREADS=1 $(BIN)/pytest $(SPREAD) -m 'not exhaustive' --ignore tests/kernels $(PYTEST_ARGS) || rest=$$?
	for status in $$kernels $$rest; do test $$status -eq 0 -o $$status -eq 5 || exit $$status; done
	test $$kernels -eq 0 -o $$rest -eq 0

# Kernels that were changed on purpose, compiled in every way, or watched by sanitizers; and of other tests the cases that
# show on more examples what the first ones show.
exhaustive: $(STAMP)  ## Run what "make test" leaves out: mutants, every build of the kernels, further cases
	OMP_NUM_THREADS=1 $(BIN)/pytest $(SPREAD) -m exhaustive $(PYTEST_ARGS)

# mypy knows neither the package mapping nor the import hook of an editable install, so it sees the sources
# through a folder of links laid out as they are installed. Its messages are given the source paths back.
lint: $(STAMP)  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPECHECK)
	mkdir -p $(TYPECHECK)/sd_plugin
	ln -s $(CURDIR)/sd_plugin/* $(CURDIR)/kernels $(CURDIR)/patches $(TYPECHECK)/sd_plugin/
	$(BIN)/mypy | sed -E 's,^$(TYPECHECK)/(sd_plugin/(kernels|patches)/)?(sd_plugin/)?,\2/\3,; s,^/,,'

clean:  ## Remove .venv and everything built or cached
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	find $(SOURCES) tests scripts benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +
