#!/usr/bin/env bash
# How much growth saves, on one large GPU: BERT of 12 layers x 512, S = 128, one seed and one rate.
# Trains from scratch to five lengths, grown (one hop from 3 and from 1 layers, at 50 and at 70 %, and
# the best of docs/evidence.md) and the small models alone, each for longer and for less time than the
# grown ones; what runs share is trained once (the recipe's branches). Then it compares them. See --help.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash benchmarks/evidence_gpu.sh DATA OUT
Trains the runs of the comparison on one GPU, one after the other, into OUT/NAME and
OUT/NAME/branches, and writes OUT/comparison/compare.html. Nothing finished is done twice; a run
that was stopped goes on. It costs 5.9 times 2,500 steps of 12 layers: 15 minutes where a step takes
62 ms (120 TFLOP/s), and some for starts, evaluations and saves. Nobody has measured it.

DATA is a folder of  python launch/prepare_data.py shards TEXT... --validation TEXT... \
    --vocab-size 8192 --max-seq-length 128 --pairs none --out DATA

environment:
  PIECE_MINUTES=N  stop after about N minutes, saved, with exit code 3; the same command goes on
  STEPS=2500       optimizer steps of a grown run, 256 sequences each
  PEAK=1e-3        peak learning rate of all runs; an OUT for each value of it
  SEED=1           of all runs; an OUT for each
  VOCAB=8192       size of DATA's vocabulary
  ONLY="A B"       the names of the runs to train; nothing is compared. Tune PEAK by
                   ONLY=scratch first, with an OUT for each
  DRY_RUN=1        print the commands; needs no GPU
exit codes: 0 compared, 2 your mistake or no GPU, 3 stopped early (the same command continues)
TEXT
}

[[ "${1:-}" == -h || "${1:-}" == --help ]] && { usage; exit 0; }
[[ $# == 2 && "$1" != -* && "$2" != -* ]] || { usage >&2; exit 2; }
data="$1" out="$2"
steps="${STEPS:-2500}" peak="${PEAK:-1e-3}" seed="${SEED:-1}" vocab="${VOCAB:-8192}"
piece="${PIECE_MINUTES:-0}"
layers=12 hidden=512 heads=8 batch=256 evaluated=256 engine=bf16_fused_adam.json
# shellcheck source=benchmarks/evidence_runs.sh
source "$(dirname "${BASH_SOURCE[0]}")/evidence_runs.sh"
check_numbers

if [[ -z "${DRY_RUN:-}" ]]; then
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || fail \
        "no GPU here (torch.cuda.is_available() is false, or torch is missing), and on a CPU this" \
        "takes days; DRY_RUN=1 prints the commands"
    check_data
fi

kept='"depth": "stack", "moments": "keep"'
grown() { # NAME LAYERS: grows at 70 % of STEPS, and in a branch at 50 %
    local late=$((steps * 70 / 100)) early=$((steps * 50 / 100))
    local first="{\"num_hidden_layers\": $2, \"steps\": $late}"
    local branch="{\"name\": \"at_50\", \"at\": $early, \"stages\": [$(full $((steps - early)) "$kept")]}"
    train "$1" 12 "$steps" "[$first, $(full $((steps - late)) "$kept")]" at_50 "growth_branches=[$branch]"
}

best() { # docs/evidence.md's: 1, 3 and 12 layers for 4, 16 and 3 of 23 parts of STEPS
    local small=$((steps * 4 / 23)) middle=$((steps * 16 / 23))
    local rewarm="{\"parameters\": \"new\", \"start\": 1.0, \"factor\": 2.0, \"steps\": $((steps / 69))}"
    local first="{\"num_hidden_layers\": 1, \"steps\": $small}"
    local second="{\"num_hidden_layers\": 3, \"steps\": $middle, \"depth\": \"stack\"}"
    train best 12 "$steps" \
        "[$first, $second, $(full $((steps - small - middle)) "$kept, \"rewarm\": $rewarm")]" "" \
        "branches=[]" "learning_rate.decay_steps=$((steps * 5 / 46))"
}

runs() {
    # The longest is longer than the grown runs, which may end below a scratch run of their length.
    alone scratch 12 130 "0.4 0.5 0.6 0.77"
    grown grown_3 3
    grown grown_1 1
    best
    # At the grown runs' time, between a shorter and a longer one: a step of 3 layers takes about
    # 0.3 of one of 12 layers, of 1 layer about 0.15.
    alone alone_3 3 250 "0.45 0.56"
    alone alone_1 1 480 0.46
}

all_runs
compare
