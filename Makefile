# Every target needs nothing before it but Python 3.11+ with pip and network access to a package
# index; environments are made on demand and reused until what they were made from changes.
#
#   make demo           the live demonstration: three replicas, two gateways, eight agents, faults
#   make test           everything that CI checks
#   make sim SEEDS=0:1000  simulated histories of the whole system under faults, by seed
#   make faults         real faults on real processes: about 500, three quarters of an hour
#   make soak MINUTES=… agents under steady faults for so long; fails if memory grows too much
#   make mutants        deliberate bugs in copies of the code: the simulation must find each of them
#   make nightly        all of these with other seeds and more of them, for hours; see .ci/nightly
#   make test-sglang    the tests with the real sglang on the CPU, in an environment of their own
#   make lint           ruff, mypy --strict, import layers
#   make protos         regenerate sdk/sessile/v1 from proto/
#   make check-protos   fail if sdk/sessile/v1 is not what proto/ generates
#   make docs           the client's API reference, from its docstrings, into build/docs
#   make clean          remove environments, caches and reports
#
# PYTHON      interpreter the environments are made from
# TORCH_ARGS  extra arguments of the torch install, for instance to choose an index of CPU builds
# DEMO_ARGS   extra arguments of the demo, for instance --engine sim
# FAULTS_ARGS extra arguments of faults, for instance --classes gateway --per-class 3
# MUTANTS_ARGS extra arguments of mutants, for instance --only epoch --jobs 4
# SIM_ARGS    extra arguments of sim, for instance --kinds drain,migrate --json figures.json
# NIGHTLY_ARGS only these steps of nightly, for instance faults soak
# PYTEST_ARGS extra arguments of pytest, for instance -k ledger
# PYTEST_JOBS files of tests that `make test` runs at once; many of them wait most of the time

PYTHON ?= python3
TORCH_ARGS ?=
DEMO_ARGS ?=
FAULTS_ARGS ?=
MUTANTS_ARGS ?=
NIGHTLY_ARGS ?=
SEEDS ?= 0:200
SIM_ARGS ?=
MINUTES ?= 10
PYTEST_ARGS ?=
PYTEST_JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SGLANG_VENV := .cache/sglang-venv
SGLANG_INSTALLED := $(SGLANG_VENV)/.installed
PROTOS_VENV := .cache/protos-venv
PROTOS_INSTALLED := $(PROTOS_VENV)/.installed
PROTOS_FRESH := .cache/protos-fresh
PROTOS := $(wildcard proto/sessile/v1/*.proto)
TORCH := $(shell grep '^torch==' constraints.txt)

# One compute thread a process: on few cores a second one is slower than none.
export OMP_NUM_THREADS ?= 1

.DELETE_ON_ERROR:
.PHONY: demo test test-sglang sim faults soak mutants nightly lint protos check-protos docs clean install

install: $(INSTALLED)

# Without ensurepip (Debian without python3-venv) the host's pip installs pip into the environment.
define make-venv
rm -rf $(1)
$(PYTHON) -m venv $(1) >/dev/null 2>&1 || { \
  rm -rf $(1) && $(PYTHON) -m venv --without-pip $(1) && \
  $(PYTHON) -m pip --python $(1)/bin/python install --quiet pip; } || { \
  echo "cannot make a virtual environment: install the venv module or pip for $(PYTHON)" >&2; exit 1; }
endef

$(BIN)/python:
	$(call make-venv,$(VENV))

# torch first and by its exact version, so that pip takes the build of the configured links and
# indexes rather than a larger one that a range would also allow.
$(INSTALLED): pyproject.toml sdk/pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --no-input --progress-bar off $(TORCH_ARGS) $(TORCH) -c constraints.txt
	$(BIN)/python -m pip install --no-input --progress-bar off \
	  -e ./sdk -e '.[torch,otlp,dev]' -c constraints.txt
	touch $@

$(PROTOS_INSTALLED): proto/tools.txt
	mkdir -p .cache
	$(call make-venv,$(PROTOS_VENV))
	$(PROTOS_VENV)/bin/python -m pip install --no-input --quiet -r proto/tools.txt
	touch $@

# Everything by its exact version and nothing resolved: sglang's own requirements name CUDA packages.
$(SGLANG_INSTALLED): pyproject.toml sdk/pyproject.toml tests/sglang/requirements.txt \
    $(wildcard tests/sglang/cpu/*.* tests/sglang/cpu/*/*.py)
	mkdir -p .cache
	$(call make-venv,$(SGLANG_VENV))
	$(SGLANG_VENV)/bin/python -m pip install --no-input --quiet $(TORCH_ARGS) $(TORCH)
	$(SGLANG_VENV)/bin/python -m pip install --no-input --quiet --no-deps -r tests/sglang/requirements.txt
	$(SGLANG_VENV)/bin/python -m pip install --no-input --quiet --no-deps \
	  -e ./sdk -e . ./tests/sglang/cpu
	touch $@

define generate-protos
PATH="$(abspath $(PROTOS_VENV))/bin:$$PATH" $(PROTOS_VENV)/bin/python -m grpc_tools.protoc -Iproto \
  --python_out=$(1) --grpc_python_out=$(1) --mypy_out=$(1) --mypy_grpc_out=$(1) $(PROTOS)
endef

protos: $(PROTOS_INSTALLED)
	rm -f sdk/sessile/v1/*_pb2*.py sdk/sessile/v1/*_pb2*.pyi
	$(call generate-protos,sdk)

check-protos: $(PROTOS_INSTALLED)
	rm -rf $(PROTOS_FRESH) && mkdir -p $(PROTOS_FRESH)
	$(call generate-protos,$(PROTOS_FRESH))
	diff -r --exclude=__init__.py --exclude=__pycache__ $(PROTOS_FRESH)/sessile/v1 sdk/sessile/v1 \
	  || { echo "sdk/sessile/v1 is stale: run make protos" >&2; exit 1; }

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint check-protos
	$(BIN)/python -m pytest --numprocesses $(PYTEST_JOBS) --dist loadfile $(PYTEST_ARGS) </dev/null

# What sglang warns of is its own.
test-sglang: $(SGLANG_INSTALLED)
	$(SGLANG_VENV)/bin/python -m pytest -W default tests/sglang $(PYTEST_ARGS) </dev/null

sim: $(INSTALLED)
	$(BIN)/python -m loadtest.simulation --seeds $(SEEDS) $(SIM_ARGS)

faults: $(INSTALLED)
	$(BIN)/python -m tests.faults $(FAULTS_ARGS)

soak: $(INSTALLED)
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

mutants: $(INSTALLED)
	$(BIN)/python -m tests.sim.mutants $(MUTANTS_ARGS)

nightly: $(INSTALLED)
	PYTHON=$(BIN)/python .ci/nightly $(NIGHTLY_ARGS)

demo: $(INSTALLED)
	$(BIN)/sessile demo $(DEMO_ARGS)

docs: $(INSTALLED)
	$(BIN)/python -W error -m pdoc --no-show-source -o build/docs sessile sessile.sync '!sessile.v1'

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache \
	  build dist demo-report.json
