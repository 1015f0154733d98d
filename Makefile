# `make test`, `make docs`, `make demo` and `make learn` set up everything from nothing: virtual environment, pinned PyTorch, package, extras.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: test test-fast lint docs demo learn clean

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Without the tests that take longest, for work in between.
test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror src/titans_lm/ops/cpu/csrc/*

# The documentation's site, into site/: open site/index.html. NO_MKDOCS_2_WARNING silences a notice about another program.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

demo: $(READY)
	$(BIN)/titans demo

learn: $(READY)
	$(BIN)/titans learn

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
