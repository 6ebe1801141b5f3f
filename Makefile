# Everything runs from .venv, which is made here from nothing but Python 3.11-3.14.
PYTHON ?= python3
PORT ?= 5000
HOST ?= 127.0.0.1
SEEDS ?= 10
REQUESTS ?= 10000
ARGS ?=

BIN := .venv/bin
# Two at a time: most tests wait for processes to start. One thread each, or they fight over cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
LOCKED := .venv/.locked
# The scanners of infra/, apart from all else: checkov pins many packages.
SCAN_VENV := .venv-scan
SCANNERS := $(SCAN_VENV)/.locked
# Resolves requirements.lock; any version will do.
UV_VENV := .venv-uv

.DEFAULT_GOAL := help
.PHONY: help setup scanners stack stack-stop quickstart test test-slow drill check format ui board lock clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(LOCKED) ## create .venv with exactly the locked packages

# --no-deps: the lock is complete, and pip must not resolve anything of its own.
$(LOCKED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || { \
		echo "error: '$(PYTHON)' is not Python 3.11-3.14; name one that is: make PYTHON=python3.12 ..." >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements.lock
	@touch $@

scanners: $(SCANNERS) ## create .venv-scan with exactly the locked scanners

$(SCANNERS): infra/scanners.lock
	$(PYTHON) -m venv $(SCAN_VENV)
	$(SCAN_VENV)/bin/python -m pip install --quiet --require-hashes --no-deps -r infra/scanners.lock
	@touch $@

quickstart: $(LOCKED) ## encode, pretrain, distill, evaluate and register on handwritten digits (ARGS=...)
	$(BIN)/python jobs/quickstart.py $(ARGS)

stack: $(LOCKED) ## MLflow with login on Postgres, S3, Ray, Prometheus, board, on loopback
	$(BIN)/python infra/local/stack.py up

stack-stop: $(LOCKED) ## end what `make stack` started
	$(BIN)/python infra/local/stack.py down

test: $(LOCKED) $(SCANNERS) ## the fast tests (ARGS=...)
	$(PYTEST) --dist worksteal $(ARGS)

test-slow: $(LOCKED) ## the slow tests: end to end, kills, submissions (ARGS=...)
	$(PYTEST) --dist loadfile -m slow --durations 15 $(ARGS)

drill: $(LOCKED) ## kill workers, drivers, nodes, uploads and replicas at random steps (SEEDS=10 REQUESTS=10000)
	DRILL_SEEDS=$(SEEDS) DRILL_REQUESTS=$(REQUESTS) $(BIN)/python -m pytest -m slow -s \
		tests/jobs/test_drill.py tests/serving/test_drill.py $(ARGS)

check: $(LOCKED) ## formatter, linter, types and the rules of the architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/architecture

format: $(LOCKED) ## format, and fix what the linter can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Without the job consumers, which take over a gigabyte and serve nothing here.
ui: $(LOCKED) ## look at the runs in a browser (PORT=5000)
	@test -f runs/mlflow.db || { echo "error: no runs/mlflow.db yet; start with: make quickstart" >&2; exit 1; }
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui \
		--host 127.0.0.1 --port $(PORT) --backend-store-uri sqlite:///runs/mlflow.db

# MLflow's own pages are `make ui`.
board: $(LOCKED) ## see runs, searches and the registry in a browser (PORT=5050 HOST=127.0.0.1)
	PYTHONPATH=.:platform:dashboards $(BIN)/python -m facm_dashboards \
		--host $(HOST) --port $(if $(filter file,$(origin PORT)),5050,$(PORT)) $(ARGS)

# One version per package for every Python, so that all of them compute the same numbers.
lock: ## resolve requirements.lock anew from pyproject.toml
	$(PYTHON) -m venv --clear $(UV_VENV)
	$(UV_VENV)/bin/python -m pip install --quiet uv
	$(UV_VENV)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
		--fork-strategy fewest --generate-hashes --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" --extra dev --extra infra pyproject.toml -o requirements.lock
	$(UV_VENV)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
		--fork-strategy fewest --generate-hashes --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" infra/scanners.in -o infra/scanners.lock
	rm -rf $(UV_VENV)

clean: ## remove runs/ and the caches
	rm -rf runs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## and .venv
	rm -rf .venv $(UV_VENV) $(SCAN_VENV)
