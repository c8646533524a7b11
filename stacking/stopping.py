"""When a run ends before its last step: a signal, a time limit or a number of steps.

SIGINT and SIGTERM are a wish to stop after this step; a signal's repetition is obeyed at once.
"""

import re
import signal
import time
from dataclasses import dataclass
from types import FrameType, TracebackType

from stacking.errors import ConfigError

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._has_signal = True
        self._restore(number)

    def _restore(self, number: int) -> None:
        signal.signal(number, self._previous.pop(number))  # type: ignore[arg-type]
