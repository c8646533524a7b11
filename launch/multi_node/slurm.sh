#!/usr/bin/env bash
# Train as a job of Slurm, a task a rank, on one node or several; from the checkout's folder:
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 launch/multi_node/slurm.sh \
#       --recipe RECIPE.json --data DATA --run-dir RUN_DIR
# Every task has to see all GPUs of its node: no --gpus-per-task. What is exported where sbatch is
# called, such as NCCL_SOCKET_IFNAME, reaches every rank. sbatch's own options replace these, where
# the signal has to come earlier than a step and a save take:
#SBATCH --job-name=pretrain
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
if [ ! -f launch/pretrain.py ]; then
    echo "error: no launch/pretrain.py in $PWD; call sbatch in the checkout's folder, or give it --chdir" >&2
    exit 2
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# srun forgets this option of sbatch since Slurm 22.05.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

requeue() { # not a job that is being cancelled
    [ "$(squeue --noheader --job "$SLURM_JOB_ID" --format %T)" = RUNNING ] || return
    echo "slurm.sh: exit code $code; the job goes back into the queue and on from the last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
}

# The ranks watch each other: srun must not end one that still saves what the others have left.
srun --kill-on-bad-exit=0 --wait=0 python launch/pretrain.py "$@"
code=$?
case "$code" in
3) [[ " $* " == *" --max-steps"* ]] || requeue ;; # stopped by the signal or --time-limit, and saved
# A rank was lost or killed. What fails within ten minutes would fail again.
4 | 137 | 143) [ "$SECONDS" -lt 600 ] || requeue ;;
esac
exit "$code"
