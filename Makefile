# Everything runs inside .venv, which the first target that needs it creates.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Tests run in this many processes, each with one thread.
WORKERS ?= 2

BIN := $(VENV)/bin
CREATED := $(VENV)/.created
TRAIN_READY := $(VENV)/.ready-train
ENV_READY := $(VENV)/.ready
# Without this, pip's warnings about the indexes it asks bury everything else.
QUIET ?= -qq
PIP := $(BIN)/python -m pip $(QUIET) --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt
PIP_FAILED := { echo "pip failed; for its own account: make env QUIET=" >&2; exit 1; }
NEEDS := pyproject.toml constraints.txt
CODE := fastdense kernels benchmarks tests
EVERYTHING := train,bench,dev
PEERS := monai timm torchvision torchxrayvision
# `make micro` compares with this record and fails where the fastest round exceeds its by more than MICRO_LIMIT: what else
# the machine does moves medians.
MICRO_BASELINE ?= benchmarks/results/cpu/micro.json
MICRO_LIMIT ?= 50%
TESTS := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
MICRO := $(BIN)/python -m pytest benchmarks/micro -q -p no:cacheprovider --benchmark-only \
	--benchmark-timer=time.thread_time --benchmark-columns=min,median,iqr,rounds --benchmark-sort=name

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help env demo quick test test-all lint types pytest format bench micro micro-baseline wheel clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(ENV_READY) ## Create or update .venv with everything that development needs

demo: $(TRAIN_READY) ## Train one DenseNet twice, reference and fastdense, and compare
	@$(BIN)/fastdense train --compare

quick: $(ENV_READY) ## After each edit, within a minute: block, operators, modules, conversion, one kernel of each kind
	@$(TESTS) -m quick $(PYTEST_ARGS)

test: lint types pytest ## Before each commit: lint, types and the tests

test-all: override PYTEST_ARGS += -m "minutes or not minutes"
test-all: test ## The same, with the tests that take minutes

lint: $(ENV_READY) ## Style and likely mistakes (ruff)
	@echo "== lint"
	@$(BIN)/ruff check --output-format concise $(CODE)
	@$(BIN)/ruff format --check --output-format concise $(CODE)

types: $(ENV_READY) ## Static types (mypy)
	@echo "== types"
	@$(BIN)/mypy

pytest: $(ENV_READY) ## The tests alone; choose some with PYTEST_ARGS="-k name"
	@echo "== tests"
	@$(TESTS) --durations=10 $(PYTEST_ARGS)

format: $(ENV_READY) ## Rewrite the code in the project's format
	@$(BIN)/ruff check --fix --exit-zero --quiet $(CODE)
	@$(BIN)/ruff format $(CODE)

bench: $(ENV_READY) ## Measure time and memory on this machine and record the results under benchmarks/results
	@$(BIN)/python -m benchmarks.speed --threads 2
	@$(BIN)/python -m benchmarks.memory

micro: $(ENV_READY) ## Time the CPU overhead, beside the stored measurements; fails where it became much slower
	@$(MICRO) --benchmark-group-by=fullname --benchmark-compare=$(MICRO_BASELINE) \
		--benchmark-compare-fail=min:$(MICRO_LIMIT)

micro-baseline: $(ENV_READY) ## Store these measurements instead, on a quiet machine
	@$(MICRO) --benchmark-json=$(MICRO_BASELINE)

wheel: $(ENV_READY) ## Build the source archive and, from it, the wheel into dist/
	@$(BIN)/python -m build --no-isolation

clean: ## Remove what builds and checks leave behind
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	@find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## The same, and .venv
	@rm -rf $(VENV)

# An interrupted `venv` leaves a folder that looks complete: hence --clear and a stamp written last.
$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) must be Python 3.11 or newer; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "[1/3] creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV) || \
		{ echo "$(PYTHON) cannot create virtual environments; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@touch $@

# What both environments need. PyTorch goes first so that the long wait has a name.
define install
	@echo "[2/3] installing PyTorch (a large download the first time)"
	@$(INSTALL) pip setuptools wheel torch || $(PIP_FAILED)
	@echo "[3/3] installing fastdense[$(1)] and Triton"
	@$(INSTALL) --no-build-isolation --editable '.[$(1)]' || $(PIP_FAILED)
endef

# `make demo` is most people's first command: it waits for no linter.
$(TRAIN_READY): $(NEEDS) | $(CREATED)
	$(call install,train)
	@touch $@

# The peers come without their dependencies: their networks need none of those, and some would replace PyTorch.
$(ENV_READY): $(NEEDS) | $(CREATED)
	$(call install,$(EVERYTHING))
	@echo "      installing the packages whose DenseNets are converted: $(PEERS)"
	@$(INSTALL) --no-deps $(PEERS) || $(PIP_FAILED)
	@touch $(TRAIN_READY) $@
	@echo "environment ready: $(VENV)"
