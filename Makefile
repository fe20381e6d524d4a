# Every target makes .venv when it is not there; uv installs when it is at hand, pip otherwise.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
OUT ?= demo
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --durations=15
INSTALL := $(if $(shell command -v uv),uv pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet)

.PHONY: demo test long scverse lint check campaign bench docs dist lock clean

demo: $(STAMP)
	$(BIN)/eosin demo --out $(OUT)

test: $(STAMP)
	$(PYTEST) -m 'not (long or slurm or slow or gpu or scverse)'

# tests of several seconds each: processes that are killed, clusters, the whole way with other options
long: $(STAMP)
	$(PYTEST) -m '(long or slurm) and not (slow or gpu)'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# AnnData and SpatialData hold pandas back, so they are read in an environment of their own
scverse:
	test -x .venv-scverse/bin/python || $(PYTHON) -m venv .venv-scverse
	$(subst $(BIN),.venv-scverse/bin,$(INSTALL)) -e '.[report,spatialdata]' pytest
	OMP_NUM_THREADS=1 .venv-scverse/bin/python -m pytest -m scverse -W default tests/pipeline/test_scverse.py

check: lint test long

# the long rows of docs/reliability.md; hours on two cores, minutes with EOSIN_CAMPAIGN=0.02
campaign: $(STAMP)
	tests/campaign.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/test_reliability.py tests/test_mutants.py tests/cli/test_signals.py \
	    tests/features/test_faults.py tests/features/test_store.py tests/wsi/test_fuzz.py tests/wsi/test_job.py \
	    tests/mil/test_kill.py tests/mil/test_splits.py tests/mil/test_convert_authors.py
	$(BIN)/python tests/mutants.py
	$(BIN)/python benchmarks/all_files.py --slides $(if $(EOSIN_CAMPAIGN),50 200,100 1000 20000)

bench: $(STAMP)
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

docs: $(STAMP)
	$(INSTALL) -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict

# what a release consists of: wheel, source archive and the list of its parts (CycloneDX)
dist: $(STAMP)
	$(INSTALL) -e '.[release]'
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/cyclonedx-py requirements release/requirements.txt --pyproject pyproject.toml --mc-type library \
	    --output-reproducible -o dist/sbom.cdx.json

# all that `pip install eosin[all]` brings, with hashes and without addresses
lock: $(STAMP)
	$(INSTALL) -e '.[release]'
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra all --generate-hashes --upgrade \
	    --no-annotate --no-header pyproject.toml -o release/requirements.txt

clean:
	rm -rf .venv .venv-scverse demo dist site .pytest_cache .mypy_cache .ruff_cache

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "eosin needs Python 3.11 or newer; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) -e '.[dev]'
	touch $(STAMP)
