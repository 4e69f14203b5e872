# Two commands matter: `make demo` and `make test`. Both prepare `.venv` first, and with VLLM=0.33
# (a line of pyproject.toml) an environment of that line, `.venv-0.33`, and use that.
.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-fast test-seams test-ray fuzz drift quality quality-full bench bench-full bench-gpu docs release-check lint format clean

# The first of these that runs; override with PYTHON=/path/to/python3.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(if $(shell $(p) -c 0 2>/dev/null && echo y),$(p))) python3)
# cpu, or gpu for vLLM's CUDA build.
DEVICE ?= cpu
# The first line of the table in pyproject.toml has `.venv`, every other a folder of its own.
LINES := $(shell sed -n '/^\[tool\.sink_vllm\.lines\]/,/^\[/s/^"\([^"]*\)" = .*/\1/p' pyproject.toml)
VLLM ?= $(firstword $(LINES))
VENV := .venv$(if $(filter-out $(firstword $(LINES)),$(VLLM)),-$(VLLM))
# An environment to stand on instead of `.venv`, for a line without a CPU wheel.
BASE ?=
BIN := $(VENV)/bin
# Processes the tests are spread over, a file at a time; each may hold an engine, or a server beside it (2 GiB).
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
STAMP := $(VENV)/.installed
ARGS ?=

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: $(STAMP) ## prepare .venv (does nothing when it is up to date); VLLM=0.33: .venv-0.33
	@echo "$(VENV) is up to date"

$(STAMP): pyproject.toml .ci/install.py $(wildcard .ci/environments/*.py)
	@$(PYTHON) .ci/install.py --vllm $(VLLM) --device $(DEVICE) $(if $(BASE),--base $(BASE))

demo: $(STAMP) ## serve the repository's model with --kv-policy sink and stream from it (ARGS="--open": a page)
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

# What stands on a seam of vLLM: the whole suite runs on one line, this on every other (VLLM=0.33).
SEAMS = tests/compat tests/gate tests/policy tests/server tests/engine/test_liveness.py tests/engine/test_manager.py \
	$(addprefix tests/end_to_end/test_,$(addsuffix .py,exactness async_scheduling below_capacity conversations parked recurrent sessions server)) \
	$(addprefix tests/worker/test_,$(addsuffix .py,page_moves self_test state_positions v2_runner))

test-seams: $(STAMP) ## the tests of all that touches vLLM: what another line has to pass (VLLM=0.33)
	@$(PYTEST) $(SEAMS) -m "not slow" $(ARGS)

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

# VLLM names what to compare with here, which nothing is installed of.
drift: ## what another vLLM changes of all we stand on (VLLM=0.33.0, or a wheel; ARGS="--summary")
	@$(MAKE) --no-print-directory install VLLM=$(firstword $(LINES))
	@.venv/bin/python -m patches.drift $(VLLM) $(ARGS)

docs: $(STAMP) ## the documentation as a site, in out/site; every link is checked
	@$(BIN)/pip install --quiet --disable-pip-version-check -e ".[docs]"
	@$(BIN)/python .ci/site.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)
	@echo "out/site/index.html"

release-check: $(STAMP) ## is this checkout a release? builds dist/, publishes nothing (ARGS="--tag v0.1.0")
	@$(BIN)/pip install --quiet --disable-pip-version-check -e ".[release]"
	@$(BIN)/python .ci/release.py $(ARGS)

lint: $(STAMP) ## ruff (rules and format), mypy, and that imports go one way
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(STAMP) ## apply ruff's fixes and format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean: ## remove the environments, caches and build output
	rm -rf .venv .venv-* build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
