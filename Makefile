# Everything a fresh clone needs: `make demo` trains, `make test` tests. Needs make and Python >= 3.11
# only; what else is used is installed into .venv, in the versions of constraints.txt.
#
#     make demo ARGS='--workdir runs/longer --config.train.steps=2000'
#     make test WORKERS=4 ARGS='tests/train -k resume'
#     make demo-generate        a text-to-image model, trained from scratch
#     make demo-words           captions and answers about scenes, from the packaged CLIP
#     make demo-features        MAE, DINO, supervised and untrained features, in one table
#     make test-slow                              make test EXTRAS=demo,dev,parity
#     make docs                 the documentation site, in build/site
#     make lint    make format    make types    make clean    (PYTHON=/path/to/python3.12 picks another Python)

SHELL := /bin/bash
comma := ,

# The first Python here that is new enough and can make a virtual environment.
usable = $(1) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.13; do \
  $(call usable,$$python) && { echo $$python; break; }; done)

WORKERS ?= 2
ARGS ?=
EXTRAS ?= demo,dev

BIN := .venv/bin
# XLA on the CPU asks for large buffers again and again: glibc should keep them, not return them to the system.
MALLOC := GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:glibc.malloc.arena_max=1
FMCV := $(MALLOC) $(BIN)/python -m fmcv_jax
stamps = $(addprefix .venv/.installed-,$(subst $(comma), ,$(1)))
TEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: help demo demo-words demo-generate demo-features test test-slow docs lint format types clean
.NOTPARALLEL:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(call stamps,demo)
	$(FMCV) demo --workdir runs/demo --cpu-devices 8 $(ARGS)

# A language model of scenes, and the same without images; then the table.
demo-words: $(call stamps,demo)
	$(FMCV) demo words --workdir runs/words --cpu-devices 2 $(ARGS)

# An autoencoder and a diffusion model of its latents, conditioned on the demo's text encoder; then a grid of samples.
demo-generate: demo
	$(FMCV) train --config configs/demo/autoencoder.py --workdir runs/autoencoder --cpu-devices 8
	$(FMCV) train --config configs/demo/text_to_image.py --workdir runs/generator --cpu-devices 8
	$(FMCV) gallery --model runs/generator --feature-extractor runs/demo --cpu-devices 2

# The same network trained with and without labels; then the table.
METHODS := untrained mae dino supervised mae_tuned dino_tuned
demo-features: $(call stamps,demo)
	for method in $(METHODS); do \
	  $(FMCV) train --config configs/demo/features.py:$$method --workdir runs/features/$$method $(ARGS) || exit; done
	$(FMCV) evaluate --workdir $(addprefix runs/features/,$(METHODS))

test: $(call stamps,$(EXTRAS))
	$(TEST) $(ARGS)

test-slow: $(call stamps,$(EXTRAS))
	$(TEST) -m slow $(ARGS)

lint: $(call stamps,$(EXTRAS))
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python tools/check_text.py

docs: $(call stamps,docs)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'The site is in build/site: open build/site/index.html'

format: $(call stamps,$(EXTRAS))
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(call stamps,$(EXTRAS))
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment: one stamp for each extra, renewed when what it was made from changes

.venv/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing fmcv_jax with [$*] into .venv (the first time takes a few minutes)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

$(BIN)/python:
	@$(call usable,$(or $(PYTHON),false)) || { \
	  echo 'fmcv_jax needs Python 3.11 or later, with its venv module; python3 here is' \
	    "$$(python3 --version 2>&1 || true)." >&2; \
	  echo 'Install one (on Debian and Ubuntu: apt install python3 python3-venv), or name one:' \
	    'make PYTHON=/path/to/python3.12 ...' >&2; \
	  exit 1; }
	@$(PYTHON) -m venv --clear .venv
