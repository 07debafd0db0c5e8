# `make compare` runs the main job, `make test` the tests; each makes .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: compare test check lint types docs claims bench experiment clean

compare: .venv/ready
	$(BIN)/torchdsc run quick $(ARGS)

test: .venv/ready
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

check: lint types docs test

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/ready
	$(BIN)/mypy

# The documentation's site, in runs/site; a link that leads nowhere is an error.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# docs/claims.md, from the committed records.
claims: .venv/ready
	$(BIN)/python experiments/claims.py

bench: .venv/ready
	$(BIN)/torchdsc bench $(ARGS)

# One that is committed (NAME=scaling, glue, ...: `torchdsc presets`), over what is there in experiments/; started twice, two
# processes share the work.
experiment: .venv/ready
	TORCHDSC_DATA=$${TORCHDSC_DATA:-../shared/data} $(BIN)/torchdsc run $(NAME) --output experiments/$(NAME) $(ARGS)

clean:
	rm -rf .venv runs

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
