"""Independent jobs, one after the other or several at a time, each in a process of its own."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from stacking import distributed
from stacking.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


class JobLostError(UserError):
    """A process ended without an answer."""


def side_by_side(
    run: Callable[[Job], Result], jobs: Sequence[Job], processes: int
) -> Iterator[Result]:
    """The results as they come, each once. `run` is a module's function, `jobs` can be pickled.

    With one process all runs in this one. Otherwise each process gets its share of the cores, and
    the GPUs in turn. A fault of one job ends all; what others had finished was yielded. No process
    outlives the iterator, or this process.
    """
    if processes == 1 or not jobs:
        yield from map(run, jobs)
        return
    count = min(processes, len(jobs))
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(count):
        numbers.put(number)
    distributed.share_cores(count)
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(numbers,))
    try:
        with _left_alone_by_ctrl_c():
            futures = [pool.submit(run, job) for job in jobs]
        for done in as_completed(futures):
            yield done.result()
    except BrokenProcessPool as error:
        raise JobLostError(
            "a process ended without a word, killed or out of memory; finished jobs are kept: the "
            "same command goes on, with fewer --processes if memory is short"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


@contextmanager
def _left_alone_by_ctrl_c() -> Iterator[None]:
    """Processes that start in here leave Ctrl-C to this one, which ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin(numbers: "multiprocessing.Queue[int]") -> None:
    """Of each process, before its first job."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    distributed.take_device(numbers.get())


def _end_with_parent() -> None:
    """A parent that was killed ends nobody: nothing else would end this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
