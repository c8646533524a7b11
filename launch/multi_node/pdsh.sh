#!/usr/bin/env bash
# Train on all nodes of the hostfile, started by ssh from any of them:
#   bash launch/multi_node/pdsh.sh --recipe RECIPE.json --data DATA --run-dir RUN_DIR
# ~/.ssh/config and ~/.deepspeed_env as in ssh_config and deepspeed_env beside this file.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec deepspeed --hostfile "${HOSTFILE:-$here/hostfile}" "$here/../pretrain.py" "$@"
