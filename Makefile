# PYTHON creates the virtual environment in VENV.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check docs clean

quickstart: $(VENV)/quickstart
	$(BIN)/llm2clip quickstart --out runs/quickstart

test: $(VENV)/ready
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@report=$$($(BIN)/lint-imports) || { echo "$$report"; exit 1; }

docs: $(VENV)/ready
	$(BIN)/mkdocs build --quiet

$(VENV)/quickstart: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar off -e '.[quickstart]'
	touch $@

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar off -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
