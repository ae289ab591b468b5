# `make demo`, `make test` and `make docs` do all of their own set-up, in $(VENV).
VENV ?= .venv
PYTHON ?= python3
RESULT ?= latest
PROCESSES := $(shell echo $$(( $$(nproc) < 8 ? $$(nproc) + 1 : 8 )))
BIN := $(VENV)/bin

# Tests start hundreds of processes; each would compile our modules anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint unit interpreter long docs bench profile lowest clean

demo: $(VENV)/.demo
	$(BIN)/stem demo

# The checks of style and types take one core, while the first tests wait for processes to start.
test: $(VENV)/.dev
	@$(MAKE) --no-print-directory -j2 lint unit
	@$(MAKE) --no-print-directory interpreter

lint: $(VENV)/.dev
	@echo "== lint: style, format and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A process a core, for small tests gain little by threads, and one for those that wait for others.
unit: $(VENV)/.dev
	@echo "== unit: every backend of this machine"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES)

# Triton reads TRITON_INTERPRET when it is imported, so its tests have processes of their own.
# The interpreter is Python, which uses one core a process.
interpreter: $(VENV)/.dev
	@echo "== interpreter: the Triton kernels, on the CPU"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels \
		-m 'interpreter and not long' \
		-n logical --maxprocesses 8

# What `make test` has no time for.
long: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) -m long
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels \
		-m 'interpreter and long' \
		-n logical --maxprocesses 8

# The docstrings are read, not imported: nothing of this package is installed for it.
docs: $(VENV)/.docs
	$(BIN)/python docs/site.py
	@echo out/docs/site/index.html

bench: $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks --results=benchmarks/results/$(RESULT).json

# The extension against the torch backend for each dtype, with all that this CPU has, then with AVX2.
AVX2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
PROFILE = $(BIN)/python -m pytest benchmarks -m profile --results=benchmarks/results/$(RESULT)

profile: $(VENV)/.dev
	$(PROFILE)-profile.json
	$(AVX2) $(PROFILE)-avx2.json

# The lowest versions that pyproject.toml admits. The extension needs a newer torch; what is built
# for the other environment stays as it is.
lowest:
	$(MAKE) unit VENV=$(VENV)-lowest CONSTRAINTS=constraints-lowest.txt REQUIRE= EDITABLE=

# torch comes first, because the extension is built for the torch that is installed. Where there is
# a compiler, a test run must not go on without it, nor without its CUDA part where nvcc is: for
# the GPU that is there, or else for one architecture, as nothing will run it and
# tests/kernels/extension/test_cuda_compiles.py compiles the kernels for all.
CONSTRAINTS := constraints.txt
EDITABLE := -e
COMPILER := $(shell command -v $${CXX:-c++})
NVCC := $(shell PATH="$${CUDA_HOME:-/usr/local/cuda}/bin:$$PATH" command -v nvcc)
ARCHITECTURES := $(if $(shell command -v nvidia-smi),,TORCH_CUDA_ARCH_LIST=9.0)
REQUIRE := $(if $(COMPILER),STEM_REQUIRE_EXT=1 $(if $(NVCC),STEM_CUDA=1 $(ARCHITECTURES)))
SOURCES := $(shell find csrc -type f -not -name '*.pyc')
# Most modules of what is installed are never imported: those that are, are compiled then.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c $(CONSTRAINTS)

$(VENV)/.demo: pyproject.toml setup.py $(CONSTRAINTS) $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools
	$(PIP) --no-build-isolation $(EDITABLE) .
	touch $@

# The extension is built while all that the tests need is installed; the last line finds it there.
$(VENV)/.dev: pyproject.toml setup.py $(CONSTRAINTS) $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools
	$(REQUIRE) $(PIP) --no-build-isolation --no-deps $(EDITABLE) . & built=$$!; \
		$(PIP) -r $(CONSTRAINTS) && wait $$built
	$(PIP) 'stem-inversion[dev]'
	touch $@

$(VENV)/.docs: $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) latex2mathml mkdocs mkdocstrings-python ruff
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest out build *.egg-info
