# `make compare` runs the main job, `make test` the tests; each makes .venv first.
PYTHON ?= python3
PRESET ?= stories
BIN := .venv/bin

.PHONY: compare test check lint types bench adapt clean

compare: .venv/ready
	$(BIN)/torchdsc compare --preset quick $(ARGS)

test: .venv/ready
	$(BIN)/python -m pytest $(ARGS)

check: lint types test

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/ready
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/torchdsc bench $(ARGS)

# A study of adapters: PRESET=glue, glue-levers or stories; started twice, two processes share the work.
adapt: .venv/ready
	TORCHDSC_DATA=$${TORCHDSC_DATA:-../shared/data} $(BIN)/torchdsc adapt --preset $(PRESET) \
	    --output experiments/adapt/$(PRESET) $(ARGS)

clean:
	rm -rf .venv runs

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
