"""A rank that dies, hangs or leaves alone is named on all others, which then end: no silent hang.

Every rank tells the main rank's store once a second that it lives and where it stands; the main
rank reads them all, and its finding is read by all: two small requests a second and rank. When
the main rank is the one that is gone, the others see that in its own beats. On a fault every rank
prints one line and ends AT ONCE WITH EXIT CODE 4: "a rank died or hung; resumable": its main
thread may wait in a collective for ever, which nothing softer ends.

What happens to a rank, and the time until all others know it:
  killed, stopped, host or cable gone: `dead_after`, or 5 s where a collective of theirs fails
  the same of the main rank: `dead_after`, or one beat where its process has ended
  hangs, so that no rank has marked anything any more: `hung_after`
  leaves by an exception alone: at once where the others' collectives fail, else `error_grace`

One C call that holds the interpreter's lock makes a healthy rank silent: `dead_after` has to be
longer than the longest, such as the writing of a large file.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

# TCPStore is public, but not in the list that type checkers read.
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from stacking import distributed
from stacking.errors import UserError
from stacking.rank_ledger import (
    Beat,
    Fault,
    Place,
    RankLedger,
    State,
    WatchLimits,
    failed_text,
    silent_text,
)

EXIT_CODE = 4
MISTAKE_CODE = 2  # another rank met what the user has to mend
_RESUMABLE = "everything up to the last checkpoint is saved: the same command continues"
_CONNECT = timedelta(seconds=60)  # to find the main rank's store
_OWN = "127.0.0.1"
_FLUSH = 5.0  # seconds for the last words of a rank that leaves
_LAST_WORDS = 300  # characters of an error that the others are told
# What gloo, NCCL and torch say when a peer is gone; all but DistError are bare RuntimeErrors.
_LOST = re.compile(r"gloo|NCCL|c10d|ProcessGroup|Broken pipe|[Cc]onnection (closed|reset|refused)")


def end_process(code: int) -> None:
    """End now, whatever the main thread waits for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class RankWatch:
    """Watches all ranks inside its `with` block; all ranks enter and leave it. Costs one rank none.

    A rank that leaves by an exception tells the others. If it was a collective that failed, the
    block does not end before it is known whose fault that was, or that nobody knows.
    """

    def __init__(
        self, limits: WatchLimits | None = None, end: Callable[[int], None] = end_process
    ) -> None:
        """`end` ends the process; it may do something first, in a thread of the watch."""
        self._limits = limits or WatchLimits()
        self._end = end
        self._place = Place()
        self._state, self._detail = State.RUNNING, ""
        self._number = 0
        self._said = State.RUNNING  # what the store has
        self._fault: Fault | None = None
        self._is_store_gone = False
        self._main_beat = Beat(-1, State.RUNNING, Place())
        self._main_heard = 0.0
        self._now = 0.0  # seconds that this process was awake, not what passed meanwhile
        self._store: TCPStore | None = None
        self._threads: list[threading.Thread] = []
        self._nudge, self._look, self._stop = (threading.Event() for _ in range(3))

    def mark(self, step: int, phase: str, at_most: float = 0.0) -> None:
        """Say what this rank does from here on; all ranks mark the same things in the same order.

        Args:
            step: optimizer step.
            phase: a word or two for the message, such as "reading data".
            at_most: seconds that the phase may take, where more than `hung_after`.
        """
        last = self._place
        self._place = Place(step, last.nth + 1 if step == last.step else 0, phase, at_most)

    # -- coming and going ----------------------------------------------------------------------

    def __enter__(self) -> "RankWatch":
        """Open the store on the main rank, join it on the others. Collective; the group exists.

        UserError on all ranks where one cannot reach it.
        """
        if distributed.world_size() == 1:
            return self
        self._rank = distributed.rank()
        self._names = distributed.gather_objects(distributed.rank_name())
        self._ledger = RankLedger(self._names, self._limits)
        port = distributed.on_main(self._open)
        distributed.together(lambda: self._join(port))
        for loop in (self._talk, self._guard):
            thread = threading.Thread(target=loop, name=f"rank-watch{loop.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Say good-bye, or what went wrong, and stop watching."""
        if not self._threads:
            return
        if self._state is State.RUNNING:
            self._detail = "" if error is None else _last_words(error)
            is_lost = error is not None and is_lost_peer(error)
            failed = State.MISTAKE if isinstance(error, UserError) else State.ERROR
            self._state = State.LOST if is_lost else failed if error else State.BYE
        self._nudge.set()
        self._linger()
        self._stop.set()
        self._nudge.set()
        self._look.set()
        for thread in self._threads:
            thread.join(_FLUSH)
        self._threads = []
        self._store = None

    def _linger(self) -> None:
        """Until the others know that this rank leaves, or why it had to."""
        limits = self._limits
        talk, guard = self._threads
        if self._state in (State.LOST, State.TOLD):
            guard.join(limits.dead_after + limits.error_grace + _FLUSH)
            if self._state is State.TOLD:  # it ends this process, when a save is finished
                guard.join()
        elif distributed.is_main():
            # The store ends with this rank, so it is the last to leave.
            seconds = limits.error_grace + limits.soon if self._detail else limits.dead_after
            self._wait(lambda: not talk.is_alive() or not self._ledger.here(but=[0]), seconds)
            if self._state is State.BYE and self._ledger.here(but=[0]):
                self._state = State.CLOSED
                time.sleep(2.5 * limits.interval)  # until they have read it
        else:
            self._wait(lambda: not talk.is_alive() or self._said is self._state, _FLUSH)

    def _wait(self, is_done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not is_done() and time.monotonic() < deadline:
            self._nudge.set()
            time.sleep(self._limits.interval / 20)

    def _open(self) -> int:
        """Start the store; its port."""
        try:
            # It listens on all addresses; what this rank itself uses outlives the network's.
            store = TCPStore(_OWN, 0, is_master=True, wait_for_workers=False, timeout=_CONNECT)
        except (DistError, OSError) as error:
            raise UserError(
                f"cannot open a store for the watch over the ranks: {_first_line(error)}"
            ) from error
        # Every key that is read exists from now on: a reader never waits.
        for key in (*map(_key, range(len(self._names))), "fault"):
            store.set(key, "")
        self._store = store
        return store.port

    def _join(self, port: int) -> None:
        """Find the main rank's store."""
        if self._store is not None:
            return
        host = distributed.master_address() or _OWN
        try:
            self._store = TCPStore(host, port, wait_for_workers=False, timeout=_CONNECT)
        except (DistError, OSError) as error:
            raise UserError(
                f"cannot reach the main rank's watch at {host}:{port} (MASTER_ADDR and a free "
                f"port); do the hosts let each other through? {_first_line(error)}"
            ) from error

    # -- the thread that talks to the store ----------------------------------------------------

    def _talk(self) -> None:
        """Beat and listen until the end; may block for ever where the main rank is frozen."""
        while not self._stop.is_set():
            state = self._state
            try:
                self._exchange(state)
            except RuntimeError:  # a thread's boundary: torch has several kinds
                self._is_store_gone = True
                self._look.set()
                return
            self._said = state
            if self._main_beat.state is State.CLOSED:
                return
            if self._fault is not None:
                self._look.set()
            is_urgent = self._fault is not None or state is not State.RUNNING
            self._nudge.wait(self._limits.interval / (10 if is_urgent else 1))
            self._nudge.clear()

    def _exchange(self, state: State) -> None:
        assert self._store is not None
        self._number += 1
        beat = Beat(self._number, state, self._place, self._detail)
        self._store.set(_key(self._rank), beat.packed())
        if self._rank == 0:
            self._read_all(self._store, beat)
            return
        main, fault = self._store.multi_get([_key(0), "fault"])
        heard = Beat.unpacked(main)
        if heard is not None and heard.number != self._main_beat.number:
            self._main_beat, self._main_heard = heard, self._now
        self._fault = self._fault or Fault.unpacked(fault)

    def _read_all(self, store: TCPStore, own: Beat) -> None:
        """The main rank's part: hear everybody, judge, publish."""
        others = range(1, len(self._names))
        self._ledger.hear(0, own, self._now)
        for rank, data in zip(others, store.multi_get([_key(r) for r in others]), strict=True):
            self._ledger.hear(rank, Beat.unpacked(data), self._now)
        if self._fault is None and (fault := self._ledger.fault(self._now)):
            store.set("fault", fault.packed())
            self._fault = fault

    # -- the thread that ends the process ------------------------------------------------------

    def _guard(self) -> None:
        """Wait for a fault; never touches the network, so that nothing can block it."""
        interval = self._limits.interval
        last = time.monotonic()
        while not self._stop.is_set():
            self._look.wait(interval)
            now = time.monotonic()
            # A process that was stopped itself must not take the others for dead.
            self._now += min(now - last, 2 * interval)
            last = now
            fault = self._fault or self._fault_of_main()
            if fault is not None:
                self._tell(fault)
                return
            if self._is_store_gone:
                return  # in order

    def _fault_of_main(self) -> Fault | None:
        """What another rank sees of the main rank, which cannot publish its own death."""
        beat = self._main_beat
        if self._rank == 0 or beat.state in (State.BYE, State.CLOSED):
            return None
        name = self._names[0]
        if self._is_store_gone:
            is_failed = beat.state in (State.ERROR, State.MISTAKE)
            gone = f"{name} has gone without a word (last: {beat.place})"
            is_mistake = beat.state is State.MISTAKE
            return Fault(failed_text(name, beat) if is_failed else gone, (0,), is_mistake)
        limits = self._limits
        silence = self._now - self._main_heard
        if silence > (limits.soon if self._state is State.LOST else limits.dead_after):
            return Fault(silent_text(name, silence, beat), (0,))
        return None

    def _tell(self, fault: Fault) -> None:
        """Print the fault once and end, unless this rank is on its way out with its own words."""
        own = self._state
        is_leaving = own in (State.ERROR, State.MISTAKE, State.BYE, State.CLOSED)
        if not is_leaving:
            self._state = State.TOLD
        seconds = 3 * self._limits.interval + 0.5
        if self._rank == 0:
            # The store ends with this process: the others read first.
            self._wait(lambda: not set(self._ledger.reachable(self._now)) - {0}, seconds)
        elif self._fault is not None:  # the main rank lives and wants to know who has read it
            self._wait(lambda: self._is_store_gone or self._said is self._state, seconds)
        if not (is_leaving and self._rank in fault.ranks):
            hint = "" if fault.is_mistake else f"; {_RESUMABLE}"
            sys.stderr.write(f"error: {fault.text}{hint}\n")
            sys.stderr.flush()
        if not is_leaving:
            self._end(MISTAKE_CODE if fault.is_mistake else EXIT_CODE)


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether the error, or one behind it, is a collective that another rank's end broke."""
    while error is not None:
        if isinstance(error, DistError):
            return True
        if isinstance(error, RuntimeError) and _LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _last_words(error: BaseException) -> str:
    said = " ".join(str(error).split()) or "no message"
    is_mistake = isinstance(error, UserError)
    return (said if is_mistake else f"{type(error).__name__}: {said}")[:_LAST_WORDS]


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _key(rank: int) -> str:
    return f"beat/{rank}"
