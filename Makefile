PYTHON ?= python3
FILES ?= $(filter-out experiments/smoke.yaml,$(wildcard experiments/*.yaml))
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo experiments results serve stack test test-quick test-units test-servers test-faults test-mutations check compile check-docker fix openapi bench bench-service clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV): this downloads torch and more, and takes minutes"
	$(PYTHON) -m venv $(VENV)
	# not compiled: that takes half a minute, and only a part is ever imported, which compiles it
	$(BIN)/pip install --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.ready ## one online D-Fusion run on the shapes world, through the REST API
	$(BIN)/python -m tools.demo

experiments: $(VENV)/.ready ## run and report FILES (all of experiments/); takes hours, continues where it was stopped
	$(BIN)/python -m api.experiments $(FILES)

results: $(VENV)/.ready ## reports of all experiments and the tables of README.md and docs/results.md, from the records
	$(BIN)/python -m tools.results_page experiments README.md docs/results.md

serve: $(VENV)/.ready ## the service on 127.0.0.1:8000, with one worker, until Ctrl-C
	$(BIN)/python -m api

stack: $(VENV)/.ready ## deployed mode on 127.0.0.1: PostgreSQL, Redis, S3, two workers, until Ctrl-C
	$(BIN)/python -m api.stack

# several processes for each suite: they share two cores with the servers that they wait for
SIDE_BY_SIDE := --numprocesses 2 --dist loadgroup --no-loadscope-reorder

test: $(VENV)/.ready ## all checks and all tests, side by side
	@$(MAKE) --no-print-directory compile
	@echo "checks and suites run side by side, each shows its output when it has ended; this takes minutes"
	@# a thread that waits for a core which another suite has would only spin
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --output-sync=target --keep-going -j3 test-servers test-units check

test-quick: $(VENV)/.ready ## all checks and the unit tests that are not slow, for the loop of development
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --output-sync=target --keep-going -j2 check test-units QUICK='not slow'

# tests with servers come first: much of their time is waiting
test-units: $(VENV)/.ready
	nice -n 5 $(BIN)/pytest tests/unit $(SIDE_BY_SIDE) -m '$(QUICK)'

test-servers: $(VENV)/.ready
	$(BIN)/pytest tests/acceptance tests/integration $(SIDE_BY_SIDE)

test-faults: $(VENV)/.ready ## the long form of the tests of faults, of the stack and of the contract
	DFUSION_FAULT_KILLS=25 DFUSION_CONTRACT_EXAMPLES=12 \
	$(BIN)/pytest tests/acceptance/test_faults.py tests/acceptance/test_stack.py tests/acceptance/test_contract.py

test-mutations: $(VENV)/.ready ## take guards away, one at a time: the tests must notice
	$(BIN)/python -m tests.mutations

check: $(VENV)/.ready ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

compile: $(VENV)/.ready
	@# once, before the suites start many processes, which would all do it, each time where bytecode is not to be written;
	@# _torchvision_ops first, as open_clip needs it beside a CPU-only torch
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c "import dfusion._torchvision_ops, api.cli, api.main, celery, open_clip, worker.local"

check-docker: $(VENV)/.ready ## what pip and the Dockerfiles install, in clean environments; takes minutes
	CHECK_DOCKER=1 $(BIN)/pytest -rA tests/acceptance/test_images.py tests/acceptance/test_packaging.py

fix: $(VENV)/.ready ## format, and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

openapi: $(VENV)/.ready ## the golden copy of the OpenAPI document, after a change of the API
	$(BIN)/python -m tests.openapi

docs: $(VENV)/.ready ## the documentation as a site in build/docs/site; broken links are errors
	$(BIN)/python -m tools.docs_site

bench: $(VENV)/.ready ## time and U-Net evaluations of fusion, beside the plain way
	$(BIN)/python -m benchmarks.fusion

bench-service: $(VENV)/.ready ## the service's own times in both modes, beside its aims
	$(BIN)/python -m benchmarks.service

clean: ## remove the environment and caches (keeps data)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
