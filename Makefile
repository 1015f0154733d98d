# `make test`, `make docs`, `make demo` and `make learn` set up everything from nothing: virtual environment, pinned PyTorch, package, extras.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: test test-all test-fast lint docs demo learn gpu gpu-wheels clean

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not exhaustive"

# With the tests that look at one more form of what others look at: before a release.
test-all: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Without the tests that take longest, for work in between.
test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not (slow or exhaustive)"

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

# Checks and measures this machine's GPU (docs/gpu.md), with the PyTorch that $(PYTHON) has. `make gpu DEVICE=cpu` tries the script
# at toy sizes without one. No virtual environment: one made from another would not see that one's packages.
DEVICE ?= cuda
MINUTES ?= 12
GPU_FLAGS ?= $(if $(filter cpu,$(DEVICE)),--toy)
WHEELS := .cache/wheels
SITE := .cache/site
gpu:
	if ls $(WHEELS)/*.whl >/dev/null 2>&1; then \
	  $(PYTHON) -m pip install -q --no-index --no-deps --no-compile --upgrade --target $(SITE) $(WHEELS)/*.whl; fi
	PYTHONPATH=src:$(SITE) $(PYTHON) -m titans_lm.cli bench gpu --device $(DEVICE) --minutes $(MINUTES) $(GPU_FLAGS)

gpu-wheels:
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: -r requirements-gpu.txt -d $(WHEELS)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
