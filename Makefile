# Two commands for a stranger: `make demo` and `make test`. Both set up all they need.
# The rest is for those who change trapline; `make help` lists it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
VENV := .venv
RUN := $(VENV)/bin
# The first of these that apt knows is the newest Debian cloud kernel with TDX guest support
# (Debian 12 ships it beside its own 6.1 kernel, Debian 13 as its own kernel).
KERNEL ?= deb:linux-image-6.12-cloud-amd64|linux-image-cloud-amd64
WORKERS ?= $(shell nproc)
# A crashed worker is a failure, and not replaced: with groups, xdist then waits for ever.
PYTEST := $(RUN)/pytest -n $(WORKERS) --max-worker-restart 0

# The other flavours of the same kernel; the debug package of the first unpacks to 7 GB.
FLAVOURS ?= deb:linux-image-6.12-amd64|linux-image-amd64 deb:linux-image-6.12-rt-amd64|linux-image-rt-amd64

.PHONY: $(shell sed -n 's/^## \([a-z-]*\):.*/\1/p' Makefile)

## demo: scan the newest TDX-enabled Debian cloud kernel, boot it, weigh the designs (450 MB once)
demo: $(VENV)/.run
	@$(RUN)/trapline scan '$(KERNEL)' || test $$? -eq 1
	@$(RUN)/trapline boot '$(KERNEL)'
	@$(RUN)/trapline tradeoff '$(KERNEL)' || test $$? -eq 16 # 16: QEMU is not installed

## test: run the whole test suite, with coverage (downloads about 1 GB once)
test: $(VENV)/.dev
	@echo "Tests on real kernels fetch two of Debian's cloud kernels with their debug packages: 700 MB, once."
	@$(PYTEST) -m "not kernel" --cov --cov-report=term
	@$(PYTEST) --dist loadgroup -m kernel

## lint: style, import layers
lint: $(VENV)/.dev
	@$(RUN)/ruff check
	@$(RUN)/ruff format --check
	@$(RUN)/lint-imports

## types: mypy --strict
types: $(VENV)/.dev
	@$(RUN)/mypy

## docs: build the documentation, warnings are errors
docs: $(VENV)/.dev
	@NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --quiet

# Benchmarks that take no kernel, and campaigns that take an hour and have targets of their own.
WITHOUT_KERNEL := benchmarks/engine.py benchmarks/startup.py
CAMPAIGNS := $(patsubst %,benchmarks/%.py,explore_faults explore_kernels kernels verify_faults)

## bench: measure everything that the documentation gives a number for
bench: $(VENV)/.dev
	@for each in $(WITHOUT_KERNEL); do echo "== $$each"; $(RUN)/python $$each; done
	@for each in $(filter-out $(WITHOUT_KERNEL) $(CAMPAIGNS),$(wildcard benchmarks/*.py)); do \
	  echo "== $$each"; $(RUN)/python $$each '$(KERNEL)'; \
	done

## explore-sensitivity: flip bits behind KERNEL's back and count those that explore sees
explore-sensitivity: $(VENV)/.dev
	@$(RUN)/python benchmarks/sensitivity.py '$(KERNEL)'

## explore-faults: plant faults in kernels and count those that explore finds (builds two kernels)
explore-faults: $(VENV)/.dev
	@$(RUN)/python benchmarks/explore_faults.py

## explore-kernels: explore all kernels that trapline is held against (1.4 GB; those that are built)
explore-kernels: $(VENV)/.dev
	@$(RUN)/python benchmarks/explore_kernels.py

## verify-faults: plant 24 faults in a kernel's #VE handler, one at a time, and count those that verify finds
verify-faults: $(VENV)/.dev
	@$(RUN)/python benchmarks/verify_faults.py

## kernels: scan, boot, filter, tradeoff, verify on all kernels that trapline is held against (an hour)
kernels: $(VENV)/.dev
	@$(RUN)/python benchmarks/kernels.py

## flavours: scan, boot, explore, verify the full and real-time kernels (1.4 GB, 14 GB unpacked)
flavours: $(VENV)/.run
	@for each in $(foreach flavour,$(FLAVOURS),'$(flavour)'); do \
	  echo "== $$each"; \
	  $(RUN)/trapline scan "$$each" --format json -o /dev/null || test $$? -eq 1; \
	  $(RUN)/trapline boot "$$each"; \
	  $(RUN)/trapline explore "$$each"; \
	  $(RUN)/trapline verify "$$each" || test $$? -eq 1; \
	done

## kernels-build: build the kernels of kernels/ into the cache (two hours on two cores, once)
kernels-build:
	@for each in $(patsubst kernels/%.config,%,$(filter-out %/base.config,$(wildcard kernels/*.config))); do \
	  tools/build-kernel $$each; \
	done

## hostile: a million damaged inputs, 10,000 guests, 500 kills (an hour on two cores)
hostile: $(VENV)/.dev
	@PYTHONPATH=tests $(RUN)/python -m siege --kernel '$(firstword $(subst |, ,$(KERNEL)))'

## devices: test the drivers that only the full flavour has: 9p, e1000, rtl8139 (1.1 GB download)
devices: $(VENV)/.dev
	@TRAPLINE_FULL_KERNEL='$(firstword $(FLAVOURS))' $(RUN)/pytest tests/machine/qemu -m kernel

## initramfs: test `filter export` in Debian's initramfs with all its modules (no more to download)
initramfs: $(VENV)/.dev
	@TRAPLINE_INITRAMFS=most $(RUN)/pytest tests/devicefilter/test_export_installed.py -m kernel -rs

## lock: resolve pyproject.toml into requirements/*.txt again
lock:
	@tools/lock

## clean: remove what the targets above made in this folder (not the download cache)
clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

## help: this list
help:
	@sed -n 's/^## //p' Makefile

$(VENV)/.run: requirements/run.txt pyproject.toml tools/setup tools/install
	@tools/setup run

$(VENV)/.dev: requirements/dev.txt pyproject.toml tools/setup tools/install
	@tools/setup dev
