#!/usr/bin/env bash
# Train on all nodes of the hostfile with Open MPI, which finds the ranks through mpi4py:
#   bash launch/multi_node/openmpi.sh --recipe RECIPE.json --data DATA --run-dir RUN_DIR
# Open MPI itself talks over eth0, unless INTERFACE says otherwise.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec deepspeed --hostfile "${HOSTFILE:-$here/hostfile}" --launcher openmpi \
    --launcher_args "--mca btl_tcp_if_include ${INTERFACE:-eth0}" "$here/../pretrain.py" "$@"
