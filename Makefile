# SPDX-License-Identifier: Apache-2.0
# The only entry points, for people and for CI. `make` alone lists them.

# Variables, each set as `make TARGET NAME=value`:
#   PYTHON       interpreter that .venv is made with: 3.11, 3.12 or 3.13. Empty: the first of these that is found.
#   GPU          1: use the CUDA device and run its tests too. Empty: everything runs on the CPU, alike on all machines.
#   TORCH_INDEX  URL of another wheel index for torch alone, such as that of its CPU build (half a gigabyte instead of
#                several; pytorch.org, "Get Started", shows the URL). Empty: pip's own. Read when .venv is made.
#   BUNDLE       name of a folder of bundles/, for pack, standalone, smoke and results. Empty: all (not for results).
#   DATA         folder with the data of `make results`: datalist.json, or images/, labels/ and splits.json
#   WORKERS      trainings that `make results` runs at once, sharing the cores
#   ROW          id of the only row of the recipe that `make results` does. Empty: all rows of DATA.
#   SEARCH       1: `make results` tries the recipe's other configurations, on validation only
#   FINISHED     1: `make results` trains nothing and writes what is finished so far
#   TEACHER      1: pack the teacher's weights too
#   PYTEST_ARGS  passed on to pytest, such as PYTEST_ARGS="-k affinity" or PYTEST_ARGS="-m slow"
#   CONSTRAINTS  file of exact versions. CONSTRAINTS= takes the newest that setup.cfg allows. Read when .venv is made.
PYTHON      ?= $(call find_python)
GPU         ?=
TORCH_INDEX ?=
BUNDLE      ?=
TEACHER     ?=
DATA        ?=
WORKERS     ?= 2
ROW         ?=
SEARCH      ?=
PYTEST_ARGS ?=
CONSTRAINTS ?= constraints.txt

VENV   := .venv
READY  := $(VENV)/.ready
BEGUN  := $(VENV)/.unfinished
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip --disable-pip-version-check install $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
ON_CPU := $(if $(GPU),,CUDA_VISIBLE_DEVICES=)
CHOSEN := $(if $(BUNDLE),--bundle $(BUNDLE))

find_python = $(shell for name in python3.11 python3 python3.12 python3.13; do \
	$$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null \
	&& echo $$name && break; done)

.DEFAULT_GOAL := help
.PHONY: help demo test check bench smoke results pack standalone venv clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "Variables, such as GPU=1 and TORCH_INDEX=URL, are explained at the top of the Makefile."

demo: $(READY)  ## phantom data, teacher, student alone, distilled student, and a report with pictures
	$(ON_CPU) $(RUN) -m lab.demo

test: $(READY)  ## all tests in two processes, each bundle in its own; PYTEST_ARGS goes to pytest, such as -n0
	@{ $(tree_state); } > $(VENV)/.tree
	$(ON_CPU) $(RUN) -m pytest tests -n 2 --dist loadfile $(if $(GPU),-m "not slow") $(PYTEST_ARGS)
	@$(tree_check)

check: $(READY)  ## ruff, mypy, canonical JSON, plumbing of the bundles, config rules, layering; a minute
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(RUN) ci/format_json.py --check
	$(RUN) ci/sync_bundles.py --check
	$(RUN) ci/lint_configs.py
	$(RUN) -m pytest -q tests/test_layering.py

results: $(READY)  ## train and compare all arms of BUNDLE on DATA: results/BUNDLE.json, figure, README tables; hours
	@[ -n "$(BUNDLE)" ] && [ -n "$(DATA)" ] || { echo "make results needs BUNDLE=name and DATA=folder"; exit 1; }
	$(ON_CPU) $(RUN) -m lab.results $(BUNDLE) "$(DATA)" --workers $(WORKERS) $(if $(ROW),--row "$(ROW)") $(if $(SEARCH),--search) $(if $(FINISHED),--finished)

bench: $(READY)  ## speed and memory against peers, written to bench/*.json
	$(ON_CPU) $(RUN) -m lab.bench

smoke: $(READY)  ## every bundle in seconds: phantom data, teacher, distillation, inference, on a copy; BUNDLE names one
	$(ON_CPU) $(RUN) -m lab.smoke $(CHOSEN)

pack: $(READY)  ## bundles as zips in dist/ that need no medkd; BUNDLE names one, TEACHER=1 adds the teacher
	$(RUN) ci/pack_bundle.py $(CHOSEN) $(if $(TEACHER),--teacher)

standalone: $(READY)  ## packed bundles in a new environment, without this repository: train, evaluate, infer, export
	$(ON_CPU) $(RUN) ci/standalone.py $(CHOSEN) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

venv: $(READY)

clean:  ## remove .venv, caches, builds and the demo's output; runs and weights stay
	rm -rf $(VENV) build dist common/*.egg-info .mypy_cache .pytest_cache .ruff_cache demo/output demo/report.html
	find ci common bundles lab tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# .venv is made once, and brought up to date when what it is made from changes. BEGUN stays behind when that was
# interrupted, as pip may then have left half a package: the next call starts afresh, from pip's cache of downloads.
$(READY): setup.cfg pyproject.toml constraints.txt
	@$(check_python)
	@if [ -e $(BEGUN) ]; then echo "Set-up was interrupted; $(VENV) is made afresh."; rm -rf $(VENV); fi
	@rm -f $(READY); mkdir -p $(VENV); touch $(BEGUN)
	@echo "[1/3] $(VENV) with $(PYTHON)"
	@[ -x $(RUN) ] || $(PYTHON) -m venv $(VENV)
	@echo "[2/3] torch (the large one)"
	$(PIP) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo "[3/3] medkd and all else"
	$(PIP) -e ".[dev]"
	@rm $(BEGUN); touch $(READY)

define check_python
if [ -z "$(PYTHON)" ]; then \
	echo "PYTHON must be CPython 3.11, 3.12 or 3.13, and none was found; install one (Debian 12:" \
	     "apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3.12"; exit 1; fi; \
$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
	echo "PYTHON must be CPython 3.11, 3.12 or 3.13, got $(PYTHON), $$($(PYTHON) --version 2>&1);" \
	     "name another: make PYTHON=/path/to/python3.12"; exit 1; }; \
$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "PYTHON must have the venv module, and $(PYTHON) has none; install it: apt install python3-venv"; exit 1; }
endef

# Under CI the tests must leave the tree as they found it.
tree_state = git status --porcelain 2>/dev/null; git diff 2>/dev/null | cksum
define tree_check
if [ -n "$$CI" ] && ! { $(tree_state); } | cmp -s - $(VENV)/.tree; then \
	git status --short; echo "The tests changed the tree (above); let them work on copies."; exit 1; fi
endef
