#!/usr/bin/env bash
# The whole story, on a CPU in minutes: raw text -> shards -> a BERT grown while it trains -> a
# Hugging Face folder -> a report. Installs what it needs first. See --help.
set -euo pipefail

if [[ "${1:-}" == -* || $# -gt 1 ]]; then
    echo "usage: bash launch/demo.sh [OUT]"
    echo "Prepares the shipped corpus, pre-trains a small BERT 2 -> 4 -> 8 layers on 2 CPU ranks (or on"
    echo "all GPUs of this machine), exports it and writes a report, all under OUT (default: demo_out)."
    echo "The same command continues an interrupted demo; nothing finished is done twice."
    echo "exit codes: 0 done, 2 your mistake, 3 stopped early (the same command continues), 1 our bug"
    [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0 || exit 2
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
out="${1:-demo_out}"
marker="$out/made_by_demo.txt"
if [[ -e "$out" && ! -f "$marker" ]] && ! rmdir "$out" 2>/dev/null; then # an empty folder may go
    echo "error: $out exists and was not made by this demo; give another OUT" >&2
    exit 2
fi
source "$root/launch/setup_env.sh"
mkdir -p "$out"
echo "Made by launch/demo.sh; the same command continues here." >"$marker"
exec 8>>"$out/.lock" # inherited by the ranks: they hold it, too, should this script be killed
flock -n 8 || { echo "waiting for an earlier demo that is still running in $out"; flock 8; }

step() { # TITLE FILE COMMAND...: runs the command unless the file, its last result, is there
    local title="$1" result="$2"
    shift 2
    if [[ -e "$result" ]]; then echo "== $title: already done"; else echo "== $title"; "$@"; fi
}

pretrain() {
    local ranks interrupted="" code=0
    ranks="$(python -c 'import torch; print(torch.cuda.device_count())')"
    if [[ "$ranks" == 0 ]]; then
        ranks=2
        export DS_ACCELERATOR=cpu
    fi
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) > ranks ? $(nproc) / ranks : 1))}"
    # In the background, so that Ctrl-C leaves the launcher alone while the ranks save and stop.
    trap 'interrupted=yes' INT
    deepspeed --num_gpus "$ranks" --master_port "$(free_port)" --log_level critical \
        "$root/launch/pretrain.py" --recipe "$root/launch/recipes/demo.json" \
        --data "$out/data" --run-dir "$out/run" --resume auto &
    while kill -0 $! 2>/dev/null; do wait $! && code=0 || code=$?; done
    trap - INT
    if [[ -n "$interrupted" || "$code" == 3 ]]; then
        echo "stopped early; to continue: bash $0 $out" >&2
        exit 3
    fi
    [[ "$code" == 0 ]] || exit "$code"
    touch "$out/run.finished"
}

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

step "1/4 text to shards" "$out/data/manifest.json" \
    python "$root/launch/prepare_data.py" shards "$root"/data_prep/sample/*train*.xz \
    --validation "$root"/data_prep/sample/*valid*.xz \
    --vocab-size 8192 --max-seq-length 128 --pairs none --out "$out/data"
step "2/4 pre-train, growing 2 -> 4 -> 8 layers" "$out/run.finished" pretrain
step "3/4 export to Hugging Face" "$out/hf/config.json" \
    python "$root/launch/export.py" "$out/run" --out "$out/hf" --language en \
    --data-license "CC BY-SA 4.0 (Wikipedia), public domain (Austen)"
echo "== 4/4 report"
python "$root/launch/report.py" "$out/run"
echo "Hugging Face folder  $out/hf"
echo "try it               $(command -v python) -c \"from transformers import pipeline as p; f = p('fill-mask', '$out/hf');" \
    "[print(r['sequence']) for r in f('she was born in the [MASK] of france .')]\""
