# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
# Both set up a virtual environment in $(VENV) first; a second run installs nothing again.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
PYTEST_ARGS ?=

# torch is installed first and alone, so that this choice of build is the one that stays:
#   make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"   the small CPU build
#   make test TORCH="torch --index-url https://download.pytorch.org/whl/cu126" a build for a CUDA version
# A torch that the environment already holds is kept when it is new enough.
TORCH  ?= torch==2.13.0

BIN     = $(VENV)/bin
PACKAGES = partitioner passes runtime
# One thread per process: pytest runs $(JOBS) processes side by side; each begins with a part of its own, so that what a
# file's tests share is mostly made once.
ONE_THREAD = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-architectures test-browser lint types layers unit clean

help:
	@echo "make demo       install, then partition, run and verify a 3D U-Net on 4 processes (CPU)"
	@echo "make test       install, then all checks: ruff, pyright, import layers, pytest"
	@echo "make test-slow  the tests marked slow, too long for every change"
	@echo "make test-architectures  install the packages of published networks, then partition them all"
	@echo "make test-browser  install what drives a browser, then look at the page of partition report in Chromium"
	@echo "make lint       ruff, pyright and import layers only"
	@echo "make clean      remove the environment, caches and outputs"

demo: $(VENV)/.installed-demo
	$(BIN)/python -m benchmarks demo

# One after the other, pytest last, also under `make -j`.
test: $(VENV)/.installed-test
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory unit

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

unit: $(VENV)/.installed-test
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-test
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) -m "slow and not gpu and not browser" $(PYTEST_ARGS)

test-architectures: $(VENV)/.installed-networks
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) -m "not gpu" tests/test_architectures.py $(PYTEST_ARGS)

test-browser: $(VENV)/.installed-browser
	$(ONE_THREAD) $(BIN)/python -m pytest -m browser tests/test_page_browser.py $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	rm -rf demo-output train-output
	find $(PACKAGES) benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up -------------------------------------------------------------------------------------

$(VENV)/.installed-demo: pyproject.toml | $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

# The torch that is here stays: torchvision is chosen to go with it.
$(VENV)/.installed-networks: $(VENV)/.installed-test
	@$(BIN)/python -c "import torch; print('torch==' + torch.__version__)" > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[test,networks]"
	@touch $@

$(VENV)/.installed-browser: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --editable ".[test,browser]"
	@touch $@

$(VENV)/.torch: | $(BIN)/python
	@$(BIN)/python -c "import torch; v = torch.__version__.split('.'); assert (int(v[0]), int(v[1])) >= (2, 9)" \
	  2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
	  || { echo "$(PYTHON) is older than Python 3.11; choose another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
