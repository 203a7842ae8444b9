# Every command installs what it needs into .venv and the cache (~/.cache/processing-tasks) and says what it is doing.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# Some machines forbid it: then each of the many processes that tests start compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV_VERSION := 0.13.9
LOCK_UPGRADE := $(if $(UPGRADE),--upgrade)
PACKAGES := crds operator job_runner client devstack tests
# Which cluster: make demo CLUSTER=embedded|kind|current NAMESPACE=name VALUES=file, on make's command line alone: a variable
# NAMESPACE of the shell is likely to be about something else.
given = $(if $(filter command,$(firstword $(origin $(1)))),$(2) $($(1)))
CHOICE = $(call given,CLUSTER,--cluster) $(call given,NAMESPACE,--namespace) $(call given,VALUES,--values)

.PHONY: help demo test test-all test-unit test-integration test-e2e test-torch test-kueue test-ocr crash freeze-release bench soak docs lint format generate lock images sbom up down status logs clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  \033[1m%-17s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## Real documents through a real cluster into real stores, and a question answered from each
	@$(BIN)/python -m devstack demo $(CHOICE)

# What is marked long, such as the whole demo on other clusters, make test leaves out and make test-all does not.
# A test by name needs only the files that have it, and brings up by itself what it needs of the devstack.
test: $(READY) ## All tests but the longest; make test NAME=test_cancel for those whose name holds it
ifeq ($(origin NAME),command line)
	@$(BIN)/python -m pytest $$(grep -rl --include='test_*.py' --exclude-dir=torch --exclude-dir=ocr --exclude-dir=kueue -e '$(NAME)' tests || echo tests) -k '$(NAME)'
else
	@$(call whole,and not long)
endif

test-all: $(READY) ## All tests
	@$(call whole,)

# All that bear each other's company side by side, and then the others. What has failed runs once more, alone: machines that
# are shared stall for seconds. One that passes only then is listed; it depends on time or order, which is to be mended too.
define whole
$(BIN)/python -m devstack up
failed=; broken=; \
$(BIN)/python -m pytest tests --cache-clear -m "not alone $(1)" -n 3 --dist loadfile --no-loadscope-reorder --durations=10 \
  || { [ $$? = 1 ] && failed=1 || broken=1; }; \
$(BIN)/python -m pytest tests -m "alone $(1)" --durations=20 || { [ $$? = 1 ] && failed=1 || broken=1; }; \
if [ "$$failed" ]; then \
  echo "Once more, alone, what has failed:"; \
  $(BIN)/python -m pytest tests --last-failed --last-failed-no-failures none -rpf || broken=1; \
fi; \
[ -z "$$broken" ]
endef

test-unit: $(READY) ## Tests that need no server: seconds
	@$(BIN)/python -m pytest tests/unit -n 2

test-integration: $(READY) ## Tests on a real API server, PostgreSQL, Redis, Milvus and Elasticsearch
	@$(BIN)/python -m devstack up
	@$(BIN)/python -m pytest tests/integration

test-e2e: $(READY) ## Tests on the whole installation: cluster, chart, images, stores
	@$(BIN)/python -m devstack up
	@$(BIN)/python -m pytest tests/e2e

crash: $(READY) ## Kill operator and runner at every point of a document's life; prints a table, writes build/crash.json
	@$(BIN)/python -m devstack up
	@$(BIN)/python -m pytest tests/crash --all-points

freeze-release: $(READY) ## Part of a release: keep what it leaves in tests/data/releases (make freeze-release VERSION=0.2.0)
	@$(BIN)/python -m tests.crash.freeze $(VERSION)

test-torch: $(READY) ## Tests of sentence-transformers, in an environment of its own (6 GB, kept in the cache)
	@$(BIN)/python -m devstack up --parts stores
	@$(BIN)/python -m tests.torch

test-kueue: $(READY) ## Jobs under the real controller of Kueue, which is built the first time (an hour on two cores)
	@$(BIN)/python -c 'from devstack import tools; tools.kueue()'
	@$(BIN)/python -m devstack up --parts cluster
	@WITH_KUEUE=1 $(BIN)/python -m pytest tests/kueue

test-ocr: $(READY) ## Tests of scanned pages and pictures, in an environment of its own (0.5 GB, kept in the cache)
	@$(BIN)/python -m tests.ocr

bench: $(READY) ## Measure; writes build/bench/NAME.json (make bench NAME=operator for one, ONLY=restart for a part of it)
	@$(BIN)/python -m tests.bench $(NAME) $(if $(ONLY),--only $(ONLY))

soak: $(READY) ## Ten thousand tasks, come and gone for an hour: the operator's memory (SOAK_MINUTES=10 for less)
	@$(BIN)/python -m tests.bench soak

docs: $(READY) ## The documentation site: build/site/index.html; a link or an anchor that leads nowhere fails
	@$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python build/docs
	@$(BIN)/uv pip sync --quiet --python build/docs/bin/python requirements/docs.txt
	@build/docs/bin/python -m sphinx -q -W --keep-going -b html -c docs -d build/doctrees . build/site
	@echo "docs: build/site/index.html"

lint: $(READY) ## ruff, mypy strict, import-linter, generated files in sync
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "cannot accept the formatting: run make format"; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python crds/generate.py --check
	@$(BIN)/python docs/generate.py --check
	@$(BIN)/python helm/dashboards.py --check
	@echo "lint: all good"

format: $(READY) ## Format the code and sort imports
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format .

generate: $(READY) ## Write what follows from the code: the CRDs, docs/reference, pictures of recorded runs, the dashboard
	@$(BIN)/python crds/generate.py
	@$(BIN)/python docs/generate.py
	@$(BIN)/python helm/dashboards.py

lock: $(READY) ## Pin what pyproject.toml has new; with UPGRADE=1 the newest of everything within its bounds
	@for extras in "operator gateway" runner dev; do \
	  echo "locking $$extras"; \
	  $(BIN)/uv pip compile --quiet $(LOCK_UPGRADE) --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-header $$(printf -- '--extra %s ' $$extras) pyproject.toml -o requirements/$${extras%% *}.txt; \
	done
	@echo "locking ocr"
	@$(BIN)/uv pip compile --quiet $(LOCK_UPGRADE) --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-header --constraint requirements/dev.txt --extra ocr pyproject.toml -o requirements/ocr.txt
	@echo "locking parquet"
	@$(BIN)/uv pip compile --quiet $(LOCK_UPGRADE) --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-header --constraint requirements/dev.txt --extra parquet pyproject.toml -o requirements/parquet.txt
	@echo "locking torch"
	@$(BIN)/uv pip compile --quiet $(LOCK_UPGRADE) --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-header --constraint requirements/dev.txt --extra sentence-transformers pyproject.toml -o requirements/torch.txt
	@echo "locking onnx"
	@$(BIN)/uv pip compile --quiet $(LOCK_UPGRADE) --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-header --constraint requirements/dev.txt --constraint requirements/torch.txt --extra onnx pyproject.toml -o requirements/onnx.txt
	@echo "locking onnx-export"
	@$(BIN)/uv pip compile --quiet $(LOCK_UPGRADE) --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-header --constraint requirements/dev.txt --constraint requirements/torch.txt --constraint requirements/onnx.txt \
	  --extra onnx-export pyproject.toml -o requirements/onnx-export.txt
	@echo "locking bench"
	@$(BIN)/uv pip compile --quiet $(LOCK_UPGRADE) --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-header --group bench -o requirements/bench.txt
	@echo "locking docs"
	@$(BIN)/uv pip compile --quiet $(LOCK_UPGRADE) --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-header --group docs -o requirements/docs.txt
	@echo hatchling | $(BIN)/uv pip compile --quiet $(LOCK_UPGRADE) --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-header --no-annotate - -o requirements/build.txt

images: $(READY) ## Build both images and print their sizes by package; VARIANT=ocr, onnx or parquet: the runner with these libraries
	@$(BIN)/python -m devstack images $(call given,VARIANT,--variant)

sbom: $(READY) ## What is in each image: build/sbom/*.cdx.json (CycloneDX), checked against its schema
	@$(BIN)/python -m devstack.sbom

up: $(READY) ## Start the devstack: one-node Kubernetes, PostgreSQL, Redis, Milvus, Elasticsearch
	@$(BIN)/python -m devstack up $(CHOICE)

down: $(READY) ## Stop the devstack; nothing of it is left running
	@$(BIN)/python -m devstack down $(CHOICE)

status: $(READY) ## What of the devstack runs
	@$(BIN)/python -m devstack status

logs: $(READY) ## The ends of all logs: devstack processes, operator, the youngest pods (LINES=50 for more)
	@$(BIN)/python -m devstack logs --lines $(or $(LINES),15) $(CHOICE)

clean: ## Remove what was built here (the cache of builds stays: rm -r ~/.cache/processing-tasks)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis $(VENV)

$(READY): requirements/dev.txt pyproject.toml
	@echo "preparing $(VENV): the locked dependencies (under a minute with a fast network)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cannot prepare $(VENV): Python 3.11 or newer is needed; run make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "cannot prepare $(VENV): the venv module is missing; on Debian run: apt-get install python3-venv"; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@$(BIN)/uv pip sync --quiet requirements/dev.txt
	@$(BIN)/uv pip install --quiet --no-deps --editable .
	@touch $@
