# make demo       teach the embedded demo model a new subject, with pictures (the first time it also sets everything up)
# make test       the quick tests                make test-all   every test, as CI runs them
# make style      format and lint                make setup      only prepare .venv
#
# Everything is installed into .venv in this folder. PyTorch is installed first and on its own, so that no other
# package chooses one. Where the plain name brings the large CUDA build and you have no GPU, name a smaller one:
#   make setup TORCH="torch==2.13.0 --index-url <the CPU index named in PyTorch's guide>"
TORCH ?= torch==2.13.0
# The first Python of 3.11 or newer that can make an environment; PYTHON=/path/to/python chooses another.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11 python3.14; do \
	"$$name" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$name"; break; }; done)

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := .venv/.ready
# Colab still has ipywidgets 7: the forms are tested with it from a folder of its own, beside the newer one in .venv.
WIDGETS7 := .venv-ipywidgets7

.PHONY: setup demo test test-all check style
.DEFAULT_GOAL := setup

setup: $(READY)

$(READY): pyproject.toml requirements-dev.txt Makefile
	@test -x $(BIN)/python || test -n "$(PYTHON)" || \
		{ echo "No Python of 3.11 or newer was found. Install one, or name it: make setup PYTHON=/path/to/python"; exit 2; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet --constraint requirements-dev.txt --editable ".[dev]"
	@rm -rf $(WIDGETS7)
	$(PIP) install --quiet --no-deps --target $(WIDGETS7) ipywidgets==7.7.1 ipython_genutils==0.2.0 widgetsnbextension==3.6.10
	@touch $(READY)

demo: setup
	$(BIN)/fastsd demo

test: setup
	$(BIN)/python -m pytest -m "not slow and not network and not gpu"

test-all: setup check
	$(BIN)/python -m pytest -m "not network and not gpu"

check: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . || { echo "To put this right: make style"; exit 1; }

style: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
