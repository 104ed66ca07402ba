# make demo   the whole pipeline on a fresh machine: venv, install, then SFT, calibration, DPO against calibrated DPO
# make test   venv, install with [dev], the whole test suite
# make bench  benchmarks against peers
# make lint   ruff and mypy
#
# The wheel of torch that is installed first. Override it to pick another build, for example the CPU build:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
PYTHON ?= python3

# Arguments of the demo: DATA=path or hub name, MODEL=path or hub name, ARGS=anything else, such as --quick.
DATA ?=
MODEL ?=
ARGS ?=
OUT ?= runs/demo

DEMO_VENV := .venv-demo
DEV_VENV := .venv
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)
PACKAGE := $(shell find robust_dpo/ kernels/ -type f -not -name '*.pyc' -not -name '*.so' -not -name '_build.json')

.PHONY: demo test bench lint clean
.DELETE_ON_ERROR:

demo: $(DEMO_VENV)/installed
	$(DEMO_VENV)/bin/robust-dpo demo $(if $(DATA),--data "$(DATA)") $(if $(MODEL),--model "$(MODEL)") --out "$(OUT)" $(ARGS)

test: $(DEV_VENV)/installed
	$(DEV_VENV)/bin/python -m pytest $(ARGS)

bench: $(DEV_VENV)/bench
	$(DEV_VENV)/bin/python -m pytest benchmarks --benchmark-only $(ARGS)

lint: $(DEV_VENV)/installed
	$(DEV_VENV)/bin/ruff check .
	$(DEV_VENV)/bin/ruff format --check .
	$(DEV_VENV)/bin/mypy

clean:
	rm -rf $(DEMO_VENV) $(DEV_VENV) build

%/torch:
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet $(TORCH)
	touch $@

$(DEMO_VENV)/installed: $(DEMO_VENV)/torch $(SOURCES) $(PACKAGE)
	$(DEMO_VENV)/bin/python -m pip install --quiet .
	touch $@

$(DEV_VENV)/installed: $(DEV_VENV)/torch $(SOURCES)
	$(DEV_VENV)/bin/python -m pip install --quiet -e ".[dev]"
	touch $@

$(DEV_VENV)/bench: $(DEV_VENV)/installed
	$(DEV_VENV)/bin/python -m pip install --quiet -e ".[bench]"
	touch $@
