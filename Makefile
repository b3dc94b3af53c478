# make demo       teach the embedded demo model a new subject, with pictures (the first time it also sets everything up)
# make test       the quick tests                make test-all   style and all tests but those of network and GPU, as CI
# make test-paths the tests that compare sums, on every path of the libraries (ARGS=--all: all quick ones)
# make test-fronts the notebooks in a browser, each with both versions of ipywidgets (test-all has each with one of them)
# make style      format and lint                make setup      only prepare .venv
# make check      style, types, spelling and layout, in about a minute
# make docs       the site into build/site/, strict, from docs/ and the code (build/site/index.html; needs no network
#                 once its environment is there)
# make bench      README's figures again, and what `fastsd bench` measures: hours on two cores, nothing else running
# make release    wheel, zip and notebooks into dist/, checked (needs no network)
# make colab      the real packages of a Colab image, and everything used in them (needs the network; IMAGE=2026.08-gpu)
# make lock       resolve wheels.lock anew and say what changed (needs the network)
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
# Colab still has ipywidgets 7 and ipykernel 6: notebooks are tested with them from a folder of its own, beside .venv.
WIDGETS7 := .venv-ipywidgets7
# And the JupyterLab that the front end of ipywidgets 7 was made for, to look at the forms with both.
LAB3 := .venv-jupyterlab3
# MkDocs has an environment of its own: it is small, and nothing else here needs it.
DOCS := .venv-docs

.PHONY: bench docs colab lock release setup install-packages install-fronts demo test test-all test-fronts test-paths check lint style
.DEFAULT_GOAL := setup

setup: $(READY)

$(READY): pyproject.toml requirements-dev.txt Makefile
	@test -x $(BIN)/python || test -n "$(PYTHON)" || \
		{ echo "No Python of 3.11 or newer was found. Install one, or name it: make setup PYTHON=/path/to/python"; exit 2; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@$(MAKE) --no-print-directory --jobs 2 install-packages install-fronts
	@touch $(READY)

# pip compiles one file after the other, which is most of its time: here all processors do it, and only what is likely to
# be imported. The rest is compiled when it is.
install-packages:
	@$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install --quiet --no-compile $(TORCH)
	$(PIP) install --quiet --no-compile --constraint requirements-dev.txt --editable ".[dev]"
	@$(BIN)/python -W ignore -m compileall -qq -j 0 -x '/(tests?|models|pipelines)/' .venv/lib || true

install-fronts:
	@rm -rf $(WIDGETS7)
	$(PIP) install --quiet --no-compile --no-deps --target $(WIDGETS7) ipywidgets==7.7.1 ipython_genutils==0.2.0 \
		widgetsnbextension==3.6.10 ipykernel==6.17.1 nest-asyncio==1.6.0
	@test -x $(LAB3)/bin/python || $(BIN)/python -m venv $(LAB3)
	$(LAB3)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile jupyterlab==3.6.8 \
		jupyterlab_widgets==1.1.1 ipywidgets==7.7.1 widgetsnbextension==3.6.10 'notebook<7'
	@# The real localtunnel client, for its test; without Node.js that test is skipped.
	@command -v npm >/dev/null && npm install --silent --no-audit --no-fund --prefix .venv/localtunnel localtunnel@2.0.2 || true

demo: setup
	$(BIN)/fastsd demo
	@echo "The command fastsd is $(BIN)/fastsd; after  source $(BIN)/activate  its name alone is enough."

# One worker more than there are processors, four at most: a quarter of the time tests wait, for a page, a process or a
# clock. One thread each: two workers of two threads would stand in each other's way. A worker that dies ends the run
# with the name of its test: with a new one in its place, the rest would wait for ever. Files come as tests/conftest.py
# orders them, the long ones first.
WORKERS ?= $(shell count=$$(nproc 2>/dev/null || echo 2); echo $$((count < 4 ? count + 1 : 4)))
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(WORKERS) \
	--dist loadfile --no-loadscope-reorder --max-worker-restart 0

test: setup
	$(PYTEST) -m "not slow and not network and not gpu"

test-all: setup lint
	$(PYTEST) -m "not network and not gpu"

test-fronts: setup
	FASTSD_FRONTS=all $(PYTEST) -m notebook tests/browser

test-paths: setup
	$(BIN)/python scripts/test_paths.py $(ARGS)

docs: $(DOCS)/.ready
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --quiet

$(DOCS)/.ready: requirements-docs.txt
	@test -n "$(PYTHON)" || { echo "No Python of 3.11 or newer was found. Name it: make docs PYTHON=/path/to/python"; exit 2; }
	@test -x $(DOCS)/bin/python || "$(PYTHON)" -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r requirements-docs.txt
	@touch $@

# The results pages of the built-in models are written anew, and with them the figures in README and docs; what
# `fastsd bench` prints is put into its page by hand, with the machine and the date.
bench: setup
	$(BIN)/python scripts/measure_demo_dreambooth.py --seeds 5 --jobs 1 --write
	$(BIN)/python scripts/judge_demo_model.py --pictures 160 --write
	$(BIN)/python scripts/figures.py --write
	$(BIN)/fastsd bench dreambooth
	$(BIN)/fastsd bench convert
	$(BIN)/fastsd bench trocr
	$(BIN)/fastsd bench install

lock: setup
	$(BIN)/python scripts/make_lock.py

release: setup
	@$(BIN)/python scripts/write_first_cells.py
	$(BIN)/python scripts/make_release.py $(ARGS)

# The layout is one of the tests, so that `test-all` has it there.
check: lint
	@$(BIN)/python -m pytest -q -p no:xdist tests/test_layout.py

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . || { echo "To put this right: make style"; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/codespell

# Formatted first: most lines that are too long are shorter then.
style: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Build a Colab image's Python outside of this folder, add what `fastsd install` adds, and use everything in it (needs the
# package index and room for 10 GB): make colab IMAGE=2026.08-gpu INTO=/tmp/fastsd-colab
IMAGE ?= 2026.08-gpu
INTO ?= /tmp/fastsd-colab
colab: setup
	$(BIN)/python scripts/colab_image.py $(IMAGE) --into $(INTO)
