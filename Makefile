# Every target sets up what it needs: on a machine with Python >= 3.11 and make, `make quickstart` is all there is to type.

VENV ?= .venv
PY := $(VENV)/bin/python
QUICKSTART ?= configs/quickstart.yaml
export VENV

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow lint format bench soak doctor audit lock clean

help:  ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## create the virtual environment and convert the default teacher (quick when nothing changed)
	@bash scripts/setup.sh

quickstart: setup  ## train a student end to end: minutes, no GPU, no download of a model
	@$(PY) -m onpolicy.train --config $(QUICKSTART) --resume

test: setup  ## the tests that CI runs
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m "not slow and not gpu"

test-slow: setup  ## the slow tests: real models, whole runs, processes that are killed
	@$(PY) -m pytest -q -m "slow and not gpu"

lint: setup  ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: setup  ## let ruff format and sort
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: setup  ## one training step of ours beside TRL's
	@$(PY) -m benchmarks.train_step

soak: setup  ## half an hour of everything clients do to a server, with the quickstart's student
	@SERVE_SOAK_SECONDS=1800 SERVE_SOAK_JSON=benchmarks/results/soak.json \
	    $(PY) -m pytest -q -s tests/slow/test_serve_real.py -k soak

doctor: setup  ## examine the quickstart's configuration before a run
	@$(PY) -m onpolicy.doctor --config $(QUICKSTART)

audit: setup  ## is every engine installed here distributed as its target? (exact, then by its text; minutes)
	@$(PY) -m spec.audit.everything "$$($(PY) -m onpolicy.teachers.convert)"

lock:  ## resolve the newest compatible versions into requirements/cpu.lock
	@bash scripts/lock.sh

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
