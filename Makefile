# One command per habit. Each works on a clean machine with python3 (3.11 or newer), git and make:
# the environment is made on first use. Settings (PYTHON, LLMPQ_TORCH, ...): see scripts/env.sh.

RUN := scripts/env.sh
export PYTHON ?= python3
# Processes that run tests; 0: pytest's own alone, as a debugger needs it (and without pytest-xdist).
TEST_PROCESSES ?= 2
# A file stays in one process (its fixtures are made once), and the long ones, of pipelines, go first.
SPREAD := $(if $(filter-out 0,$(TEST_PROCESSES)),\
    -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder)

.PHONY: help quickstart test newest optional vllm-env vllm-test check bench env clean

help:
	@echo "make quickstart  profile, plan and run the shipped model on a rehearsed cluster"
	@echo "make test        all tests, two files at a time (PYTEST_ARGS='-k name' for some)"
	@echo "make newest      tests of planning with the newest versions that are allowed, without torch"
	@echo "make optional    tests of optional libraries, in an environment that has them all"
	@echo "make vllm-env    the environment of vLLM for CPUs in .venv-vllm (about 4 GB)"
	@echo "make vllm-test   tests of exported plans on a real vLLM, in that environment"
	@echo "make check       lint, formatting and types"
	@echo "make bench       every benchmark, quickly, into bench-out/"
	@echo "make env         the environment in .venv"
	@echo "make clean       remove what was built, the environment included"

quickstart:
	@bash scripts/quickstart.sh

test:
	@$(RUN) python -m pytest -q $(SPREAD) $(PYTEST_ARGS)

newest:
	@bash scripts/newest.sh

# What is skipped elsewhere for want of a library; here it fails where one is missing.
optional: export LLMPQ_VENV := $(CURDIR)/.venv-optional
optional: export LLMPQ_EXTRAS := run,dev,eval,gurobi,references
optional: export LLMPQ_ALL_LIBRARIES := 1
optional:
	@$(RUN) python -m pytest -q -m library $(PYTEST_ARGS)

vllm-env:
	@scripts/vllm_env.sh

# pytest runs in the usual environment; its tests start the Python of vLLM's.
vllm-test:
	@LLMPQ_VLLM_PYTHON="$$(scripts/vllm_env.sh)" && export LLMPQ_VLLM_PYTHON && \
	    $(RUN) python -m pytest -q -s tests/vllm $(PYTEST_ARGS)

check:
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

# Files that start with an underscore are helpers of the benchmarks. One that fails stops no other.
bench:
	@mkdir -p bench-out; failed=; \
	for file in scripts/bench/[!_]*.py; do \
	    [ -e "$$file" ] || continue; \
	    name=$$(basename "$$file" .py); echo "== $$name"; \
	    $(RUN) python "$$file" --quick --json "bench-out/$$name.json" || failed="$$failed $$name"; \
	done; \
	[ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

env:
	@$(RUN)

clean:
	rm -rf .venv .venv-newest .venv-optional .venv-vllm build dist *.egg-info quickstart-out bench-out gpu-out
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find llmpq tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
