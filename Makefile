# make demo   distil digits and print the accuracy table
# make test   the tests that fit in five minutes
# make help   everything else

PYTHON ?= python3
BIN := .venv/bin
CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; run make PYTHON=python3.12")'

.PHONY: demo test test-all test-oldest lint format bench examples docs clean help

demo: .venv/installed
	$(BIN)/python -m dd.train --gin_file=gin/digits.gin

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-all: .venv/installed
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -n auto

# The wheel's tests run every command.
test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n auto -m "not slow" tests/bilevel tests/test_wheel.py

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/installed
	$(BIN)/pip install --quiet -e '.[benchmark]'
	$(BIN)/pip install --quiet --no-deps 'boat-torch>=1.1.1,<2'
	$(BIN)/python benchmarks/hypergradient.py --windows 10 40 --repeats 2 --methods compiled --json runs/bench/hypergradient.json
	$(BIN)/python benchmarks/memory.py --threads 1 --json runs/bench/memory.json
	$(BIN)/python benchmarks/inner_loops.py --short --json runs/bench/inner_loops.json
	$(BIN)/python benchmarks/referee.py --short --json runs/bench/referee.json

examples: .venv/installed
	@for example in examples/*.py; do \
		echo; echo "$$example"; $(BIN)/python $$example || exit 1; \
	done

docs: .venv/installed
	$(BIN)/pip install --quiet -e '.[docs]'
	$(BIN)/mkdocs build --strict

.venv/installed: pyproject.toml
	$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --progress-bar on -e '.[dev]'
	touch $@

.venv-oldest/installed: pyproject.toml .ci/oldest.py
	$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) .ci/oldest.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --progress-bar on -c .venv-oldest/constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-oldest site .pytest_cache .mypy_cache .ruff_cache .hypothesis

help:
	@echo "make demo      distil digits into one image per class and print the accuracy table"
	@echo "make test      run the tests that fit in five minutes"
	@echo "make test-all  run every test, with more hypothesis examples"
	@echo "make test-oldest  test bilevel and the commands with the oldest dependencies allowed"
	@echo "make lint      check format, style, types and imports"
	@echo "make format    format and fix what can be fixed"
	@echo "make bench     measure hypergradients against higher, memory against its model and small inner loops"
	@echo "make examples  run the seven worked examples and print their tables"
	@echo "make docs      build the documentation in site/, warnings as errors"
	@echo "make clean     remove both environments and caches"
