# make demo     the whole pipeline on a fresh machine: venv, install, then SFT, calibration, DPO against calibrated DPO
# make test     venv, install with [dev], the whole test suite, in a process for each core
# make kernels  compile every Triton kernel in every form for every chip; no GPU is needed
# make other-torch  a venv with another torch, for the test that one wheel serves both (gigabytes)
# make deepspeed  the tests of DeepSpeed, which is no dependency, on CPUs
# make bench    benchmarks against peers
# make lint     ruff and mypy
#
# The wheel of torch that is installed first; override it to pick another build: make demo TORCH="torch==2.13.0+cpu"
TORCH ?= torch==2.13.0
PYTHON ?= python3
# Another version of torch, for `make other-torch`.
OTHER_TORCH ?= torch==2.14.1

# Arguments of the demo: DATA=path or hub name, MODEL=path or hub name, ARGS=anything else, such as --quick.
DATA ?=
MODEL ?=
ARGS ?=
OUT ?= runs/demo

VENV := .venv
SOURCES := pyproject.toml setup.py $(wildcard build_support/*.py csrc/*)
PACKAGE := $(shell find robust_dpo/ kernels/ -type f -not -name '*.pyc' -not -name '*.so' -not -name '_build.json')

.PHONY: demo test kernels other-torch deepspeed bench lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(VENV)/bin/robust-dpo demo $(if $(DATA),--data "$(DATA)") $(if $(MODEL),--model "$(MODEL)") --out "$(OUT)" $(ARGS)

test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

kernels: $(VENV)/dev
	$(VENV)/bin/python benchmarks/kernel_report.py

# Never at the cost of a full disk: without room it says so and fails, and what a failed install leaves is removed.
other-torch:
	@$(PYTHON) -c "import shutil, sys; free = shutil.disk_usage('.').free >> 30; \
	    sys.exit(f'other-torch: needs 20 GiB of free disk, {free} GiB are left' if free < 20 else 0)"
	$(PYTHON) -m venv $(VENV)-other
	$(VENV)-other/bin/python -m pip install --quiet "$(OTHER_TORCH)" numpy || { rm -rf $(VENV)-other; exit 1; }
	echo "$(CURDIR)/$(VENV)-other/bin/python" > $(VENV)-other/python

deepspeed: $(VENV)-deepspeed/installed
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(VENV)-deepspeed/bin/python -m pytest -n auto --dist loadfile -k "zero or not_finite" \
	    tests/test_trainer/test_ranks.py tests/test_faults/test_deepspeed.py tests/test_faults/test_killed_ranks.py

bench: $(VENV)/bench
	$(VENV)/bin/python -m pytest benchmarks --benchmark-only $(ARGS)

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(VENV)-other $(VENV)-deepspeed build

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	touch $@

# The tree itself is installed where `make test` came first; a plain install would replace it by a copy.
$(VENV)/installed: $(VENV)/torch $(SOURCES) $(PACKAGE)
	test -f $(VENV)/dev || $(VENV)/bin/python -m pip install --quiet .
	touch $@

$(VENV)/dev: $(VENV)/torch $(SOURCES)
	$(VENV)/bin/python -m pip install --quiet -e ".[dev]"
	touch $@

# It sees the packages of the first venv, and the tests there do not see it.
$(VENV)-deepspeed/installed: $(VENV)/dev
	$(PYTHON) -m venv $(VENV)-deepspeed
	site="import sysconfig; print(sysconfig.get_path('purelib'))"; \
	    $(VENV)/bin/python -c "$$site" > "$$($(VENV)-deepspeed/bin/python -c "$$site")/first-venv.pth"
	DS_BUILD_OPS=0 $(VENV)-deepspeed/bin/python -m pip install --quiet --no-build-isolation "deepspeed==0.19.*"
	touch $@

$(VENV)/bench: $(VENV)/dev
	$(VENV)/bin/python -m pip install --quiet -e ".[bench]"
	touch $@
