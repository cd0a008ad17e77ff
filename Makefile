# `make` shows what there is. Everything a target needs it installs into $(VENV) by itself.

PYTHON ?= python3
VENV ?= .venv
# What is installed where $(PYTHON) brings no torch >= 2.11 of its own.
TORCH ?= torch==2.13.0
# The CUDA build with which kernels are compiled where there is no GPU, and for which architectures.
CUDA_TORCH ?= torch==2.11.0
CUDA_VENV ?= .venv-cuda
ARCHS ?= 8.0 9.0a 10.0a
# The newest PyTorch, for `make nightly`: what pip finds, or another one by name or place.
NEWEST_TORCH ?= torch
NEWEST_VENV ?= .venv-newest
# Arguments for pytest, such as `make test ARGS="-k silu"`; they come last, so `ARGS="-n 0 --pdb"` runs in one process.
ARGS ?=
# How many times the usual number of cases the fuzzers try at night.
NIGHTLY_FUZZ ?= 50
# As many processes as cores and memory allow (test/conftest.py). Neighbouring tests share kernels and fixtures, so each process
# gets a run of them; one that is done takes from the others.
PYTEST = -m pytest -n auto --dist worksteal

BIN := $(VENV)/bin
CUDA_BIN := $(CUDA_VENV)/bin

.PHONY: help demo test nightly bench kernels docs lint format wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      set up, then run a small Llama on jitk ops through torch.compile, checked against plain PyTorch"
	@echo "make test      set up, then run all tests (ARGS=\"-k silu\" for some)"
	@echo "make nightly   all tests with long runs of the fuzzers, on this PyTorch and on the newest, and a table of features on both"
	@echo "make bench     kernels, host overhead and compile time beside copy, Inductor and installed peers (BENCH=\"kernels --quick\")"
	@echo "make kernels   compile CUDA kernels of every op with nvcc for $(ARCHS), without a GPU"
	@echo "make docs      write the tables of the built-in ops into README.md and docs/ops.md"
	@echo "make lint      formatters and linters, as CI runs them; make format applies them"
	@echo "make house     draw the picture of the package's rooms in CONTRIBUTING.md from the imports"
	@echo "make wheel     build dist/*.whl"
	@echo "make clean     remove what the targets made"

$(VENV)/ready: setup.cfg pyproject.toml
	@$(PYTHON) tools/setup_env.py $(VENV) --torch "$(TORCH)"
	@$(BIN)/python -m pip install --quiet --editable '.[test,types]'
	@! nvidia-smi -L >/dev/null 2>&1 || $(PYTHON) tools/setup_env.py $(VENV) --nvcc
	@touch $@

$(CUDA_VENV)/ready: setup.cfg pyproject.toml
	@$(PYTHON) tools/setup_env.py $(CUDA_VENV) --torch "$(CUDA_TORCH)" --cuda
	@$(CUDA_BIN)/python -m pip install --quiet --editable .
	@$(PYTHON) tools/setup_env.py $(CUDA_VENV) --nvcc
	@touch $@

# Linters run without torch, and from here, even if $(PYTHON) has them too.
$(VENV)/lint: setup.cfg
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import configparser; c = configparser.ConfigParser(); c.read("setup.cfg"); print(c["options.extras_require"]["lint"])' \
	  >$@.txt && $(BIN)/python -m pip install --quiet --ignore-installed --requirement $@.txt
	@touch $@

demo: $(VENV)/ready
	@$(BIN)/python -m torch_jit_ops demo

test: $(VENV)/ready
	@$(BIN)/python $(PYTEST) $(ARGS)

# Hours. Both runs of the tests are made, whatever becomes of the first.
nightly: $(VENV)/ready
	@$(PYTHON) -m venv $(NEWEST_VENV)
	@$(NEWEST_VENV)/bin/python -m pip install --quiet --upgrade "$(NEWEST_TORCH)" && \
	  $(NEWEST_VENV)/bin/python -m pip install --quiet --editable '.[test,types]'
	@mkdir -p bench/results; rm -f bench/results/features-*.json; failed=0; \
	for python in $(BIN)/python $(NEWEST_VENV)/bin/python; do \
	  version=$$($$python -c 'import torch; print(torch.__version__)'); \
	  echo "PyTorch $$version, $(NIGHTLY_FUZZ) times the cases of the fuzzers"; \
	  JITK_FUZZ=$(NIGHTLY_FUZZ) $$python $(PYTEST) $(ARGS) || failed=1; \
	  $$python -m bench.features --json bench/results/features-$$version.json >/dev/null || failed=1; \
	done; \
	$(BIN)/python -m bench.features --merge bench/results/features-*.json; \
	$(MAKE) kernels KERNELS= || failed=1; \
	exit $$failed

BENCH ?= all
bench: $(VENV)/ready
	@mkdir -p bench/results
	@$(BIN)/python -m bench $(BENCH) --json bench/results/$$(date +%Y%m%d-%H%M%S).json

# Every value of every placeholder, for each architecture; `make kernels KERNELS=` is all of them, which takes 20 minutes on 2 cores.
KERNELS = --each-value
kernels: $(CUDA_VENV)/ready
	@$(CUDA_BIN)/python -m torch_jit_ops build --backend cuda $(ARCHS:%=--arch %) $(KERNELS)

docs: $(VENV)/ready
	@$(BIN)/python -m tools.op_tables

CXX_FILES = $(shell find csrc include test bench examples -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp')
lint: $(VENV)/lint
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/lint
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/clang-format -i $(CXX_FILES)

house:
	@$(PYTHON) tools/draw_house.py --write

wheel: $(VENV)/ready
	@rm -rf build dist && $(BIN)/python -m build --no-isolation --wheel --outdir dist . >/dev/null && ls dist/*.whl

clean:
	rm -rf $(VENV) $(CUDA_VENV) $(NEWEST_VENV) build dist *.egg-info bench/results
