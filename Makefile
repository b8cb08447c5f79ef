# The two commands a newcomer needs are `make demo` and `make test`; each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/.done
	$(BIN)/repedit fetch
	$(BIN)/repedit demo --act both

lint: .venv/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Triton's interpreter must be chosen before triton is imported, so the kernel tests are a process of their own.
test: lint
	$(BIN)/pytest -n 2 --dist worksteal --ignore tests/kernels -m "not slow and not model and not gpu"
	$(BIN)/pytest tests/kernels -m "not slow"

# The tests whose last digits depend on the CPU, under each of its capabilities with 1 and 2 threads.
test-cpus: .venv/.done
	$(BIN)/python -m tests.cpus $(CPUS)

test-all: lint
	$(BIN)/repedit fetch
	$(BIN)/pytest --ignore tests/kernels
	$(BIN)/pytest tests/kernels

# 2,000 damaged files for every reader; about ten minutes.
fuzz: .venv/.done
	REPEDIT_FUZZ_EXAMPLES=2000 $(BIN)/pytest -n 2 tests/test_fuzz.py

# The documentation site in build/site; a broken link, an orphan page or an unknown name is an error.
docs: .venv/.done
	$(BIN)/python -m docs.build

# The tables of docs/families.md: a tiny model of every type of the installed transformers; two minutes.
families: .venv/.done
	$(BIN)/python -m docs.families

# Ratios against others, ten to fifteen minutes; taker alone is not in the dev extra, and is skipped without this folder.
bench: .venv/.done
	$(BIN)/repedit fetch
	test -d .cache/peers/taker || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
		--target .cache/peers taker==1.2.3 welford-torch==0.2.5 || true
	$(BIN)/python -m bench

# Every notebook from top to bottom on the real model, outputs kept; about half an hour.
notebooks: .venv/.done
	$(BIN)/repedit fetch
	$(BIN)/python notebooks/run.py

.PHONY: bench demo docs families fuzz lint notebooks test test-all test-cpus
