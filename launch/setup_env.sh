#!/usr/bin/env bash
# Makes this checkout ready to run. Sourced by launch/demo.sh and tests/run.sh; may be run by hand.
#
# Uses the active virtual environment (VIRTUAL_ENV or CONDA_PREFIX), else makes .venv here, and
# installs what setup.py asks for in the versions of constraints.txt. Packages that an active
# environment already has are kept where setup.py allows their version. When nothing is to be done
# it returns at once. Two calls at once are safe; a killed one is redone.
#
# Environment: TORCH_INDEX_URL  where pip looks for torch (passed on as --index-url), for a machine
#                               whose package index has no CPU build, or another CUDA's
# Afterwards PATH starts with the environment's programs.

PBT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
PBT_TORCH="$(sed -n 's/^torch==//p' "$PBT_ROOT/constraints.txt")"

pbt_setup() {
    local env="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" own=""
    if [ -z "$env" ] || [ "$env" -ef "$PBT_ROOT/.venv" ]; then
        env="$PBT_ROOT/.venv" own=yes
    elif [ ! -x "$env/bin/python" ]; then
        pbt_fail "the active environment $env has no bin/python; deactivate it or repair it"
        return 2
    fi
    local state="$env/.setup" stamp
    stamp="$env $PBT_ROOT $(cat "$PBT_ROOT/constraints.txt" "$PBT_ROOT/setup.py" | cksum)"
    if ! pbt_is_done; then
        mkdir -p "$state" 2>/dev/null ||
            { pbt_fail "cannot write into $env; deactivate it, and .venv will be used"; return 2; }
        # In a subshell: the lock goes with it, and so does what the steps change.
        ( pbt_lock "$state/lock" && { pbt_is_done || pbt_install; } ) 9>>"$state/lock" || return
    fi
    export PATH="$env/bin:$PATH"
}

pbt_is_done() { [ "$(cat "$state/stamp" 2>/dev/null)" = "$stamp" ] && [ -x "$env/bin/python" ]; }

pbt_lock() { # waits for another call on this environment; where there is no flock, nobody waits
    command -v flock >/dev/null || return 0
    flock -n 9 || { echo "setup: waiting for another setup of $env" >&2; flock 9; }
}

pbt_install() {
    local log="$env/install.log" python="$env/bin/python" pins="$PBT_ROOT/constraints.txt"
    if [ -n "$own" ]; then pbt_make_venv || return; else echo "setup: using $env" >&2; fi
    : >"$log"
    touch "$state/unfinished"
    if [ -z "$own" ]; then
        pins="$state/constraints.txt"
        pbt_pins_of_missing_packages >"$pins" || return
    fi
    pbt_install_torch || return
    # Without isolation DeepSpeed is built against the torch above, not against one of its own.
    pbt_pip "build tools" -c "$pins" setuptools ninja || return
    pbt_pip "the rest (about a minute)" -c "$pins" --no-build-isolation -e "$PBT_ROOT[dev]" || return
    echo "$stamp" >"$state/stamp"
    rm -f "$state/unfinished"
    echo "setup: ready in $env" >&2
}

pbt_make_venv() { # an unfinished environment, or one copied from elsewhere, is made anew
    local found base=""
    if [ -e "$state/unfinished" ] || { [ -e "$state/stamp" ] && [[ "$(cat "$state/stamp")" != "$env "* ]]; }; then
        echo "setup: removing an unfinished or copied environment" >&2
        find "$env" -mindepth 1 -maxdepth 1 ! -name .setup -exec rm -rf {} +
        rm -f "$state/stamp"
    fi
    [ -x "$python" ] && "$python" -m pip --version >/dev/null 2>&1 && return
    for found in python3.11 python3.12 python3.10 python3; do
        if "$found" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            base="$found"
            break
        fi
    done
    [ -n "$base" ] || { pbt_fail "no Python 3.10 or newer found; install one (python3.11 is what we test)"; return 2; }
    echo "setup: making .venv with $("$base" --version)" >&2
    "$base" -m venv "$env" >"$env/install.log" 2>&1 && return
    tail -n 20 "$env/install.log" >&2
    pbt_fail "$base cannot make a virtual environment; on Debian and Ubuntu: apt-get install $(basename "$base")-venv"
    return 2
}

pbt_pins_of_missing_packages() { # constraints.txt less the packages that are here: those are kept
    "$python" - "$PBT_ROOT/constraints.txt" <<'PYTHON'
import importlib.metadata, re, sys

def key(name):
    return re.sub(r"[-_.]+", "-", name).lower()

here = {key(found.metadata["Name"]) for found in importlib.metadata.distributions()}
for line in open(sys.argv[1]):
    if not line.startswith("#") and key(line.split("==")[0]) not in here:
        print(line, end="")
PYTHON
}

pbt_install_torch() { # the plain build has CUDA on Linux: 3 GB that a machine without GPU never uses
    "$python" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null && return
    local from=()
    [ -z "${TORCH_INDEX_URL:-}" ] || from=(--index-url "$TORCH_INDEX_URL")
    if pbt_has_gpu || [ "$(uname -s)" != Linux ] || [ -n "${TORCH_INDEX_URL:-}" ]; then
        pbt_pip "torch $PBT_TORCH" ${from[@]+"${from[@]}"} "torch==$PBT_TORCH"
    elif ! pbt_pip "torch $PBT_TORCH, CPU build" --try "torch==$PBT_TORCH+cpu"; then
        # No host name stands in this repository, so the CPU index must come from the user.
        echo "setup: this machine's package index has no CPU build of torch; taking the plain one, which is" \
            "large on Linux. To avoid that, stop here and set TORCH_INDEX_URL to PyTorch's CPU index" >&2
        pbt_pip "torch $PBT_TORCH" "torch==$PBT_TORCH"
    fi
}

pbt_has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

pbt_pip() { # WHAT [--try] ARGS: one line on the terminal, everything else in the log
    local what="$1" try=""
    shift
    if [ "$1" = --try ]; then try=yes; shift; fi
    echo "setup: installing $what" >&2
    "$python" -m pip install --disable-pip-version-check --no-input "$@" </dev/null >>"$log" 2>&1 && return
    [ -z "$try" ] || return 1
    tail -n 20 "$log" >&2
    pbt_fail "could not install $what; the whole log is $log"
    return 1
}

pbt_fail() { echo "error: $*" >&2; }

pbt_setup
