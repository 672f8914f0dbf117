# Two commands matter: `make demo` and `make test`. Each installs all it needs, in this folder only (.venv*),
# plus the Debian packages that scripts/system-packages names.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
UV_VERSION := 0.13.9
PORT ?= 8080
UV := .venv/bin/uv
export UV_NO_PROGRESS ?= 1

.PHONY: help demo test deploy destroy cost bench lint types format lock compat clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | while IFS=$$'\t' read -r t d; do printf '  make %-10s %s\n' "$$t" "$$d"; done

demo: .venv/.local ## the proxy on http://127.0.0.1:8080 with a local SageMaker MLflow; PORT=8081 is another port; Ctrl-C ends it
	@exec .venv/bin/mlflow-proxy demo --port $(PORT)

test: .venv/.dev infra/node_modules/.ready ## set everything up and run all tests
	@scripts/system-packages test
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python -m pytest -n 2 $(PYTEST_ARGS)

deploy: .venv/.infra infra/node_modules/.ready ## into AWS: make deploy MLFLOW_TYPE=tracking|serverless [STACK_ENV=dev|prod] [BOOTSTRAP=yes] [CONTEXT="name=value …"]
	@PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python -m infra.commands.deploy

destroy: .venv/.infra ## out of AWS, what AWS retains too: make destroy MLFLOW_TYPE=tracking|serverless [DRY_RUN=1]
	@PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python -m infra.commands.destroy

cost: .venv/.infra ## what a deployment costs in a month, by option; no network
	@.venv/bin/python -m infra.commands.cost

bench: .venv/.dev .venv/.bench ## compare speed and size with Envoy, nginx and the naive design; writes docs/performance.md
	@scripts/system-packages bench
	.venv/bin/python -m benchmarks $(BENCH_ARGS)

lint: .venv/.dev ## style, formatting
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/.dev ## strict type check
	.venv/bin/mypy

format: .venv/.dev ## format the code in place
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

compat: .venv/.dev ## the client lifecycle against MLflow servers 2.16, 3.0 and 3.10, each in its own environment
	.venv/bin/python -m pytest tests/compat $(PYTEST_ARGS)

lock: .venv/.uv ## rewrite the lock files from pyproject.toml
	for set in base:"" tracing:"--extra tracing -c requirements/base.txt" local:"--extra local" dev:"--extra local --extra tracing --group dev --group infra" bench:"--group bench" infra:"--group infra -c requirements/dev.txt"; do \
	  $(UV) pip compile -q --generate-hashes --no-header --no-annotate --no-emit-index-url --python-version 3.11 --universal \
	    pyproject.toml $${set#*:} -o requirements/$${set%%:*}.txt $(LOCK_ARGS); done
	$(UV) pip compile -q --generate-hashes --no-header --no-annotate --no-emit-index-url --python-version 3.11 --universal \
	  deploy/container/tools.in -o deploy/container/tools.txt $(LOCK_ARGS)

clean: ## remove what the commands above made
	rm -rf .venv .venv-* infra/node_modules .cache build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/.uv:
	@scripts/system-packages python
	@echo "Making a Python environment in .venv …"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -q --disable-pip-version-check uv==$(UV_VERSION)
	@touch $@

# Each set includes the ones before it, so that going from the demo to the tests only adds packages.
.venv/.local: .venv/.uv requirements/local.txt pyproject.toml
	@if [ ! -e .venv/.dev ]; then echo "Installing the service and the local SageMaker (about a minute) …"; \
	  $(UV) pip install --python .venv/bin/python -q --require-hashes -r requirements/local.txt; $(UV) pip install -q --no-deps -e .; fi
	@touch $@

.venv/.dev: .venv/.uv requirements/dev.txt pyproject.toml
	@echo "Installing what the tests and checks need …"
	@$(UV) pip install --python .venv/bin/python -q --require-hashes -r requirements/dev.txt
	@$(UV) pip install --python .venv/bin/python -q --no-deps -e .
	@touch $@ .venv/.local

.venv/.infra: .venv/.uv requirements/infra.txt pyproject.toml
	@if [ ! -e .venv/.dev ]; then echo "Installing the CDK application and its tools …"; \
	  $(UV) pip install --python .venv/bin/python -q --require-hashes -r requirements/infra.txt; $(UV) pip install --python .venv/bin/python -q --no-deps -e .; fi
	@touch $@

# Node.js comes from PyPI with either set.
infra/node_modules/.ready: infra/package-lock.json | $(if $(wildcard .venv/.dev),.venv/.dev,.venv/.infra)
	@echo "Installing the CDK command line …"
	@cd infra && PATH="$(CURDIR)/.venv/bin:$$PATH" npm ci --silent --no-audit --no-fund
	@touch $@

.venv/.bench: .venv/.uv requirements/bench.txt
	@$(UV) pip install --python .venv/bin/python -q --require-hashes -r requirements/bench.txt
	@touch $@
