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

# Triton's interpreter must be chosen before triton is imported, so the kernel tests are a process of their own.
test: lint
	$(BIN)/pytest -n 2 --ignore tests/kernels -m "not slow and not model and not gpu"
	$(BIN)/pytest tests/kernels -m "not slow"

test-all: lint
	$(BIN)/repedit fetch
	$(BIN)/pytest --ignore tests/kernels
	$(BIN)/pytest tests/kernels

.PHONY: bench demo docs lint test test-all
