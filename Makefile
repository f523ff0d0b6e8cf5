# make train | test | lint | types | package | site | figures | bench: each sets up what it needs and
# wants nothing else than Python 3.11+ and a C++ compiler.
PYTHON ?= python3
NPROC ?= 2
ARGS ?=
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
DOCS := .venv-docs

.PHONY: setup train test lint types package site figures bench clean

setup: $(VENV)/ready

# The marker is written last, so that an interrupted installation is begun again.
$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "ringattn needs Python 3.11 or newer; run: make PYTHON=python3.11 ..." >&2; exit 1; }
	@command -v c++ >/dev/null \
		|| { echo "ringattn needs a C++ compiler (c++): DeepSpeed builds a small extension" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/install_torch.py constraints.txt $(TORCH_INDEX)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
# Apart: where flash-linear-attention can be imported transformers calls it, on a CPU too.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --target $(VENV)/fla fla-core
	touch $@

train: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
		$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) train.py $(ARGS)

test: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -n 2 --dist loadgroup $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Strict types over the public interface.
types: setup
	$(BIN)/python tools/typecheck.py

# sdist and wheel in dist/, tried in empty environments: the core, then each extra.
package: setup
	$(BIN)/python tools/try_packages.py build
	$(BIN)/python tools/try_packages.py extras

# The site in site/, strictly. Docstrings are read from an installed package: kernels/ is part of it there.
$(DOCS)/ready: docs/requirements.txt constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet -c constraints.txt -r docs/requirements.txt
	touch $@

site: $(DOCS)/ready
	rm -rf build
	$(DOCS)/bin/python -m pip install --quiet --no-deps --force-reinstall .
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --clean

# Runs every bench that a page quotes, for hours, and rewrites the pages; ARGS="traffic memory": these.
figures: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/figures.py $(ARGS)

# The peers bring their own dependencies, so they live in an environment of their own.
$(BENCH)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python tools/install_torch.py constraints.txt $(TORCH_INDEX)
	$(BENCH)/bin/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	touch $@

bench: $(BENCH)/ready
	$(BENCH)/bin/python benchmarks/peers.py $(ARGS)

clean:
	rm -rf $(VENV) $(BENCH) $(DOCS) build dist site *.egg-info
