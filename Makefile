# SPDX-License-Identifier: Apache-2.0
# On a fresh machine with python3 and g++, `make demo` and `make test` are all there is to know:
# each makes .venv if it is missing, installs the pinned packages, builds, and runs.
.DEFAULT_GOAL := help
VENV ?= .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
export UHD_OPS_REQUIRE_NATIVE ?= 1
# The oldest architecture, the one that is measured, and PTX: all of them take three minutes on two processors.
export UHD_OPS_CUDA_ARCHS ?= 80-real;90a-real;100-virtual
# The virtual environment's cmake and ninja, also where it was not activated.
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: help build demo docs test test-op test-all wheel mutants bench style lint format clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(INSTALLED): requirements-dev.txt
	@bash .ci/install.sh $(VENV)

build: $(INSTALLED)  ## Build the native libraries in place
	@bash .ci/build.sh $(PYTHON)

demo: build  ## Encode a photograph with and without the compressor
	bash examples/demo.sh $(PYTHON)

docs: build  ## Build the site in build/docs; a warning is an error
	bash .ci/docs.sh $(PYTHON)

test: style build  ## Check style and run the tests on this build, but for slow ones
	$(PYTHON) -m pytest -n 2 -m "not slow"

test-op: $(INSTALLED)  ## Run the tests of one operator on this build: make test-op OP=window_mean
	@test -n "$(OP)" || { echo "usage: make test-op OP=window_mean" >&2; exit 2; }
	$(PYTHON) -m pytest --op "$(OP)" python_tests/test_battery_*.py \
		$(wildcard python_tests/test_$(OP).py python_tests/test_$(OP)_kernels.py)

test-all: test lint docs  ## Then types, the site, slow tests, timm's own, vLLM and SGLang, Ray, hostile calls, other machines, emulated CUDA kernels, planted faults, CPU kernels on aarch64, the packages, the oldest packages to go with them, the call on a GPU rehearsed, sanitizers
	$(PYTHON) -m pytest -n 2 -m slow
	bash .ci/timm_suite.sh $(PYTHON)
	bash .ci/serving_suite.sh $(PYTHON)
	bash .ci/ray_suite.sh $(PYTHON)
	bash .ci/fuzz.sh $(PYTHON)
	bash .ci/machines.sh $(PYTHON)
	bash .ci/emulate.sh $(PYTHON)
	bash .ci/mutants.sh $(PYTHON)
	bash .ci/aarch64.sh $(PYTHON)
	bash .ci/wheel.sh $(PYTHON)
	bash .ci/compat.sh
	bash .ci/gpu_call.sh $(PYTHON)
	bash .ci/sanitize.sh $(PYTHON)
	bash .ci/races.sh $(PYTHON)
	bash .ci/fuzz.sh $(PYTHON) --sanitize
	bash .ci/emulate.sh $(PYTHON) --sanitize

wheel: build  ## Make the source archive and the wheel, check them, and use the wheel with the oldest and the newest torch
	bash .ci/wheel.sh $(PYTHON)

mutants: build  ## Plant faults in the sources and show that the checks notice each: make mutants PART=norm for some
	bash .ci/mutants.sh $(PYTHON) $(PART)

style: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	git ls-files -co --exclude-standard "csrc/*.h" "csrc/*.cpp" "csrc/*.cu" "csrc/*.cuh" | xargs $(VENV)/bin/clang-format --dry-run --Werror

lint: style  ## Check style of Python and C++, and types
	$(PYTHON) -m basedpyright --pythonpath $(PYTHON)

format: $(INSTALLED)  ## Format Python and C++
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	git ls-files -co --exclude-standard 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(VENV)/bin/clang-format -i

bench: build  ## Measure the operators against the same in plain PyTorch
	$(PYTHON) benchmarks/bench_ops.py

clean:  ## Remove what a build leaves, but not .venv
	rm -rf build dist docs/generated *.egg-info uhd_ops/*.so
