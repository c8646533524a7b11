#!/usr/bin/env bash
# Without ssh: run this on every node, with its place in the hostfile and node 0's address:
#   bash launch/multi_node/by_hand.sh 0 node1 --recipe RECIPE.json --data DATA --run-dir RUN_DIR
#   bash launch/multi_node/by_hand.sh 1 node1 --recipe RECIPE.json --data DATA --run-dir RUN_DIR
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
set -a; source "$here/deepspeed_env"; set +a # the launcher reads it only where it uses ssh
exec deepspeed --hostfile "${HOSTFILE:-$here/hostfile}" --no_ssh --node_rank "$1" \
    --master_addr "$2" "$here/../pretrain.py" "${@:3}"
