# The two commands a newcomer needs are `make demo` and `make test`; each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/.done
	$(BIN)/repedit fetch
	$(BIN)/repedit demo

lint: .venv/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n 2 -m "not slow and not model and not gpu"

test-all: lint
	$(BIN)/repedit fetch
	$(BIN)/pytest

.PHONY: demo lint test test-all
