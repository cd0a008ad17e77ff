# `make` shows what there is. Everything a target needs it installs into $(VENV) by itself.

PYTHON ?= python3
VENV ?= .venv
# What is installed where $(PYTHON) brings no torch >= 2.11 of its own.
TORCH ?= torch==2.13.0
# The CUDA build with which kernels are compiled where there is no GPU, and for which architectures.
CUDA_TORCH ?= torch==2.11.0
CUDA_VENV ?= .venv-cuda
ARCHS ?= 8.0 9.0a 10.0a
# Arguments for pytest, such as `make test ARGS="-k silu"`.
ARGS ?=

BIN := $(VENV)/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')

.PHONY: help demo test bench kernels lint format wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      set up, then run a small Llama on jitk ops through torch.compile, checked against plain PyTorch"
	@echo "make test      set up, then run all tests (ARGS=\"-k silu\" for some)"
	@echo "make bench     kernels, host overhead and compile time beside copy, Inductor and installed peers (BENCH=\"kernels --quick\")"
	@echo "make kernels   compile every CUDA kernel with nvcc for $(ARCHS), without a GPU"
	@echo "make lint      formatters and linters, as CI runs them; make format applies them"
	@echo "make wheel     build dist/*.whl"
	@echo "make clean     remove what the targets made"

# The interpreter's own torch is used if it is new enough: it is the one built for the machine.
$(VENV)/ready: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "torch_jit_ops needs Python 3.10 or newer; set PYTHON=/path/to/python3.x"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || echo "note: no C++ compiler ($${CXX:-c++}): ops will run their PyTorch reference. Install g++ 11 or newer"
	@if $(PYTHON) -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null; then \
	  echo "setting up $(VENV) on top of $(PYTHON)'s torch"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  echo "setting up $(VENV) with $(TORCH)"; $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet "$(TORCH)"; \
	fi
	@$(BIN)/python -m pip install --quiet --editable '.[test]'
	@if [ "$(HAS_GPU)" != 0 ] && ! $(RUN) -c 'from torch_jit_ops import toolchain; toolchain.cuda_toolkit()' 2>/dev/null; then \
	  echo "there is a GPU and no CUDA compiler: installing one into $(VENV)"; $(BIN)/python -m pip install --quiet --editable '.[nvcc]'; \
	fi
	@touch $@

$(VENV)/lint: setup.cfg
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet $$($(PYTHON) -c 'import configparser as c; p = c.ConfigParser(); p.read("setup.cfg"); print(*(x.replace(" ", "") for x in p["options.extras_require"]["lint"].split("\n") if x))')
	@touch $@

$(CUDA_VENV)/ready: setup.cfg
	@echo "setting up $(CUDA_VENV) with $(CUDA_TORCH), a CUDA build: some minutes and 5 GB"
	@$(PYTHON) -m venv $(CUDA_VENV)
	@PIP_FIND_LINKS= $(CUDA_VENV)/bin/python -m pip install --quiet "$(CUDA_TORCH)" setuptools
	@PIP_FIND_LINKS= $(CUDA_VENV)/bin/python -m pip install --quiet --editable .
	@touch $@

demo: $(VENV)/ready
	@$(RUN) -m torch_jit_ops demo

test: $(VENV)/ready
	@$(RUN) -m pytest $(ARGS)

BENCH ?= all
bench: $(VENV)/ready
	@mkdir -p bench/results
	@$(RUN) -m bench $(BENCH) --json bench/results/$$(date +%Y%m%d-%H%M%S).json

# Any installed CUDA toolkit will do; the extra brings one where there is none.
kernels: $(CUDA_VENV)/ready
	@PATH="$(CURDIR)/$(CUDA_VENV)/bin:$$PATH" $(CUDA_VENV)/bin/python -m torch_jit_ops build --backend cuda $(ARCHS:%=--arch %)

CXX_FILES := $(shell git ls-files '*.h' '*.cuh' '*.cu' '*.cpp' 2>/dev/null)
lint: $(VENV)/lint
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/lint
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/clang-format -i $(CXX_FILES)

wheel: $(VENV)/ready
	@$(BIN)/python -m build --wheel --outdir dist . >/dev/null && ls dist/*.whl

clean:
	rm -rf $(VENV) $(CUDA_VENV) build dist *.egg-info bench/results
