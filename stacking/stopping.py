"""When a run ends before its last step: a signal, a time limit or a number of steps.

SIGINT and SIGTERM are a wish to stop after this step; a signal's repetition is obeyed at once. So
it is inside a collective that waits for a rank that hangs, where Python runs no handler: a thread
then ends the process, with exit code 128 + the signal's number.
"""

import os
import re
import signal
import socket
import threading
import time
from dataclasses import dataclass
from enum import Enum
from types import FrameType, TracebackType

from stacking.errors import ConfigError

_DURATION = re.compile(r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OBEY_SECONDS = 2.0  # what a repeated signal leaves the main thread to end in its own way


class Outcome(Enum):
    """How a session ended."""

    DONE = "done"
    STOPPED = "stopped"  # by a signal or a limit; committed, and resumable


@dataclass(frozen=True)
class StopLimits:
    """Where a session ends, committed and resumable, though the recipe goes on.

    Attributes:
        seconds: time in this process, from `StopRequest.__enter__`; the step under way is finished
            and saved after that.
        steps: optimizer steps of the whole run.
    """

    seconds: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse a limit that leaves nothing to do."""
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"--max-steps: got {self.steps}; allowed: 1 or more")
        if self.seconds is not None and self.seconds <= 0:
            raise ConfigError("--time-limit: got no time; allowed: more than 0 seconds")

    def last_step(self, total_steps: int) -> int:
        """Optimizer steps that are done when the session ends by itself."""
        return min(total_steps, self.steps or total_steps)


def parse_duration(text: str, flag: str = "--time-limit") -> float:
    """ "2h", "90m", "1d12h", "45s" -> seconds; ConfigError, which names `flag`, otherwise."""
    match = _DURATION.fullmatch(text)
    if not text or match is None:
        raise ConfigError(
            f"{flag}: got {text!r}; allowed: days, hours, minutes and seconds, such as 2h, "
            "90m or 1d12h"
        )
    days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


class StopRequest:
    """Inside its `with` block the first signal of each kind only sets `is_requested`.

    Each kind counts by itself: on Ctrl-C DeepSpeed's launcher sends SIGTERM after the terminal's
    SIGINT, which is still one wish.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        """Nothing is caught before `with`; `time_limit`: seconds from there to a wish to stop."""
        self._has_signal = False
        self._time_limit = time_limit
        self._began = 0.0
        self._previous: dict[int, object] = {}
        self._has_ended = threading.Event()

    @property
    def is_requested(self) -> bool:
        """Whether a signal came or the time is over."""
        is_late = (
            self._time_limit is not None and time.monotonic() - self._began >= self._time_limit
        )
        return self._has_signal or is_late

    def __enter__(self) -> "StopRequest":
        """Catch both signals, start the clock."""
        self._began = time.monotonic()
        # Python's own C handler writes each signal's number there, whatever the main thread does.
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._previous_told = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._obey_repetition, name="signals", daemon=True).start()
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore what was there."""
        for number in list(self._previous):
            self._restore(number)
        signal.set_wakeup_fd(self._previous_told)
        self._has_ended.set()
        self._told.close()  # the thread reads an end

    def _obey_repetition(self) -> None:
        """End the process if it does not end itself soon after a signal's second coming."""
        seen: set[int] = set()
        with self._heard:
            while numbers := self._heard.recv(1):
                if numbers[0] in _SIGNALS and numbers[0] in seen:
                    if not self._has_ended.wait(_OBEY_SECONDS):
                        os._exit(128 + numbers[0])
                    return
                seen.add(numbers[0])

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._has_signal = True
        self._restore(number)

    def _restore(self, number: int) -> None:
        signal.signal(number, self._previous.pop(number))  # type: ignore[arg-type]
