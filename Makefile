# `make demo` and `make test` set everything up first; the rest is for working on the code.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint format bench scaling simulate sanitize matrix setup build wheel clean

demo: setup
	$(BIN)/rada-fast demo --output results/demo

# Two processes on two cores: most of the time goes into the simulator, which runs on one. Threads that wait must not spin,
# since there are more of them than cores.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))
test: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Some cases only: make bench CASES="K200 and official". The whole grid takes most of an hour on two cores.
CASES ?=
bench: setup
	mkdir -p results
	$(BIN)/python -m pytest benchmarks -k "$(CASES)" --benchmark-json results/bench.json --benchmark-quiet

scaling: setup
	$(BIN)/python -m benchmarks.plot_scaling --output results/scaling

# What the Triton kernels count in a PTX simulator that is not published: make simulate SIZES="1x50 6x200". No GPU needed.
SIZES ?=
simulate: setup
	$(BIN)/python -m benchmarks.simulate $(if $(SIZES),--sizes $(SIZES))

# The CPU's operators compiled with the address and undefined-behaviour sanitizers, in a place of their own, and their
# tests: minutes. Python and PyTorch are not instrumented, so the run-time library comes first, and leaks, which would be
# theirs, are not looked for.
# No thread sanitizer: the OpenMP runtime under PyTorch's parallel loops is not instrumented, so the sanitizer does not see
# its barriers and reports a race wherever one loop reads what another wrote, in correct programs too.
SANITIZE := RADA_FAST_SANITIZE=address,undefined USE_CUDA=0
sanitize: $(READY)
	$(SANITIZE) $(BIN)/rada-fast build
	$(SANITIZE) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so):$$(c++ -print-file-name=libstdc++.so)" \
	  $(BIN)/python -m pytest tests/ops -p no:cacheprovider

# The promised versions of Python, PyTorch and Triton, each set in a fresh environment: an hour. See .ci/matrix.py for parts.
MATRIX ?=
matrix:
	$(PYTHON) .ci/matrix.py $(MATRIX)

setup: $(READY) build

# Made again when the dependencies change.
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rada_fast needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

# Without a C++ compiler everything else works, so a build that cannot be made says so and stops nothing.
build: $(READY)
	-$(BIN)/rada-fast build

wheel: setup
	$(BIN)/python -c 'from rada_fast.extension.build import build_wheel; build_wheel("dist")'

clean:
	rm -rf $(VENV) results build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
