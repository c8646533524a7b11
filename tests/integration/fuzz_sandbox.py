"""A process that may crash, hang or eat memory: jobs in, verdicts out; started anew when it did."""

import multiprocessing
import resource
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

Job = Callable[..., str]

LIMIT = 20.0  # seconds a case; the slowest known take one
MEMORY = 3 * 2**30  # bytes a case may take above what the process has when it begins


class Sandbox:
    """Runs `job(*arguments)` in another process with little memory and little time."""

    def __init__(self, preload: str) -> None:
        """`preload`: the module that is imported once; each process is a fork of that one."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([preload])
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def run(self, job: Job, *arguments: object, limit: float = LIMIT) -> str:
        """The job's own word; AssertionError with a traceback, or how the process ended."""
        if self._process is None:
            self._start()
        assert self._pipe is not None
        assert self._process is not None
        end = ""
        try:
            self._pipe.send((job, arguments))
            if self._pipe.poll(limit):
                is_good, text = self._pipe.recv()
                if is_good:
                    return str(text)
                raise AssertionError(text)
            end = f"hangs: no answer after {limit:.0f} s"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(5)
            end = f"ended with exit code {self._process.exitcode}"
        self.close()
        raise AssertionError(f"the process {end}")

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None

    def _start(self) -> None:
        self._pipe, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._process = process
        assert self._pipe.poll(120), "the sandbox does not start"
        assert self._pipe.recv() == "ready"


def _serve(pipe: Connection) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            job, arguments = pipe.recv()
            try:
                answer = (True, job(*arguments))
            except BaseException:  # a process boundary: the parent fails with this text
                answer = (False, traceback.format_exc())
            pipe.send(answer)
