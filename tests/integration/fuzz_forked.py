"""launch/pretrain.py in a fork of this process: DeepSpeed is imported once, every run is fresh."""

import os
import resource
import runpy
import sys
import tempfile
import time
import traceback

from launching import LAUNCH, free_port

LIMIT = 120.0  # seconds a run


def train_forked(*arguments: object) -> tuple[int, str]:
    """Exit code and all output of one run on one rank; 255 and a traceback for an exception."""
    import stacking.trainer  # noqa: F401, PLC0415  slow, and only some runs need it

    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os._exit(_run(arguments))
        status = _waited(child)
        output.seek(0)
        return status, output.read().decode(errors="replace")


def _waited(child: int) -> int:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError(f"the run hangs: no end after {LIMIT:.0f} s")


def _run(arguments: tuple[object, ...]) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115  the files, not a caller's
    sys.argv = ["pretrain.py", *map(str, arguments)]
    try:
        code = int(runpy.run_path(str(LAUNCH / "pretrain.py"), run_name="fuzzed")["main"]())
    except SystemExit as end:
        code = int(str(end.code))
    except BaseException:  # a process boundary: the parent reads this text
        traceback.print_exc()
        code = 255
    sys.stdout.flush()
    sys.stderr.flush()
    return code
