# Two commands matter: `make demo` and `make test`. Both prepare `.venv` first.
.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-fast test-ray fuzz drift quality quality-full bench bench-full bench-gpu lint format clean

# The first of these that runs; override with PYTHON=/path/to/python3.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(if $(shell $(p) -c 0 2>/dev/null && echo y),$(p))) python3)
# cpu, or gpu for vLLM's CUDA build.
DEVICE ?= cpu
BIN := .venv/bin
# Processes the tests are spread over, a file at a time; each may hold an engine, or a server beside it (2 GiB).
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
STAMP := .venv/.installed
ARGS ?=

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: $(STAMP) ## prepare .venv (does nothing when it is up to date)
	@echo ".venv is up to date"

$(STAMP): pyproject.toml .ci/install.py
	@$(PYTHON) .ci/install.py --device $(DEVICE)

demo: $(STAMP) ## serve the repository's model with --kv-policy sink and stream from it (ARGS="--help")
	@$(BIN)/python -m examples.demo $(ARGS)

test: $(STAMP) ## run the tests, in JOBS=2 processes (ARGS="-k eviction")
	@$(PYTEST) -m "not slow" $(ARGS)

test-all: $(STAMP) ## the tests and those marked slow, for nightly runs: every model family, every refused model
	@$(PYTEST) $(ARGS)

fuzz: $(STAMP) ## requests made up from the server's OpenAPI schema (/v1/streams, options of requests)
	@$(BIN)/pip install --quiet --disable-pip-version-check -e ".[fuzz]"
	@$(BIN)/python -m pytest tests/server/test_fuzz.py -p no:schemathesis $(ARGS)

test-fast: $(STAMP) ## the tests that start no engine, in minutes
	@LIVENESS_SEEDS=$(or $(LIVENESS_SEEDS),0:1000) $(PYTEST) -m "not engine and not server and not ray and not slow and not gpu" $(ARGS)

test-ray: $(STAMP) ## the tests that start a Ray cluster
	@$(BIN)/python -m pytest -m ray $(ARGS)

quality: $(STAMP) ## perplexity of endless streams against recomputation, short (ARGS="--tokens 8192")
	@$(BIN)/python -m benchmarks.quality.short $(ARGS)

quality-full: $(STAMP) ## all quality benchmarks; hours (ARGS="--help")
	@$(BIN)/python -m benchmarks.quality.full $(ARGS)

bench: $(STAMP) ## throughput of many streams beside its peers, short; ends with the ratios
	@$(BIN)/python -m benchmarks.serving.short $(ARGS)

bench-full: $(STAMP) ## all throughput benchmarks; hours (ARGS="--scenarios streams memory")
	@$(BIN)/python -m benchmarks.serving.run $(ARGS)

bench-gpu: $(STAMP) ## what only a GPU shows: its tests, evictions, attention (needs DEVICE=gpu)
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

drift: $(STAMP) ## what another vLLM changes of all we stand on (VLLM=0.33.0, or a wheel; ARGS="--summary")
	@$(BIN)/python -m patches.drift $(VLLM) $(ARGS)

lint: $(STAMP) ## ruff (rules and format), mypy, and that imports go one way
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(STAMP) ## apply ruff's fixes and format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean: ## remove .venv, caches and build output
	rm -rf .venv build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
