# `make` alone prints the targets. Everything runs in $(VENV), which is made on first use.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
TEST_JOBS ?= 2
SEED ?=
DEMO_ARGS ?=
PRETRAINED_ARGS ?=
BENCH_ARGS ?=

# A thread that waits gives its core up. Spinning, the default, takes it from whatever runs next.
test fuzz demo pretrained: export OMP_WAIT_POLICY ?= passive

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt $(PIP_ARGS)
# A line for each large wheel as it comes, name and size; warnings and errors go past this, on stderr.
TERSE := awk '/^ *(Downloading|Using cached) .*\([0-9.]+ [MG]B\)/ { print "  " $$(NF-2), $$(NF-1), $$NF; fflush() } \
	/^Installing collected/ { print "  unpacking"; fflush() }'

.PHONY: help
help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=$(PYTHON)  VENV=$(VENV)  TEST_JOBS=$(TEST_JOBS)  PIP_ARGS=  PYTEST_ARGS=  DEMO_ARGS=  PRETRAINED_ARGS=  BENCH_ARGS=  may be set:"
	@echo "  make test PYTEST_ARGS='-k packaging'      make demo DEMO_ARGS='--help'"

.PHONY: venv
venv: $(STAMP)  ## create the environment with the pinned versions, if it is missing or out of date

$(STAMP): setup.py pyproject.toml constraints.txt drkl_triton/_version.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "needs Python 3.10 or newer, got %d.%d; set PYTHON=" % sys.version_info[:2])'
	@echo "Installing into $(VENV), with the versions in constraints.txt"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --quiet setuptools
	@$(PIP) --no-build-isolation -e '.[test,bench,examples,dev]' | $(TERSE)
	@# tests/test_migrate.py takes one file from each; what they require does not fit together
	@$(PIP) --quiet --no-deps torchtune ms-swift
	@touch $@
	@echo "  done"

.PHONY: test
test: $(STAMP)  ## run every test; no GPU needed
	@$(BIN)/pytest -n $(TEST_JOBS) --dist worksteal $(PYTEST_ARGS)

.PHONY: test-all
test-all: export DRKL_TESTS = all
test-all: test  ## and every loss with every dtype, size, tail and target that test takes in turn

.PHONY: fuzz
fuzz: $(STAMP)  ## try the properties on thousands of inputs; SEED=N repeats a run
	@$(BIN)/pytest -n $(TEST_JOBS) --hypothesis-profile=fuzz $(if $(SEED),--hypothesis-seed=$(SEED)) tests/test_properties.py $(PYTEST_ARGS)

.PHONY: demo
demo: $(STAMP)  ## distil small models on real text and compare the objectives, twelve minutes on two cores
	@$(BIN)/python examples/distill/run.py $(DEMO_ARGS)

.PHONY: pretrained
pretrained: $(STAMP)  ## distil SmolLM2-135M and compare the objectives with intervals, half an hour; downloads 100 MB
	@$(BIN)/python examples/pretrained/study.py $(PRETRAINED_ARGS)

.PHONY: bench
bench: $(STAMP)  ## time the losses across vocabulary sizes, on the device that is there
	@$(BIN)/python bench/run.py $(BENCH_ARGS)

.PHONY: bench-linear
bench-linear: $(STAMP)  ## time the losses from hidden states beside the matrix products alone
	@$(BIN)/python bench/linear.py $(BENCH_ARGS)

.PHONY: hub-kernel
hub-kernel: $(STAMP)  ## write the tree that Hugging Face's kernels package loads, into OUT=dist/hub-kernel
	@$(BIN)/python hub/build.py $(if $(OUT),--out $(OUT))

.PHONY: gpu-day
gpu-day:  ## on a machine with a GPU: its tests, the tuning sweep and the benchmarks, into OUT=folder
	@PYTHON=$(PYTHON) bench/gpu_day.sh $(if $(OUT),$(OUT),$(error say where the results go: make gpu-day OUT=folder))

.PHONY: lint
lint: $(STAMP)  ## check style and formatting
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

.PHONY: format
format: $(STAMP)  ## fix what ruff can fix
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

.PHONY: wheel
wheel: $(STAMP)  ## build the wheel and the sdist into dist/
	@$(BIN)/pyproject-build --no-isolation --outdir dist

.PHONY: clean
clean:  ## remove build products and caches; the environment stays
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
