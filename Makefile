.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: .venv/installed  ## make .venv with the pinned versions

run: setup  ## run the pipeline: what is done already is skipped
	$(BIN)/python -m stages repro

test: setup  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

demo: setup  ## start, kill -9, run again, compare hashes
	tools/kill_demo.sh

NAME ?= digits
example: setup  ## NAME=digits (or regression, multi_label): run an example in examples/build/
	$(BIN)/python examples/run.py $(NAME)

KILLS ?= 100
SEED ?= 0
storm: setup  ## KILLS=100 SEED=0: kill whole runs at random times and compare every byte
	$(BIN)/python tools/storm.py --kills $(KILLS) --seed $(SEED)

bound: setup  ## kill slow stages every few seconds and count the starts that they need
	$(BIN)/python tools/bound.py

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove .venv and caches; runs, models and data stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

.PHONY: help setup run test demo example storm bound lint clean
