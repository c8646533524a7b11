#!/usr/bin/env bash
# The one test command: sets itself up; without arguments ruff, mypy and all tests but the slow ones
# (CI=true adds those but the soak); with arguments pytest alone:  bash tests/run.sh [PYTEST ARGS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup_env.sh

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1
nvidia-smi -L 2>/dev/null | grep -q '^GPU' || export DS_ACCELERATOR=cpu

if [ $# -eq 0 ]; then
    if [ "${CI:-}" = true ]; then set -- -m "not soak"; else set -- -m "not slow"; fi
    lint=0
    ruff check . || lint=1
    mypy || lint=1
    # Both verdicts, not just the first: the tests run all the same.
    python -m pytest "$@" </dev/null || exit
    [ "$lint" = 0 ] || echo "ruff or mypy found faults: see the top" >&2
    exit "$lint"
fi
exec python -m pytest "$@" </dev/null
