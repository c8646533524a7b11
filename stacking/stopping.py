"""SIGINT and SIGTERM as a wish to stop after this step; a signal's repetition is obeyed at once."""

import signal
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Inside its `with` block the first signal of each kind only sets `is_requested`.

    Each kind counts by itself: on Ctrl-C DeepSpeed's launcher sends SIGTERM after the terminal's
    SIGINT, which is still one wish.
    """

    def __init__(self) -> None:
        """Nothing is caught before `with`."""
        self.is_requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        """Catch both signals."""
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
        self.is_requested = True
        self._restore(number)

    def _restore(self, number: int) -> None:
        signal.signal(number, self._previous.pop(number))  # type: ignore[arg-type]
