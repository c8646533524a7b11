#!/usr/bin/env bash
# The one test command: sets itself up; without arguments ruff, mypy and all tests but the slow ones
# (CI=true adds those but the soak); with arguments pytest alone:  bash tests/run.sh [PYTEST ARGS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup_env.sh

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1
nvidia-smi -L 2>/dev/null | grep -q '^GPU' || export DS_ACCELERATOR=cpu

[ $# -eq 0 ] || exec python -m pytest "$@" </dev/null

which="not slow"
[ "${CI:-}" != true ] || which="not soak"
lint=0
ruff check . || lint=1
mypy || lint=1

# Two lanes for two cores, as a unit test has one thread and the tests of two hosts mostly wait.
beside="$(mktemp)"
python -m pytest -m "$which" tests/unit tests/multi_node </dev/null >"$beside" 2>&1 &
lane=$!
trap 'rm -f "$beside"; kill "$lane" 2>/dev/null || true' EXIT
code=0
python -m pytest -m "$which" tests/integration tests/gpu </dev/null || code=$?
echo "meanwhile, in tests/unit and tests/multi_node:"
wait "$lane" || code=$?
cat "$beside"
[ "$lint" = 0 ] || echo "ruff or mypy found faults: see the top" >&2
# All verdicts, not just the first: the tests run whatever the lint says, and both lanes to the end.
exit "$((code ? code : lint))"
