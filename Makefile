# make train | make test | make lint | make bench: each sets up .venv first and needs nothing else
# than Python 3.11+ and a C++ compiler.
PYTHON ?= python3
NPROC ?= 2
ARGS ?=
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench

.PHONY: setup train test lint bench clean

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

# The peers bring their own dependencies, so they live in an environment of their own.
$(BENCH)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python tools/install_torch.py constraints.txt $(TORCH_INDEX)
	$(BENCH)/bin/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	touch $@

bench: $(BENCH)/ready
	$(BENCH)/bin/python benchmarks/peers.py $(ARGS)

clean:
	rm -rf $(VENV) $(BENCH) build *.egg-info
