PYTHON ?= python3
FILES ?= $(filter-out experiments/smoke.yaml,$(wildcard experiments/*.yaml))
VENV := .venv
BIN := $(VENV)/bin

# compiled modules are kept, since tests start many programs
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo experiments results serve stack test test-quick test-units test-servers test-long test-faults reliability test-contract test-mutations check check-docker fix openapi screenshots docs bench bench-service bench-scaling clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "creating $(VENV): downloads torch and more; takes minutes"
	$(PYTHON) -m venv $(VENV)
	# without compiling, which takes half a minute: most modules are never imported
	$(BIN)/pip install --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	# compile what is imported, before many processes do it at once (code that cannot be imported is no error here);
	# _torchvision_ops first, because open_clip needs it with a CPU-only torch
	-$(BIN)/python -c "import dfusion._torchvision_ops, api.cli, api.client.client, api.server, celery, open_clip, worker.workbench"
	@touch $@

demo: $(VENV)/.ready ## run D-Fusion on the shapes world through the REST API; takes minutes
	$(BIN)/python -m tools.demo

experiments: $(VENV)/.ready ## run FILES (default: all of experiments/) and write reports; takes hours, resumes
	$(BIN)/python -m api.experiments $(FILES)

results: $(VENV)/.ready ## write reports and the tables of README.md and docs/results.md from the records
	$(BIN)/python -m tools.results_page experiments README.md docs/results.md

serve: $(VENV)/.ready ## run the service with one worker on 127.0.0.1:8000 until Ctrl-C
	$(BIN)/python -m api

stack: $(VENV)/.ready ## run deployed mode on 127.0.0.1 until Ctrl-C: PostgreSQL, Redis, S3, two workers
	$(BIN)/python -m api.stack

# two processes for each suite: much of their time is waiting for servers
SIDE_BY_SIDE := --numprocesses 2 --dist loadgroup --no-loadscope-reorder

test: $(VENV)/.ready ## run all checks, and all tests except the long ones, in parallel
	@echo "checks and suites run in parallel; each shows its output at its end; takes minutes"
	@# one thread each: more would spin while another suite uses the core
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --output-sync=target --keep-going -j3 test-servers test-units check

test-quick: $(VENV)/.ready ## run all checks and the fast unit tests
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --output-sync=target --keep-going -j2 check test-units QUICK='not slow'

# lower priority than test-servers, which takes longer and waits much of the time
test-units: $(VENV)/.ready
	nice -n 5 $(BIN)/pytest tests/unit tests/gpu $(SIDE_BY_SIDE) -m '$(QUICK)'

test-servers: $(VENV)/.ready
	$(BIN)/pytest tests/acceptance tests/integration $(SIDE_BY_SIDE)

test-long: $(VENV)/.ready ## run the long forms of tests, which make test leaves out; takes minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest --long -m long

test-faults: test-long ## run the long tests and the fault suite; takes hours, resumes; ROUNDS=1 for one round of each fault
	$(BIN)/python -m tests.faults $(if $(ROUNDS),--rounds $(ROUNDS)) $(FAULTS)

reliability: $(VENV)/.ready ## write the recorded runs of test-faults and test-contract into docs/reliability.md
	$(BIN)/python -m tests.faults --table docs/reliability.md
	$(BIN)/python -m tests.contract --table docs/reliability.md

test-contract: $(VENV)/.ready ## run the long test of the API contract on both databases; takes minutes
	$(BIN)/python -m tests.contract $(MODES)

test-mutations: $(VENV)/.ready ## remove guards one at a time; the tests must fail
	$(BIN)/python -m tests.mutations

check: $(VENV)/.ready ## check format, lint, types, import contracts and known vulnerabilities
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.audit

check-docker: $(VENV)/.ready ## install like pip and the Dockerfiles, in clean environments; takes minutes
	CHECK_DOCKER=1 $(BIN)/pytest -rA tests/acceptance/test_images.py tests/acceptance/test_packaging.py

fix: $(VENV)/.ready ## format the code and apply the linter's fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

openapi: $(VENV)/.ready ## update the golden copy of the OpenAPI document
	$(BIN)/python -m tests.openapi

screenshots: $(VENV)/.ready ## take the pictures of pages in docs/images from the data folder DATA; needs Chromium
	$(BIN)/python -m tests.screenshots $(DATA)

docs: $(VENV)/.ready ## build the documentation site in build/docs/site; broken links are errors
	$(BIN)/python -m tools.docs_site

bench: $(VENV)/.ready ## compare sampling, fusion and training with the released code's way; takes ten minutes
	$(BIN)/python -m benchmarks

bench-service: $(VENV)/.ready ## measure the service in both modes against its targets
	$(BIN)/python -m benchmarks.service

bench-scaling: $(VENV)/.ready ## measure how time and memory grow with jobs and workers, and what the service adds
	$(BIN)/python -m benchmarks.scaling

clean: ## remove the environment and caches; keeps data
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
