# The tree's few verbs. Each depends on `setup`, which makes .venv once and does nothing the next time.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: help setup system demo test soak check bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-7s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.done system  ## make .venv with everything in it, and name what pip can't bring

# torch goes first: DeepSpeed's build looks for the installed one. procgen and gym3 pin numpy<2 but run on 2.x, hence
# --no-deps; what they import beyond that is in the `games` extra.
PIP = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Lampworks needs Python 3.11: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[dev,games]'
	$(PIP) --no-deps procgen-mirror gym3 gym
	touch $@

system: $(VENV)/.done  ## programs that pip can't bring: apt where it runs as root, named where it doesn't
	@$(BIN)/python -m infra.doctor --install

demo: setup  ## the whole path on recorded gameplay, about 17 minutes, ends with a playable page
	$(BIN)/lampworks demo

test: setup  ## every test but the slow ones
	$(BIN)/pytest -m "not slow and not gpu"

soak: setup  ## long kill and soak tests, with seeds
	$(BIN)/pytest -m slow --timeout=3600

check: setup  ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

bench: setup  ## ratios, measured side by side; not a test
	for file in tests/benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

clean:  ## forget .venv; what was recorded and trained stays
	rm -rf $(VENV)
