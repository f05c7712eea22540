#!/usr/bin/env bash
# Planning with the newest versions that pyproject.toml allows, and without torch: an environment of
# its own in .venv-newest, and the tests of what plans, prints and reads files there.
# Tests that need torch are left out: its newest build on PyPI brings gigabytes of CUDA.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
venv="$root/.venv-newest"
tests=(nouns artifact costs devices_library exact heuristic planner plan_modes report search
       simulate_trace what_if sizes job_counts timeline)

"$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
    "$root[plot]" pytest pytest-timeout hypothesis psutil >&2
"$venv/bin/pip" list --disable-pip-version-check 2>/dev/null \
    | grep -iE '^(numpy|highspy|pandas|pydantic|pyyaml|click|rich) ' >&2
cd "$root"
# shellcheck disable=SC2086
exec "$venv/bin/python" -m pytest -q -p no:cacheprovider ${PYTEST_ARGS:-} \
    tests/processes/test_{silence,planner_processes}.py $(printf "tests/unit/test_%s.py " "${tests[@]}")
