# make              help
# make demo         the whole job on this machine, offline
# make TARGET       the whole job for targets/TARGET.yaml

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TARGETS := $(sort $(basename $(notdir $(wildcard targets/*.yaml))))
# only what was typed counts: HOST, MODEL or SEED may stand in somebody's environment
typed = $(if $(findstring command,$(origin $(1))),$($(1)))
given = $(if $(typed),$(2) '$(typed)')
OPTIONS = $(call given,HOST,--host) $(call given,HOSTS,--hosts) $(call given,GROUP,--group) $(call given,DATA,--data) $(call given,MODEL,--model) \
          $(call given,PROFILE,--profile) $(call given,FLOPS,--flops) $(call given,PRECISION,--precision) \
          $(call given,SEED,--seed) $(if $(filter-out 0,$(call typed,FAST)),--fast) $(call given,GPUS,--gpus) $(call typed,ARGS)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-containers test-arm64 lint containers clean $(TARGETS)

help:
	@echo 'make demo      the whole job on this machine, offline: train, prune, build, deliver, measure, judge'
	@echo 'make test      run the tests'
	@echo 'make test-containers, make test-arm64   the tests that need root, dockerd and debootstrap; qemu for arm64'
	@echo 'make containers   build every container image that this host can'
	@echo 'make lint      ruff and mypy'
	@echo 'make install   make .venv and install the toolkit into it'
	@echo 'make clean     remove .venv and build'
	@echo
	@echo 'make TARGET    the whole job for a target: $(TARGETS)'
	@echo '               with DATA=imagefolder:PATH MODEL=resnet20 PROFILE= FLOPS=60M PRECISION=int8 SEED= FAST=1 GPUS=all HOST= HOSTS= GROUP= ARGS='

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo 'error: $(PYTHON) is not Python 3.10 to 3.13; name one: make PYTHON=python3.11' >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo 'error: no virtual environment can be made; on Debian: apt-get install python3-venv' >&2; exit 2; }
	@echo 'installing into $(VENV): PyTorch and its libraries are several gigabytes, this takes a few minutes'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[depgraph,dev,openvino,ray,rtx]'
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > $(VENV)/compileall.log || true  # as pip does, but on every core
	@touch $@

demo: install
	@$(BIN)/toolkit run host-cpu --data digits

# a worker a core; threads that wait for each other by spinning would slow the others down
test: install
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(call typed,ARGS)

test-containers: install
	@$(BIN)/python -m pytest -m containers $(call typed,ARGS)

test-arm64: install
	@$(BIN)/python -m pytest -m arm64 $(call typed,ARGS)

containers: install
	@$(BIN)/toolkit containers build

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build

$(TARGETS): install
	@$(BIN)/toolkit run $@ $(OPTIONS)
