"""Training jobs that start in a second: forks of a process that has imported everything.

`WarmJobs` runs this file as a script: a server that imports torch, DeepSpeed and the trainer, runs
no torch operation (a fork after torch's threads have started may hang), and forks one process a
rank. Each runs launch/pretrain.py as a program, from its command line to the interpreter's end, in
the job's own process group. Real launchers have tests of their own: test_clean_exits.py.
"""

import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from launching import LAUNCH, environment, free_port

START_SECONDS = 120.0  # for the server's imports, on a busy machine
IMPORTS = (
    "stacking.trainer", "torch.utils.tensorboard",
    # What DeepSpeed imports when it builds an optimizer.
    "deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo.aot_compile",
    "torch._inductor.compile_fx",
)  # fmt: skip
PRETRAIN = LAUNCH / "pretrain.py"


class Job:
    """The ranks of one training job."""

    def __init__(self, server: "WarmJobs", pids: list[int], folder: Path) -> None:
        self._server = server
        self._codes: dict[int, int] = {}
        self.pids = pids
        self.folder = folder

    def poll(self) -> list[int | None]:
        """Exit code of each rank, -9 if it was killed; None while it runs."""
        for pid in self.pids:
            if pid not in self._codes:
                code = self._server.ask({"poll": pid})
                if code is not None:
                    self._codes[pid] = code
        return [self._codes.get(pid) for pid in self.pids]

    @property
    def is_running(self) -> bool:
        return None in self.poll()

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Exit codes by rank; AssertionError, and nothing left running, after `seconds`."""
        deadline = time.monotonic() + seconds
        while self.is_running:
            if time.monotonic() > deadline:
                alive = [rank for rank, code in enumerate(self.poll()) if code is None]
                self.kill()
                raise AssertionError(f"ranks {alive} run after {seconds:.0f} s\n{self.errors()}")
            time.sleep(0.005)
        return [self._codes[pid] for pid in self.pids]

    def kill(self, rank: int | None = None, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank, or to all at once."""
        with contextlib.suppress(ProcessLookupError):
            if rank is None:
                os.killpg(self.pids[0], number)
            else:
                os.kill(self.pids[rank], number)

    def output(self, rank: int = 0) -> str:
        return (self.folder / f"rank{rank}.out").read_text()

    def errors(self) -> str:
        """What all ranks wrote to standard error."""
        paths = [self.folder / f"rank{rank}.err" for rank in range(len(self.pids))]
        return "".join(path.read_text() for path in paths)


class WarmJobs:
    """The server, and what it is asked."""

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        """`prefix`: words before the server's command, such as `unshare --mount`."""
        self.process = subprocess.Popen(
            [*prefix, sys.executable, __file__], env=environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._number = 0
        assert self._answer(START_SECONDS) == "ready"

    def ask(self, request: Mapping[str, Any]) -> Any:
        """One question to the server, its answer."""
        _to(self.process).write(json.dumps(request) + "\n")
        _to(self.process).flush()
        return self._answer(30.0)

    def _answer(self, seconds: float) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        assert line, "the server of warm jobs says nothing"
        return json.loads(line)

    def start(
        self,
        arguments: Sequence[object],
        folder: Path,
        ranks: int = 2,
        variables: Mapping[str, str] | None = None,
        file_bytes: int | None = None,
    ) -> Job:
        """Start `pretrain.py ARGUMENTS` on `ranks` ranks; their output goes into `folder`.

        `file_bytes`: no file may grow beyond this (RLIMIT_FSIZE): a full disk for everybody.
        """
        self._number += 1
        folder = folder / f"job{self._number}"
        folder.mkdir(parents=True)
        shared = {
            "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **(variables or {}),
        }  # fmt: skip
        pids: list[int] = []
        for rank in range(ranks):
            for kind in ("out", "err"):  # to be read however early the rank is killed
                (folder / f"rank{rank}.{kind}").touch()
            places = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            pids.append(
                self.ask({
                    "arguments": [str(PRETRAIN), f"--local_rank={rank}", *map(str, arguments)],
                    "variables": {**shared, **places}, "group": pids[0] if pids else 0,
                    "output": str(folder / f"rank{rank}"), "file_bytes": file_bytes,
                })
            )  # fmt: skip
        return Job(self, pids, folder)

    def run(
        self, arguments: Sequence[object], folder: Path, ranks: int = 2, **more: Any
    ) -> tuple[list[int], Job]:
        """Start a job and wait for its end; exit codes by rank."""
        job = self.start(arguments, folder, ranks, **more)
        return job.wait(), job

    def close(self) -> None:
        """End the server, which ends all that it started."""
        _to(self.process).close()
        self.process.wait(30)


@contextlib.contextmanager
def warm(prefix: Sequence[str] = ()) -> Iterator[WarmJobs]:
    """A server that ends with the block."""
    jobs = WarmJobs(prefix)
    try:
        yield jobs
    finally:
        jobs.close()


def _to(process: "subprocess.Popen[str]") -> IO[str]:
    assert process.stdin is not None
    return process.stdin


# -- the server --------------------------------------------------------------------------------


def _serve() -> None:
    """Answer requests until the client closes; a fork returns from here as a rank."""
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # or each rank's collections would walk, and so copy, all that was imported
    assert len(os.listdir("/proc/self/task")) == 1, "threads before a fork"
    running: set[int] = set()
    _say("ready")
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            running.discard(pid)
            _say(os.waitstatus_to_exitcode(status) if pid else None)
            continue
        pid = os.fork()
        if pid == 0:
            _become_a_rank(request)
            return
        os.setpgid(pid, request["group"] or pid)  # the child may not have run yet
        running.add(pid)
        _say(pid)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _say(answer: object) -> None:
    print(json.dumps(answer), flush=True)


def _become_a_rank(request: dict[str, Any]) -> None:
    os.setpgid(0, request["group"])
    os.environ.update(request["variables"])
    sys.argv = request["arguments"]
    for number, name in ((0, None), (1, ".out"), (2, ".err")):
        path = os.devnull if name is None else request["output"] + name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if request["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)


if __name__ == "__main__":
    _serve()
    runpy.run_path(sys.argv[0], run_name="__main__")  # a rank; the server never gets here
