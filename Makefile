# make quickstart and make test each do all of their own set-up in .venv.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: quickstart test test-layouts test-gpu test-slurm lint clean

quickstart: $(READY)
	$(BIN)/python tools/quickstart.py

test: $(READY) lint  # by WORKERS processes, a file at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile --durations=10

test-layouts: $(READY)  # the table of every parallel layout against one process; part of `make test`
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_layouts.py

test-gpu: $(READY)
	$(BIN)/python -m pytest tests -m gpu

test-slurm: $(READY)  # installs Slurm (apt) where it is not there, starts two nodes on loopback, tests, stops them
	OMP_NUM_THREADS=1 tests/slurm/cluster.sh run $(BIN)/python -m pytest tests -m slurm --durations=0

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
