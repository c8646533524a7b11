"""How far a step is, live on a terminal, and what each step took."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[[int], None]


class Steps:
    """The steps of one run; `seconds` holds the wall time of each finished one."""

    def __init__(self, is_live: bool = True, console: Console | None = None) -> None:
        """`is_live` False, or no terminal: nothing is drawn. `console`: stderr by default."""
        console = console or Console(file=sys.stderr)
        self.seconds: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            TaskProgressColumn(),
            _Speed(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("so far"),
            TimeElapsedColumn(),
            console=console,
            disable=not (is_live and console.is_terminal),
        )

    def __enter__(self) -> "Steps":
        """Start to draw."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the finished bars on the screen."""
        self._progress.stop()

    @contextmanager
    def step(self, name: str, total: int | None, unit: str = "MB") -> Iterator[Advance]:
        """Time a step and draw its bar; the yielded function moves it on, by bytes or by `unit`.

        `total` None: its length is not known before.
        """
        task = self._progress.add_task(name, total=total or None, unit=unit)
        start = time.perf_counter()
        yield lambda amount: self._progress.advance(task, amount)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self._progress.update(task, completed=total or 1, total=total or 1)


class _Speed(ProgressColumn):
    """Megabytes, or other things, a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed or 0.0
        unit = task.fields["unit"]
        shown = f"{speed / 1e6:7.1f}" if unit == "MB" else f"{speed:7,.0f}"
        return Text(f"{shown} {unit}/s")
