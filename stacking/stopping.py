"""SIGINT and SIGTERM as a wish to stop after this step; the second signal is obeyed at once."""

import signal
from types import FrameType, TracebackType


class StopRequest:
    """Inside its `with` block the first signal only sets `is_requested`."""

    def __init__(self) -> None:
        """Nothing is caught before `with`."""
        self.is_requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        """Catch both signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore what was there."""
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
