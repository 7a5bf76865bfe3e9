# `make demo` and `make test` do all the set-up they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two busy processes slow each other fivefold while idle threads spin.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test test-slow test-gpu test-faults lint bench clean

demo: $(READY)
	$(BIN)/videorepa demo --out demo

test: $(READY) browser lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# With the checks for GPUs, gone through on the CPU.
test-slow: $(READY) browser
	GPU_REHEARSAL=1 GPU_FIGURES=build/rehearsal.json $(BIN)/pytest -m 'slow or gpu'

# Ten minutes on one GPU; without one it says so. The figures go to build/gpu.json.
test-gpu: $(READY)
	$(BIN)/pytest -m gpu -rs

# Kills, bad inputs and pairs of processes; tests/faults/__main__.py says how it is driven.
test-faults: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m faults

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --project pyproject.toml
	$(BIN)/lint-imports

bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python timings/simulator.py
	OMP_NUM_THREADS=1 $(BIN)/python timings/relation.py

# torch first and alone: then nothing else asks for another build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(shell grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

# The report's test drives Chromium; without one it is skipped, and says so.
.PHONY: browser
browser:
	@command -v chromium >/dev/null 2>&1 || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null 2>&1 && \
	    apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
	  echo "chromium is not installed: the report's browser test will be skipped"

clean:
	rm -rf $(VENV) demo runs build
