# Everything is installed into .venv at the versions of constraints.txt; only git, make and Python 3.11 are needed.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test soak lint bench-control clean

quickstart: $(VENV)/.installed
	$(BIN)/entrocraft quickstart

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest

# The long forms: 5,000 optimizer steps on two ranks, 30 kills, twenty times as many random inputs.
soak: $(VENV)/.installed
	ENTROCRAFT_SOAK=1 $(BIN)/python -m pytest --override-ini timeout=3600

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench-control: $(VENV)/.installed
	$(BIN)/python -m benchmarks.control

# torch first and pinned: left to the resolver, the newest build with gigabytes of CUDA libraries comes along.
$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
