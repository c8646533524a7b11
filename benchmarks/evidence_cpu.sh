#!/usr/bin/env bash
# How much growth saves, on two CPU cores: a deep, narrow BERT, S = 128, one seed and one rate. From
# scratch to five lengths; one trunk of the small model, from which each way of growing branches; the
# published systems' own stages, scaled; small models alone, each at four lengths. Then it compares
# them. See --help.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash benchmarks/evidence_cpu.sh DATA OUT
Trains the runs of the comparison, one after the other, into OUT/NAME and OUT/NAME/branches, and
writes OUT/comparison/compare.html. Nothing finished is done twice; a run that was stopped goes on.

DATA is a folder of  python launch/prepare_data.py shards TEXT... --validation TEXT... \
    --vocab-size 8192 --max-seq-length 128 --pairs none --out DATA

environment:
  PIECE_MINUTES=N  stop after about N minutes, saved, with exit code 3; the same command goes on
  STEPS=8000       optimizer steps of a grown run, 32 sequences each
  LAYERS=12 HIDDEN=64 HEADS=2 SMALL=3   the target, and the layers of the small model; LAYERS is a
                   multiple of 4 and of SMALL
  PEAK=4e-3        peak learning rate of all runs; an OUT for each value of it
  SEED=1           of all runs; an OUT for each
  VOCAB=8192       size of DATA's vocabulary
  ONLY="A B"       the names of the runs to train; nothing is compared. Tune PEAK by
                   ONLY=scratch first, with an OUT for each
  DRY_RUN=1        print the commands
exit codes: 0 compared, 2 your mistake, 3 stopped early (the same command continues)
TEXT
}

