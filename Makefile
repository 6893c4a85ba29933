# `make demo` and `make test` set everything up first. The other targets are for working on the code.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint format bench compare scaling simulate sanitize mutants kills matrix setup build wheel docs hf-kernels dist clean

demo: setup
	$(BIN)/rada-fast demo --output results/demo

# One process for each core, but no more than four: most of the time goes into a simulator that runs on one core. There
# are more threads than cores, so that those that wait must not spin.
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

# All benchmarks take most of an hour on two cores. To run only some: make bench CASES="K200 and official"
CASES ?=
bench: setup
	mkdir -p results
	$(BIN)/python -m pytest benchmarks -k "$(CASES)" --benchmark-json results/bench.json --benchmark-quiet

# Whether the working tree is faster or slower than a commit: both run the chosen benchmarks in turn, and a rank test says
# which differences are more than noise. For example: make compare BASE=main CASES="view_selection and 200"
BASE ?= main
compare: setup
	$(BIN)/python -m benchmarks.compare --base $(BASE) -k "$(CASES)"

# How time and memory grow with the numbers of classes, images and episodes, as a picture: a quarter of an hour.
scaling: setup
	$(BIN)/rada-fast bench scaling --output results/scaling

# Counts of operations and bytes of the Triton kernels, for developers who have the PTX simulator; it is not published.
# For other sizes: make simulate SIZES="1x50 6x200"
SIZES ?=
simulate: setup
	$(BIN)/python -m benchmarks.simulate $(if $(SIZES),--sizes $(SIZES))

# Compile the CPU operators with the address and undefined-behaviour sanitizers, apart from the usual build, and run
# their tests. This takes minutes. Python and PyTorch are not instrumented: the sanitizers' library must therefore be
# loaded before them, and leaks are not looked for, as those found would be theirs.
# The thread sanitizer is of no use here. The OpenMP library under PyTorch's parallel loops is not instrumented either,
# so the sanitizer does not see its barriers, and reports a race wherever one loop reads what another wrote.
SANITIZE := RADA_FAST_SANITIZE=address,undefined USE_CUDA=0
sanitize: $(READY)
	$(SANITIZE) $(BIN)/rada-fast build
	$(SANITIZE) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so):$$(c++ -print-file-name=libstdc++.so)" \
	  $(BIN)/python -m pytest tests/ops -p no:cacheprovider

# Plant the bugs of tests/mutants/*.toml, one at a time, in a copy under results/, and report which of them no test
# catches. All of them take most of an hour on two cores; a run that was cut off goes on where it stopped. To plant only
# some: make mutants ONLY="cuda-* cpu-relu-gradient-at-zero"
# With DRAWN, plant as many bugs that are drawn at random instead: make mutants DRAWN=60 SEED=1 ONLY="kernels/ csrc/cpu/"
ONLY ?=
DRAWN ?=
mutants: setup
	$(BIN)/python -m tests.mutants.run $(if $(DRAWN),--drawn $(DRAWN) --seed $(SEED)) $(foreach name,$(ONLY),'$(name)')

# Kill runs of ttt, eft and fft at random moments, start each again, and compare it with an uninterrupted one. Two hundred
# take a quarter of an hour. Each is a line of results/kills.jsonl. For others: make kills COUNT=20 SEED=1
COUNT ?= 200
SEED ?= 0
kills: setup
	mkdir -p results
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kills --count $(COUNT) --seed $(SEED) > results/kills.jsonl

# Try the promised versions of Python, PyTorch and Triton, each set in a fresh environment: an hour. To try only some of
# them, pass options of .ci/matrix.py: make matrix MATRIX="--sets oldest newest"
MATRIX ?=
matrix:
	$(PYTHON) .ci/matrix.py $(MATRIX)

setup: $(READY) build

# The environment is updated when the dependencies change.
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rada_fast needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

# Everything else works without a C++ compiler, so a build that fails says why, and stops nothing.
build: $(READY)
	-$(BIN)/rada-fast build

wheel: setup
	$(BIN)/python -c 'from rada_fast.extension.build import build_wheel; build_wheel("dist")'

# The documentation pages, in build/site. A warning is an error. To read them while writing: .venv/bin/mkdocs serve
docs: $(READY)
	test -x $(BIN)/mkdocs || $(BIN)/python -m pip install --quiet --editable '.[docs]'
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The Triton kernels of the adapter in the layout of Hugging Face's kernel-builder, in build/hf-kernels.
hf-kernels:
	$(PYTHON) .ci/hub/layout.py build/hf-kernels

# A source distribution and a pure wheel in dist/, after the checks that releases usually pass, and a start of both from the
# wheel: its doctor, and its demo on few pictures, in a folder without the checkout. The tools are in an environment of their own.
RELEASE := build/release
dist: $(READY)
	test -x $(RELEASE)/bin/python || $(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --upgrade pip
	$(RELEASE)/bin/python -m pip install --quiet --group release
	rm -rf dist/*.tar.gz dist/*-py3-none-any.whl
	$(RELEASE)/bin/validate-pyproject pyproject.toml
	$(RELEASE)/bin/cffconvert --validate
	$(RELEASE)/bin/python -m build --quiet
	$(RELEASE)/bin/twine check --strict dist/*.tar.gz dist/*-py3-none-any.whl
	$(RELEASE)/bin/check-wheel-contents dist/*-py3-none-any.whl
	$(BIN)/python .ci/try_wheel.py dist/*-py3-none-any.whl

clean:
	rm -rf $(VENV) results build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
