#!/usr/bin/env bash
# Without ssh: run this on every node, with its place in the hostfile and node 0's address:
#   bash launch/multi_node/by_hand.sh 0 node1 --recipe RECIPE.json --data DATA --run-dir RUN_DIR
#   bash launch/multi_node/by_hand.sh 1 node1 --recipe RECIPE.json --data DATA --run-dir RUN_DIR
# Variables of ~/.deepspeed_env and ./.deepspeed_env count, but for those that are set already.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 3 ] || ! [[ "$1" =~ ^[0-9]+$ ]]; then
    echo "usage: bash launch/multi_node/by_hand.sh NODE_RANK MAIN_NODE PRETRAIN_FLAGS" >&2
    exit 2
fi
# The launcher itself reads them only where it uses ssh.
file=${DS_ENV_FILE:-.deepspeed_env}
while read -r line || [ -n "$line" ]; do
    name=${line%%=*}
    [ -z "$name" ] || [ -v "$name" ] || export "$line"
done < <(sed 's/[[:space:]]*=[[:space:]]*/=/; s/[[:space:]]*$//' "./$file" "$HOME/$file" 2>/dev/null)
exec deepspeed --hostfile "${HOSTFILE:-$here/hostfile}" --no_ssh --node_rank "$1" \
    --master_addr "$2" "$here/../pretrain.py" "${@:3}"
