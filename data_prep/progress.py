"""How far a step is, live on a terminal, and what each step took."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
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
            _Left(),
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
        # A step of unknown length has no speed either.
        task = self._progress.add_task(name, total=total or None, unit=unit if total else "")
        start = time.perf_counter()
        yield lambda amount: self._progress.advance(task, amount)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self._progress.update(task, completed=total or 1, total=total or 1)


def _speed(task: Task) -> float:
    """Mean over the step: the library's own is of the last moments, and jobs end in jumps."""
    return task.completed / (task.finished_time or task.elapsed or 1e9)


class _Speed(ProgressColumn):
    """Megabytes, or other things, a second."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        if not unit:
            return Text("")
        speed = _speed(task)
        shown = f"{speed / 1e6:7.1f}" if unit == "MB" else f"{speed:7,.0f}"
        return Text(f"{shown} {unit}/s")


class _Left(ProgressColumn):
    """Time left at the mean speed."""

    def render(self, task: Task) -> Text:
        if task.total is None or not task.completed:
            return Text("-:--:-- left")
        seconds = (task.total - task.completed) / max(_speed(task), 1e-9)
        return Text(f"{timedelta(seconds=round(seconds))} left")
