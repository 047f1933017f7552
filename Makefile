# Each target does all of its own set-up: a virtual environment in .venv with pinned dependencies.
PYTHON ?= python3
BIN := .venv/bin
# torch comes first and by its exact version: asked for by a range, pip may choose a build with gigabytes of CUDA.
READY := .venv/.ready

.PHONY: sweep test chaos check lint types clean

sweep: $(READY)
	$(BIN)/aqn-tune run experiments/quick_sweep.yaml

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# Forty drivers killed at random moments, each study continued and compared: a quarter of an hour.
chaos: $(READY)
	$(BIN)/python tests/chaos.py

check: lint types

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
