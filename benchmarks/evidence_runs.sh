# What the comparisons of growth with training from scratch share: sourced by evidence_*.sh, which
# set `layers hidden heads batch engine evaluated` and the variables below, and name the runs in a
# function `runs`, whose calls of `train` and `alone` do nothing while `listing`.
#
#   data out              folders
#   steps peak seed vocab piece   numbers of the environment, with their defaults
#
# Every run decays over its last fifth, unless a setting says otherwise. Nothing finished is done
# twice.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
began=$SECONDS
startup=60 # seconds that a run needs besides its training: imports, the first step, a last save
names=() folders=() listing=""
only=() # of the names; empty: all
read -ra only -d '' <<<"${ONLY:-}" || true

fail() { echo "error: $*" >&2; exit 2; }

check_numbers() { # the variables too, which are decimal then: bash takes 010 for 8
    local pair name given
    for pair in STEPS=steps PIECE_MINUTES=piece SEED=seed VOCAB=vocab LAYERS=layers HIDDEN=hidden \
        HEADS=heads SMALL=small; do
        name="${pair#*=}"
        [[ -v "$name" ]] || continue
        given="${!name}"
        [[ "$given" =~ ^[0-9]{1,9}$ ]] ||
            fail "${pair%=*}: got '$given'; allowed: a whole number of at most 9 digits"
        printf -v "$name" %d "$((10#$given))"
        [[ "$name" == piece || "$name" == seed ]] || ((${!name} > 0)) ||
            fail "${pair%=*}: got $given; allowed: 1 or more"
    done
    ((steps >= 100)) || fail "STEPS: got $steps; allowed: 100 or more"
    ((hidden % heads == 0)) || fail "HEADS: got $heads; allowed: a divisor of HIDDEN, $hidden"
    [[ "$peak" =~ ^(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?$ && "${peak%%[eE]*}" == *[1-9]* ]] ||
        fail "PEAK: got '$peak'; allowed: a number above 0, such as 4e-3"
}

is_wanted() { # NAME: whether ONLY has it, or has none
    ((${#only[@]} == 0)) || [[ " ${only[*]} " == *" $1 "* ]]
}

all_runs() { # those of `runs`, one after the other
    local name
    listing=1
    runs
    listing=""
    for name in "${only[@]}"; do
        [[ " ${names[*]} " == *" $name "* ]] || fail "ONLY: got '$name'; allowed: ${names[*]}"
    done
    runs
}

check_data() {
    [[ -d "$data" ]] || fail "DATA: there is no folder $data; --help says how to prepare one"
}

left() { # seconds of this piece
    echo $((piece * 60 - (SECONDS - began)))
}

say_or_do() {
    if [[ -n "${DRY_RUN:-}" ]]; then printf '%q ' "$@"; echo; else "$@"; fi
}

train() { # NAME LAYERS STEPS STAGES "BRANCH..." SETTING...: the settings name these branches
    local name="$1" depth="$2" total="$3" stages="$4" branches="$5" code=0 limit=() setting
    local settings=()
    shift 5
    if [[ -n "$listing" ]]; then
        names+=("$name")
        return 0
    fi
    for setting in "$@"; do settings+=(--set "$setting"); done
    folders+=("$out/$name")
    is_wanted "$name" || return 0
    if is_done "$name" "$branches"; then
        echo "== $name: already done" >&2
        return 0
    fi
    if ((piece > 0)); then
        (($(left) > 2 * startup)) || over
        limit=(--time-limit "$(($(left) - startup))s")
    fi
    echo "== $name" >&2
    say_or_do python "$root/launch/pretrain.py" --recipe "$root/launch/recipes/scratch_small.json" \
        --data "$data" --run-dir "$out/$name" \
        --deepspeed_config "$root/deepspeed_configs/$engine" \
        --set name="$name" --set seed="$seed" --set global_batch_size="$batch" \
        --set model.hidden_size="$hidden" --set model.num_hidden_layers="$depth" \
        --set model.num_attention_heads="$heads" --set model.intermediate_size=$((4 * hidden)) \
        --set model.vocab_size="$vocab" --set stages="$stages" \
        --set learning_rate.peak="$peak" --set learning_rate.warmup_steps=$((steps / 20)) \
        --set learning_rate.decay_steps=$((total / 5)) "${settings[@]}" \
        --set evaluation.every_steps=$((steps / 10)) --set evaluation.max_sequences=2048 \
        --set evaluation.batch_size="$evaluated" --set checkpoint.every_steps="$steps" \
        "${limit[@]}" || code=$?
    [[ "$code" != 3 ]] || over
    [[ "$code" == 0 ]] || exit "$code"
}

is_done() { # NAME "BRANCH...": whether the run and its branches have ended
    local place
    for place in . ${2:+$(printf 'branches/%s ' $2)}; do # no share and no name has a space
        grep -qs '"event": "run_end"' "$out/$1/$place/metrics.jsonl" || return 1
    done
}

over() {
    echo "stopped after $((SECONDS - began)) s; to continue: the same command" >&2
    exit 3
}

alone() { # NAME LAYERS PERCENT "SHARE...": of STEPS; of these the shares of shorter runs
    local total=$((steps * $3 / 100))
    local stage="{\"num_hidden_layers\": $2, \"steps\": $total}"
    train "$1" "$2" "$total" "[$stage]" "$4" "branches=[${4// /, }]"
}

full() { # STEPS [FIELDS]: the stage of full size
    echo "{\"num_hidden_layers\": $layers, \"steps\": $1${2:+, $2}}"
}

compare() { # ARGUMENT...: of all runs that were named
    ((${#only[@]} > 0)) || say_or_do python "$root/launch/compare.py" "${folders[@]}" "$@" \
        --out "$out/comparison"
}
