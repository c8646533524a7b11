"""Jobs in, results out in the order of the jobs: in this process, in others, or on MPI's ranks."""

import importlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import TypeVar

from data_prep.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")


class Workers:
    """Runs a function of one argument over many jobs; a job's result never depends on another."""

    def __init__(self, executor: Executor | None, size: int) -> None:
        """`executor` None: in this process."""
        self._executor = executor
        self.size = size

    def run(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Yield the results in the order of the jobs; few jobs are taken before they are needed.

        An error of a job is raised here, at its place.
        """
        if self._executor is None:
            yield from map(function, jobs)
            return
        waiting: deque[Future[Result]] = deque()
        try:
            for job in jobs:
                waiting.append(self._executor.submit(function, job))
                while len(waiting) > 2 * self.size:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed (out of memory?); the same command goes on from "
                "here, perhaps with fewer --workers"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def open_workers(size: int, use_mpi: bool) -> Iterator[Workers | None]:
    """Start `size` worker processes, or take MPI's ranks; None on an MPI rank other than the first,
    once the first one has no more work for it.
    """
    if use_mpi:
        with _mpi_executor() as (executor, ranks):
            yield None if ranks == 0 else Workers(executor, ranks)
    elif size == 1:
        yield Workers(None, 1)
    else:
        # Spawned, not forked: HDF5, Arrow and the tokenizer have threads and locks of their own.
        with ProcessPoolExecutor(size, get_context("spawn"), _start_worker) as pool:
            yield Workers(pool, size)


@contextmanager
def _mpi_executor() -> Iterator[tuple[Executor | None, int]]:
    """Yield mpi4py's executor and its workers: on rank 0 the others, or 1 and no executor where it
    is alone; on every other rank (None, 0), after its work.
    """
    try:
        mpi = importlib.import_module("mpi4py.MPI")
        futures = importlib.import_module("mpi4py.futures")
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"--mpi needs the package mpi4py and an MPI library ({error}); install them, or use "
            "--workers"
        ) from error
    world = mpi.COMM_WORLD
    if world.Get_size() == 1:
        yield None, 1
        return
    with futures.MPICommExecutor(world, root=0) as executor:
        if executor is not None:
            yield executor, world.Get_size() - 1
            return
    yield None, 0


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and die with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # A killed parent cannot tell its workers; each of them would wait for work for ever.
    parent = parent_process()
    assert parent is not None, "only spawned processes run this"
    parent.join()
    os._exit(1)
