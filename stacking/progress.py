"""Progress for people: a live bar in a terminal, plain lines elsewhere; on the main rank only."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from stacking import distributed


class _Console(Console):
    """Goes quiet when nobody reads any more, as after `| head`: training goes on."""

    def on_broken_pipe(self) -> None:
        """Rich would end the process."""
        self.quiet = True


class ProgressReporter:
    """One bar over all optimizer steps of a run."""

    def __init__(self, total_steps: int, num_stages: int) -> None:
        """Nothing is shown before `with`."""
        self._total_steps = total_steps
        self._num_stages = num_stages
        self._console = _Console(file=sys.stdout, highlight=False, quiet=not distributed.is_main())
        is_terminal = self._console.is_terminal and not distributed.has_terminal_of_mpi()
        self._is_live = is_terminal and distributed.is_main()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console, transient=True, disable=not self._is_live,
        )  # fmt: skip
        self._task = self._bar.add_task("starting", total=total_steps, numbers="")

    def __enter__(self) -> "ProgressReporter":
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the bar."""
        self._bar.stop()

    def say(self, line: str) -> None:
        """Print one line above the bar."""
        self._console.print(line, markup=False, soft_wrap=True)

    def step(self, global_step: int, stage: int, layers: int, numbers: str, left: float) -> None:
        """Show the newest logged step; `left`: seconds to the end of the run."""
        place = f"stage {stage + 1}/{self._num_stages} ({layers} layers)"
        numbers += f"  left {_minutes(left)}"
        self._bar.update(self._task, completed=global_step, description=place, numbers=numbers)
        if not self._is_live:
            self.say(f"{place}  step {global_step}/{self._total_steps}  {numbers}")


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
