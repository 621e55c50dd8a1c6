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

.PHONY: demo test lint types docs bench lock help clean

## demo: scan the newest TDX-enabled Debian cloud kernel (downloads about 450 MB once)
demo: $(VENV)/.run
	@$(RUN)/trapline scan '$(KERNEL)' || test $$? -eq 1

## test: run the whole test suite (downloads about 600 MB once)
test: $(VENV)/.dev
	@$(RUN)/pytest -n $(WORKERS) --dist loadgroup

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

## lock: resolve pyproject.toml into requirements/*.txt again
lock:
	@tools/lock

## clean: remove what the targets above made in this folder (not the download cache)
clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

## help: this list
help:
	@sed -n 's/^## //p' Makefile

$(VENV)/.run: requirements/run.txt pyproject.toml tools/setup
	@tools/setup run

$(VENV)/.dev: requirements/dev.txt pyproject.toml tools/setup
	@tools/setup dev
