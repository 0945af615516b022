# Every target sets itself up: python >= 3.10, git and make are all that must be there.
#
#   make demo    reduce the network in the package, write demo-out/
#   make test    the tests
#   make check   format, lint, types
#   make fuzz    random programs: SEEDS=5000 START=0; goes on where fuzz-out/log.jsonl ends
#   make bench   the benchmarks
#   make bench-cifar   width compression beside every peer, on the CIFAR-10 networks of the test material
#   make bench-speed   measured latency before and after compress to half of the MACs
#   make bench-cost    what compress takes: seconds of its stages, memory, by images and by width
#   make bench-memory  the peak of memory that reduce takes on a GPT-2-medium shape, and seconds
#   make clean   remove what the other targets have made, the environment included
#
# pip heeds its own variables: on a machine without a GPU,
# `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test` installs a smaller torch.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test check fuzz bench bench-cifar bench-speed bench-cost bench-memory clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
READY_BENCH := $(VENV)/ready-bench

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 5 --timeout 60
ifdef CI
export PIP_PROGRESS_BAR := off
export PIP_NO_INPUT := 1
endif

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile

demo: $(READY)
	$(BIN)/ep-prune demo --out demo-out

# One thread a worker: two workers fill two cores, and sums do not depend on the machine.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(READY)
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

SEEDS ?= 5000
START ?= 0

fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --seeds $(SEEDS) --start $(START) --log fuzz-out/log.jsonl

bench: $(READY_BENCH)
	$(BIN)/python -m benchmarks.masked

bench-cifar: $(READY_BENCH)
	$(BIN)/python -m benchmarks.cifar $(ARGS)

bench-speed: $(READY_BENCH)
	$(BIN)/python -m benchmarks.speed --by-time 1.65 $(ARGS)

bench-cost: $(READY_BENCH)
	$(BIN)/python -m benchmarks.compress_cost $(ARGS)

bench-memory: $(READY)
	$(BIN)/python -m benchmarks.memory $(ARGS)

clean:
	rm -rf $(VENV) demo-out bench-out fuzz-out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip stands in an environment only once `venv` has run to its end, so one cut short is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "make: $(PYTHON) is older than Python 3.10 or missing; name another with make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "make: $(PYTHON) cannot make an environment; on Debian and Ubuntu, install python3-venv" >&2; exit 1; }

# torch and torchvision are resolved together, so that they match one another.
$(READY): pyproject.toml setup.cfg Makefile | $(BIN)/pip
	@echo "setting up $(VENV) (the first time this takes some minutes)"
	@$(PIP) --upgrade pip
	@$(PIP) "torch>=2.9" torchvision
	@$(PIP) --editable ".[dev,demo]"
	@touch $@

$(READY_BENCH): $(READY)
	@echo "adding what the benchmarks compare with"
	@$(PIP) --editable ".[dev,demo,bench]"
	@touch $@
