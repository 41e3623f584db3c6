# The commands of this repository; `make` alone explains them. Needs GNU make 3.81 or newer.
SHELL := /bin/sh
.DEFAULT_GOAL := help
# `make -j reproduce` must not draw figures before the runs are done; the runs themselves use
# every core through worker processes of their own.
.NOTPARALLEL:
.SUFFIXES:

PROFILE ?= quick
ARGS ?=
CONDA ?= $(firstword $(foreach tool,micromamba mamba conda,$(shell command -v $(tool) 2>/dev/null)))

export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifdef PYTHON
BUILD := check-python
else
ifneq ($(strip $(CONDA)),)
PREFIX := .venv-conda
BUILD := build-conda
else
PREFIX := .venv
BUILD := build-venv
endif
PYTHON := $(PREFIX)/bin/python
# Packages in the user's home must not shadow the pinned ones.
export PYTHONNOUSERSITE := 1
export PATH := $(CURDIR)/$(PREFIX)/bin:$(PATH)
# The environment.yml that the environment was built from; written last, so that it is there only
# after a complete installation.
READY := $(PREFIX)/environment.yml
endif

# Prints the pip section of environment.yml, one requirement per line.
REQUIREMENTS := awk '/^  - pip:/ {pip = 1; next} pip && /^      - / {print $$2}'

# `from lib import Masking` in any folder: the package as it stands here.
EDITABLE := $(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .

PHONY := help env requirements runs notebooks figures report verdict reproduce compare status test lint \
	format bench lab clean check-python build-venv build-conda
.PHONY: $(PHONY)

##@ Reproduce
reproduce: env runs $(if $(RESULTS),compare,notebooks report) ## everything: environment, runs, notebooks, report with figures and verdicts

env: ## create or update the environment from environment.yml (instant when it is up to date)
ifdef READY
	@if cmp -s environment.yml $(READY) && $(PYTHON) -c '' 2>/dev/null; then :; \
	else $(MAKE) --no-print-directory $(BUILD); fi
else
	@$(MAKE) --no-print-directory $(BUILD)
endif

runs: env ## train what is missing of PROFILE
	$(PYTHON) -m lib run all --profile $(PROFILE) $(if $(RESULTS),--results $(RESULTS))

notebooks: env ## execute the notebooks into results/PROFILE/notebooks
	$(PYTHON) -m lib notebooks --profile $(PROFILE)

figures: env ## redraw every figure from the rows, at the largest scale that has some
	$(PYTHON) -m lib figures

report: env ## bind the notebooks to figures/report.pdf and .html, with every figure and verdict
	$(PYTHON) -m lib report

verdict: env ## judge each claim by the rows: verdict, difference with interval and n
	$(PYTHON) -m lib verdict

compare: env ## set the rows in RESULTS beside the committed ones, cell by cell
	$(PYTHON) -m lib compare --profile $(PROFILE) --results $(RESULTS)

status: env ## say what is done, what is missing and how long the rest takes
	$(PYTHON) -m lib status --profile $(PROFILE)

##@ Develop
test: env ## run the tests (ARGS="-k data" passes options to pytest)
	$(PYTHON) -m pytest -n auto --dist loadfile $(ARGS)

lint: env ## check format and style with ruff and the types of lib/ with mypy
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

format: env ## format the code and repair what ruff can repair
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m lib.lab

bench: env ## measure the training speed against a conventional DataLoader script
	$(PYTHON) -m lib bench

soak: env ## kill runs, workers and writers again and again, into results/bench/soak.csv
	$(PYTHON) -m tests.soak --write $(ARGS)

lab: env ## open the notebooks in JupyterLab; saving one keeps it as it is committed, without outputs
	$(PYTHON) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks \
		--ContentsManager.pre_save_hook=lib.lab.without_outputs \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

requirements: ## print the pip requirements of environment.yml
	@$(REQUIREMENTS) environment.yml

clean: ## remove caches and build folders (results, data and environment stay)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build
	find lib tests notebooks -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) \
		-prune -exec rm -rf {} +

help: ## explain the targets (default)
	@echo 'usage: make TARGET [PROFILE=smoke|quick|hours|paper]   (PROFILE is $(PROFILE))'
	@awk '/^##@ / {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z]+:.*## / {name = $$0; sub(/:.*/, "", name); sub(/.*## /, ""); \
		printf "  %-13s %s\n", name, $$0}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo 'Variables'
	@echo '  DATA_ROOT     folder of MNIST and CIFAR-10 (data/; downloaded when absent)'
	@echo '  RESULTS       make reproduce trains all anew into it and compares with the committed rows (smoke has none)'
	@echo '  PYTHON        use this interpreter and create no environment'
	@echo '  CONDA         conda, mamba or micromamba to use; empty for .venv and pip'

# How the environment comes about; `make env` calls one of these when something changed.
check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'PYTHON=$(PYTHON) does not run or is older than Python 3.11; give another one or leave PYTHON out.' >&2; \
		exit 1; }

build-venv:
	@rm -f $(READY); $(PYTHON) -m pip --version >/dev/null 2>&1 || rm -rf $(PREFIX)
	@test -d $(PREFIX) && exit 0; \
	for name in python3 python3.12 python3.13 python3.11; do \
		if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			exec $$name -m venv $(PREFIX); fi; done; \
	echo "Python 3.11 or newer is needed, but python3 is $$(python3 --version 2>&1 | head -n 1); install Python 3.12 (or conda) and run make again." >&2; \
	exit 1
	@cp environment.yml $(READY).part
	@$(REQUIREMENTS) $(READY).part > $(PREFIX)/requirements.txt
	@test -s $(PREFIX)/requirements.txt || { \
		echo 'environment.yml has no pip section that the Makefile can read.' >&2; exit 1; }
	@echo 'Installing the packages of environment.yml into $(PREFIX) (5.8 GB on Linux, about 2 minutes) ...'
	@$(PYTHON) -m pip install --quiet --requirement $(PREFIX)/requirements.txt || { \
		echo 'The installation into $(PREFIX) is not complete (message above); "make env" continues it.' >&2; \
		exit 1; }
	@$(EDITABLE)
	@mv $(READY).part $(READY)
	@echo 'Environment ready: $(PREFIX)'

# Created anew each time: the three tools differ in how they update, not in how they create.
build-conda:
	@echo 'Creating $(PREFIX) from environment.yml with $(CONDA) (5.8 GB on Linux, some minutes) ...'
	@rm -rf $(PREFIX)
	@case '$(notdir $(CONDA))' in micromamba*) verb=create ;; *) verb='env create' ;; esac; \
	CONDA_ALWAYS_YES=true MAMBA_ALWAYS_YES=true \
		'$(CONDA)' $$verb --prefix '$(CURDIR)/$(PREFIX)' --file environment.yml || { \
		echo 'The environment $(PREFIX) is not complete (message above); "make env" tries again, "make env CONDA=" uses pip instead.' >&2; \
		exit 1; }
	@$(EDITABLE)
	@cp environment.yml $(READY).part && mv $(READY).part $(READY)
	@echo 'Environment ready: $(PREFIX)'
