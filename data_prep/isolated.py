"""A function in a process of its own: what it reads may crash or hang a C library, and this program
goes on. HDF5 2.0 does both on damaged variable-length data.
"""

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

# A file is given up after this; reading is two orders of magnitude faster.
_PATIENCE_SECONDS = 60.0
_LEAST_BYTES_A_SECOND = 1e5


def patience(path: Path) -> float:
    """Return the seconds that reading a file may take before it is taken for damaged."""
    return _PATIENCE_SECONDS + path.stat().st_size / _LEAST_BYTES_A_SECOND


def crash_message(path: Path) -> str:
    """Return what a `None` of `Isolated.run` means for the file that was read."""
    return f"{path}: corrupt: the HDF5 library crashes or hangs on its rows"


class Isolated(Generic[Job, Result]):
    """Runs a module-level function job by job in one other process, started anew after a crash."""

    def __init__(self, function: Callable[[Job], Result]) -> None:
        """Start nothing yet."""
        self._function = function
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> "Isolated[Job, Result]":
        """Return the runner."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process."""
        self._stop()

    def run(self, job: Job, seconds: float) -> Result | None:
        """Return the result; None where the process crashed, or took longer than `seconds`."""
        if self._process is None:
            # Spawned, not forked: HDF5 has a lock of its own.
            context = get_context("spawn")
            self._pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(self._function, theirs), daemon=True)
            process.start()
            self._process = process
            theirs.close()
        assert self._pipe is not None, "a process has a pipe"
        try:
            self._pipe.send(job)
            if self._pipe.poll(seconds):
                result: Result = self._pipe.recv()
                return result
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # It crashed: told below, as a hang is.
        self._stop()
        return None

    def _stop(self) -> None:
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None


def _serve(function: Callable[[Job], Result], pipe: "Connection") -> None:
    """Answer jobs until the other end is closed."""
    while True:
        try:
            job: Job = pipe.recv()
        except EOFError:
            return
        pipe.send(function(job))
