"""Checkpoints written while training goes on: the main rank's thread, one tag at a time.

DeepSpeed's own fast and decoupled writers do not work with plain data parallelism (0.19.8).
Writing, hashing and syncing release Python's lock, so that the training thread hardly notices.
"""

import warnings
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor

from stacking.checkpoint import CheckpointManager, TrainState
from stacking.errors import CheckpointError
from stacking.snapshot import Snapshot


class CheckpointWriter:
    """Commits snapshots in the order in which they come; holds one at most.

    Without snapshots, as on all ranks but the main one, it does nothing.
    """

    def __init__(self, manager: CheckpointManager) -> None:
        """`manager`: of the run's folder."""
        self._manager = manager
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._pending: Future[None] | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the last save ended in a fault, which `settle` would raise."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def write(self, tag: str, snapshot: Snapshot, state: TrainState) -> None:
        """Begin to commit `tag`. Call `settle` before; nobody may change the snapshot's tensors."""
        assert self._pending is None, "the save before is not settled"
        self._pending = self._thread.submit(self._manager.save, tag, snapshot, state)

    def settle(self) -> None:
        """Wait until what was begun is committed; CheckpointError if it is not.

        Until then it is pending: `close` may be called from the watch's thread meanwhile.
        """
        try:
            if self._pending is not None:
                self._pending.result()
        finally:
            self._pending = None

    def close(self, at_most: float | None = None) -> None:
        """Finish what was begun and end the thread; a fault that nobody settled is but logged.

        `at_most`: seconds after which a save is left to itself; None: it is waited for. Python's
        own end waits for the thread all the same, unless the process is ended (rank_watch.py).
        """
        pending = self._pending
        try:
            if pending is not None:
                pending.result(at_most)
        except (CheckpointError, futures.TimeoutError) as fault:
            warnings.warn(str(fault) or "a save did not end", stacklevel=2)
        finally:
            self._thread.shutdown(wait=False)
