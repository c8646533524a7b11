#!/usr/bin/env bash
# RANKS ranks on this node (default 2) with MPI alone:
#   RANKS=8 bash launch/multi_node/mpirun.sh --recipe RECIPE.json --data DATA --run-dir RUN_DIR
# Open MPI or MPICH: the one for which mpi4py was built (MPIRUN=mpirun.mpich, where both are there).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${MPIRUN:-mpirun}" --bind-to none -n "${RANKS:-2}" python "$here/../pretrain.py" "$@"
