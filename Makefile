# make demo | test | check | docs | first-hour | fuzz | load | bench | gates | gpu | wheels | venv | lock | clean
# Every target sets up what it needs. PYTHON chooses the interpreter; PIP_ARGS is passed to pip (your own package index, for example).
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
# A file of locks/ names every package with its version and the hashes of its files. Anything else is refused. No package is built.
LOCKED := $(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes --no-deps --only-binary=:all: $(PIP_ARGS)

.PHONY: demo test check docs first-hour fuzz load bench gates gpu wheels venv venv-dev lock clean

# End to end: a model gets a name, then learns from real chats. NAME is its name (make demo NAME=小米); it counts only on the command
# line of make, because some systems set a variable NAME of their own. ARGS="--no-open --only persona" and the like.
demo: export CHATMILL_DEMO_NAME = $(if $(filter command,$(origin NAME)),$(NAME))
demo: venv
	$(BIN)/python -m chatmill.launcher.demo $(ARGS)

# Lint, types and all tests that this machine can run. ARGS is passed to pytest. WORKERS=0 runs them one after another; one more than
# two cores, because the worker with the Slurm tests waits most of its time.
WORKERS ?= 3
test: check $(VENV)/.deepspeed
	$(BIN)/python -m pytest -q -n $(WORKERS) $(ARGS)

check: venv-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, in site/: open site/index.html. Its search needs a server: python3 -m http.server -d site
docs: venv-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)
	@echo "site/index.html"

# A new user's first hour as a script: clone, demo, every command that is printed, two chats of one's own (tests/documentation/first_hour.py).
first-hour: venv-dev
	rm -rf .first-hour
	$(BIN)/python -m tests.documentation.first_hour .first-hour --venv $(VENV) $(ARGS)

# Hostile clients beside a well-behaved stream, on a tiny model or CHECKPOINT (docs/serving.md has the figures).
load: venv-dev
	PYTHONPATH=src $(BIN)/python -m tests.trainer.chat.mixed_load $(CHECKPOINT) $(ARGS)

# Mutated inputs for every importer and for all other readers of files: FUZZ of each (the tests do 2,000 and 20). Then 1,500 damaged and
# forged checkpoints, and 100 times kill -9 of a save, an import, a build and a training that rolls back.
FUZZ ?= 10000
fuzz: venv-dev
	$(BIN)/python -m tests.data.importers.fuzz $(FUZZ) $(ARGS)
	$(BIN)/python -m tests.launcher.fuzz_readers $(FUZZ)
	PYTHONPATH=src $(BIN)/python -m tests.trainer.checkpoint.damages 1500
	PYTHONPATH=src $(BIN)/python -m tests.trainer.checkpoint.kills 100

bench: venv-dev
	$(BIN)/python -m chatmill.kernels.bench $(ARGS)

# What can be known of the kernels without a GPU, for every shipped configuration: dry launches, compiled builds, memory accesses; then
# launches and builds under other versions of triton. Well over an hour of one core; `make test` runs a part of it.
gates: venv-dev
	$(BIN)/python -m chatmill.kernels.gates.dry_launch
	$(BIN)/python -m chatmill.kernels.gates.cross_compile
	$(BIN)/python -m chatmill.kernels.gates.memory_check
	$(BIN)/python -m chatmill.kernels.gates.versions

# All GPU tests, the kernel benchmarks and short trainings, with results as JSON in results/ (or $OUT). Uses the Python that has the
# CUDA torch (GPU_PYTHON) and installs only wheels found in wheels/. Without a GPU it says so and exits 0.
# ARGS="--parts first", then "--parts second": a visit of fifteen minutes (docs/gpu.md); --dry rehearses it. ARGS="--parts tests,bench"
# picks parts.
GPU_PYTHON ?= $(shell if [ -x $(BIN)/python ]; then echo $(BIN)/python; else echo $(PYTHON); fi)
gpu:
	PYTHONPATH=$(CURDIR)/src:$(CURDIR)/.gpu-site $(GPU_PYTHON) tests/gpu_check.py --wheels wheels --site .gpu-site --out $${OUT:-results} $(ARGS)

# What a GPU machine without a network lacks (its image has torch, triton, transformers, tokenizers): copy wheels/ there.
GPU_PYTHON_VERSION ?= 3.12
wheels:
	$(PYTHON) -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
	  --python-version $(GPU_PYTHON_VERSION) --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
	  --platform manylinux2014_x86_64 -d wheels $(PIP_ARGS) -r tests/gpu_wheels.txt
	@du -sh wheels

# venv: what the demo needs. venv-dev: also what lint, types and tests need.
venv: $(VENV)/.ready
venv-dev: $(VENV)/.dev

# torch is the one package without a hash: its build (CPU or CUDA) is the one that your index has, with the CUDA libraries it asks for.
$(VENV)/.ready: pyproject.toml constraints.txt locks/demo.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Chatmill needs Python >= 3.11, this is " + sys.version.split()[0] + "; set PYTHON=python3.12, for example")'
	$(PYTHON) -m venv $(VENV)
	$(LOCKED) -r locks/demo.txt
	$(PIP) torch
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# ttsem names Python 3.12 and runs on 3.11.
$(VENV)/.dev: $(VENV)/.ready locks/dev.txt locks/ttsem.txt
	$(LOCKED) -r locks/dev.txt
	$(LOCKED) --ignore-requires-python -r locks/ttsem.txt
	@touch $@

# DeepSpeed has no wheel: it is built against the installed torch, without its CUDA and C++ extensions.
$(VENV)/.deepspeed: $(VENV)/.dev locks/deepspeed.txt
	DS_BUILD_OPS=0 $(LOCKED) --no-binary=deepspeed --no-build-isolation -r locks/deepspeed.txt
	@touch $@

# Write locks/ anew from pyproject.toml, constraints.txt and locks/unnamed.in, for every platform and Python from 3.11. Versions that are
# locked stay unless these ask for others; ARGS=--upgrade takes the newest of what constraints.txt does not name.
UV = $(BIN)/python -m uv pip compile -q --universal --generate-hashes --no-annotate --custom-compile-command "make lock" -c constraints.txt
LOCK = $(UV) --python-version 3.11 --only-binary :all: --no-binary deepspeed --excludes locks/left-out.txt locks/unnamed.in pyproject.toml
lock: $(VENV)/.ready
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) uv
	$(LOCK) $(ARGS) --extra demo -o locks/demo.txt
	$(LOCK) $(ARGS) --extra dev --extra gpu -c locks/demo.txt --no-emit-package deepspeed --no-emit-package ttsem -o locks/dev.txt
	echo ttsem | $(UV) --python-version 3.12 --no-deps - -o locks/ttsem.txt
	echo deepspeed | $(UV) --python-version 3.11 --no-deps - -o locks/deepspeed.txt

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .gpu-site .first-hour site