[[ "${1:-}" == -h || "${1:-}" == --help ]] && { usage; exit 0; }
[[ $# == 2 && "$1" != -* && "$2" != -* ]] || { usage >&2; exit 2; }
data="$1" out="$2"
steps="${STEPS:-8000}" peak="${PEAK:-4e-3}" seed="${SEED:-1}" vocab="${VOCAB:-8192}"
piece="${PIECE_MINUTES:-0}"
layers="${LAYERS:-12}" hidden="${HIDDEN:-64}" heads="${HEADS:-2}" small="${SMALL:-3}"
batch=32 evaluated=64 engine=cpu_bf16.json
# shellcheck source=benchmarks/evidence_runs.sh
source "$(dirname "${BASH_SOURCE[0]}")/evidence_runs.sh"
check_numbers
((layers % 4 == 0 && layers % small == 0 && layers > small)) ||
    fail "LAYERS: got $layers; allowed: a multiple of 4 and of SMALL, $small, and more than that"
[[ -n "${DRY_RUN:-}" ]] || check_data

branch() { # NAME PERCENT STAGE...: one way on from the trunk, of STEPS in all
    local name="$1" at=$((steps * $2 / 100)) IFS=,
    shift 2
    printf '{"name": "%s", "at": %d, "decay_steps": %d, "stages": [%s]}, ' \
        "$name" "$at" $((steps / 5)) "$*"
}

hop() { # NAME PERCENT FIELDS: one growth to the full size
    branch "$1" "$2" "$(full $((steps - steps * $2 / 100)) "$3")"
}

between() { # LAYERS PERCENT [FIELDS]: a stage of so much of STEPS
    echo "{\"num_hidden_layers\": $1, \"steps\": $((steps * $2 / 100))${3:+, $3}}"
}

ways() { # all that the trunk branches into
    local percent stages stack='"depth": "stack"'
    for percent in 30 45 60 70; do hop "stack_$percent" $percent "$stack"; done
    hop keep_60 60 "$stack, \"moments\": \"keep\""
    hop grow_60 60 "$stack, \"moments\": \"grow\""
    hop faster_60 60 "$stack, \"moments\": \"keep\", \"rewarm\": {\"parameters\": \"new\", \"start\": 1.0, \"factor\": 1.3, \"steps\": $((steps / 40))}"
    hop interleave_60 60 '"depth": "interleave"'
    hop exact_60 60 '"depth": "identity_exact", "moments": "keep"'
    hop random_60 60 '"depth": "random", "moments": "keep"'
    stackingbert "$stack"
    if ((small < quarter && quarter % small == 0)); then
        branch hops 30 "$(between "$quarter" 45 "$stack")" "$(full $((steps - steps * 30 / 100 - \
            steps * 45 / 100)) "$stack")"
    fi
    if ((small == quarter)); then
        mapfile -t stages < <(mslt_stages)
        branch mslt 20 "${stages[@]:1}"
    fi
}

# Gong et al. 2019: quarter depth for 12.5 % of the steps, half depth for 17.5 %. Where the small model
# is less than a quarter, it is doubled more often, in the paper's quarter: of STEPS, in percent,
#   SMALL = LAYERS/4         1/4 to 12, 1/2 to 30
#   SMALL < LAYERS/4    ...  1/8 to 5, 1/4 to 12, 1/2 to 30    (and 1/16 to 2, 1/32 to 1)
# as each of the paper's two ends is at 0.4 of the next. The first growth leaps over depths that are
# no multiple of SMALL: 1 -> 3 -> 6 -> 12.
stackingbert() { # FIELDS
    local ends=(1 2 5 12 30) depth="$layers" depths=() stages=() index share left
    while ((depth % (2 * small) == 0 && depth / 2 > small && ${#depths[@]} < 4)); do
        depth=$((depth / 2))
        depths=("$depth" "${depths[@]}")
    done
    ends=("${ends[@]: -${#depths[@]}-1}")
    left=$((steps - steps * ends[0] / 100))
    for index in "${!depths[@]}"; do
        share=$((ends[index + 1] - ends[index]))
        stages+=("$(between "${depths[index]}" "$share" "$1")")
        left=$((left - steps * share / 100))
    done
    branch stackingbert "${ends[0]}" "${stages[@]}" "$(full "$left" "$1")"
}

mslt_stages() { # Yang et al. 2020: a fifth each; only the new quarter trains, all in the last
    local quarters
    between "$quarter" 20
    for quarters in 2 3 4; do
        between $((quarters * quarter)) 20 \
            "\"depth\": \"copy_top\", \"freeze\": {\"layers\": $(((quarters - 1) * quarter))}"
    done
    full $((steps - 4 * (steps * 20 / 100)))
}

mslt() { # from a quarter, where the trunk is none
    local stages
    stages="$(mslt_stages | paste -sd,)"
    train mslt "$layers" "$steps" "[$stages]" "" "branches=[]"
}

compound() { # a narrow small model, then depth and inner width at once
    local early=$((steps * 60 / 100))
    local first="{\"num_hidden_layers\": $small, \"intermediate_size\": $hidden, \"steps\": $early}"
    train compound_60 "$layers" "$steps" \
        "[$first, $(full $((steps - early)) '"depth": "stack", "ffn": "split"')]" "" "branches=[]"
}

compoundgrow() { # Gu et al. 2021: depth, inner width and length (by pooling) for 20, 25, 10 and 45 %
    local narrow="\"intermediate_size\": $hidden, \"pooling\": \"mean\", \"pooling_size\": 2"
    local again="\"rewarm\": {\"steps\": $((steps / 40))}" left
    left=$((steps - steps * 20 / 100 - steps * 25 / 100 - steps * 10 / 100))
    train compoundgrow "$layers" "$steps" "[$(between "$quarter" 20 "$narrow"), $(
        between $((layers / 2)) 25 "$narrow, \"depth\": \"stack\", $again"), $(
        between $((layers / 2)) 10 "\"ffn\": \"tile\", $again"), $(
        full "$left" "\"depth\": \"stack\", $again")]" "" "branches=[]"
}

flops() { # LAYERS: of a sequence of 128 tokens, 20 of them masked, forward (stacking/cost.py)
    local square=$((hidden * hidden)) layer last head
    layer=$((128 * (24 * square + 4 * hidden * 128)))
    last=$((128 * 6 * square + 20 * (18 * square + 4 * hidden * 128)))
    head=$((20 * (2 * square + 2 * hidden * vocab)))
    echo $((($1 - 1) * layer + last + head))
}

controls() { # small models that never grow; the longest costs as much as growing at 20 % of STEPS
    local depth dearest
    dearest=$((20 * $(flops "$small") + 80 * $(flops "$layers")))
    for depth in $(printf '%s\n' "$small" "$quarter" $((layers / 2)) | sort -nu); do
        alone "alone_$depth" "$depth" $((dearest / $(flops "$depth"))) "0.35 0.5 0.7"
    done
}

trunk() { # a little longer than the last growth, which comes before the rate falls
    local found total=$((steps * 90 / 100))
    found="$(ways)"
    train trunk "$small" "$total" "[{\"num_hidden_layers\": $small, \"steps\": $total}]" \
        "$(grep -o '"name": "[^"]*' <<<"$found" | cut -d'"' -f4 | tr '\n' ' ')" \
        "branches=[]" "growth_branches=[${found%, }]"
}

runs() {
    alone scratch "$layers" 120 "0.35 0.5 0.65 0.83"
    trunk
    ((small == quarter)) || mslt
    compound
    compoundgrow
    controls
}

quarter=$((layers / 4))
all_runs
compare
