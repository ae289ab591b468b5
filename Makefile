# `make demo` and `make test` do all of their own set-up, in $(VENV).
VENV ?= .venv
PYTHON ?= python3
RESULT ?= latest
BIN := $(VENV)/bin

.PHONY: demo test lint unit interpreter bench clean

demo: $(VENV)/.demo
	$(BIN)/stem demo

test: lint unit interpreter

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(VENV)/.dev
	$(BIN)/python -m pytest

# Triton reads TRITON_INTERPRET when it is imported, so its tests have processes of their own.
# The interpreter is Python, which uses one core a process.
interpreter: $(VENV)/.dev
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m interpreter \
		-n logical --maxprocesses 8

bench: $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks --results=benchmarks/results/$(RESULT).json

# The extension is built against the torch that is installed, so torch comes first. Where there is
# a compiler, a test run must not go on without it.
REQUIRE := $(if $(shell command -v $${CXX:-c++}),STEM_REQUIRE_EXT=1)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

$(VENV)/.demo $(VENV)/.dev: pyproject.toml constraints.txt setup.py $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	STEM_SKIP_EXT=1 $(PIP) setuptools -e '.[$(patsubst .%,%,$(notdir $@))]'
	$(if $(findstring .dev,$@),$(REQUIRE)) $(PIP) --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info
