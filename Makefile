# `make demo` and `make test` need nothing but python3 (3.10 to 3.13, with venv and pip) and make.
# Another Python: make clean, then make PYTHON=python3.12 demo. More options: make bench ARGS="--num-ranks 8".

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo test bench gpu-bench selftest lint format gpu-test gpu-soak gpu-sanitize has-torch .venv clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train a small MoE model on four ranks, check it and measure it"
	@echo "make test      run the tests"
	@echo "make bench     measure dispatch and combine on this machine"
	@echo "make gpu-bench measure the CUDA engine on all GPUs here, with python3's own torch"
	@echo "make selftest  run the conformance checks on this machine"
	@echo "make lint      formatting, lint, types and the import contract, as CI does"
	@echo "make format    mend what can be mended of it"
	@echo "make gpu-test  check the CUDA engine on this machine's GPUs, with the python3 that has torch"
	@echo "make gpu-test ARGS='--copies plain'  only the 16-byte copies of GPUs before Hopper"
	@echo "make gpu-test ARGS='--nodes 2 --ranks 2,4'  the same between emulated nodes of GPUs"
	@echo "make gpu-soak  two thousand random dispatches and combines on them"
	@echo "make gpu-sanitize  the same engine under compute-sanitizer"
	@echo "make .venv     create the virtual environment; the others do it first"
	@echo "make clean     remove the virtual environment and all caches"

demo: .venv
	$(BIN)/fusco demo $(ARGS)

test: .venv
	$(BIN)/python -m pytest $(ARGS)

bench: .venv
	$(BIN)/fusco bench $(ARGS)

# Needs no environment of ours and no network, for machines that have torch and GPUs only.
OUTPUT ?= gpu-bench
gpu-bench: has-torch
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py $(OUTPUT) $(ARGS)

selftest: .venv
	$(BIN)/fusco selftest $(ARGS)

lint: .venv
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

format: .venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i src/fusco/engines/cuda/kernels/*.cu* src/fusco/engines/cuda/fast_path/*.[ch]

# Machines with GPUs often have torch in a Python of their own, and no network: nothing is installed.
has-torch:
	@$(PYTHON) -c 'import numpy, torch' 2>/dev/null || { echo "$(PYTHON) has no torch or no numpy: give one that has, such as PYTHON=.venv/bin/python"; exit 1; }

gpu-test: has-torch
	PYTHONPATH=src $(PYTHON) -m fusco.testing.gpu $(ARGS)

gpu-soak: has-torch
	PYTHONPATH=src $(PYTHON) benchmarks/gpu_soak.py $(ARGS)

gpu-sanitize: has-torch
	PYTHON=$(PYTHON) .ci/gpu-sanitize $(ARGS)

.venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,plot]'
	@touch $@

# Made once: another Python on top of an existing environment would mix the two.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit(f"fusco needs Python 3.10 or later, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.11 ...")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv or pip: install them (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv --clear .venv

clean:
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
