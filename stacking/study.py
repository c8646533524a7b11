"""A run and its branches, trained one after the other in one process group."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from stacking import distributed, engine
from stacking.branches import branch_runs
from stacking.config import Recipe
from stacking.run_branch import Trunk
from stacking.run_folder import BRANCHES
from stacking.run_start import Start
from stacking.stopping import Outcome, StopLimits
from stacking.trainer import Trainer


@dataclass(frozen=True)
class Run:
    """What is trained, where it is written, and what it begins with.

    Attributes:
        recipe: of all its steps.
        folder: RUN_DIR.
        trunk: the run whose first steps it takes over.
        start: the folder whose weights are its first ones.
        beside: the run with whose first weights it begins, too, whatever those were.
    """

    recipe: Recipe
    folder: Path
    trunk: Trunk | None = None
    start: Start | None = None
    beside: Path | None = None

    def with_branches(self) -> Iterator["Run"]:
        """Itself, then each branch, with its own."""
        yield self
        for branch in branch_runs(self.recipe):
            folder = self.folder / BRANCHES / branch.name
            if branch.at:
                run = Run(branch.recipe, folder, trunk=Trunk(self.folder, branch.at))
            else:
                run = Run(branch.recipe, folder, beside=self.folder)
            yield from run.with_branches()

    def with_start(self) -> "Run":
        """With the first weights of the run beside, which has begun. Collective."""
        if self.beside is None:
            return self
        beside = self.beside
        return replace(self, start=distributed.on_main(lambda: Start.of_run(beside)))


class Study:
    """All of a recipe. What was finished before is not trained again."""

    def __init__(self, run: Run, make: Callable[[Run, StopLimits], Trainer]) -> None:
        """`make`: the trainer of one run. Refuses what cannot be trained before anything is."""
        self._runs = list(run.with_branches())
        self._make = make
        for each in self._runs:
            make(each, StopLimits())

    def fit(self, limits: StopLimits, hang_timeout: float) -> Outcome:
        """Train all; `limits.seconds` are those of all together. Collective."""
        began = time.monotonic()
        try:
            engine.start(hang_timeout)  # the trainers leave the group to its maker
            for run in self._runs:
                seconds = limits.seconds and limits.seconds - (time.monotonic() - began)
                if seconds is not None and seconds <= 0:
                    return Outcome.STOPPED
                trainer = self._make(run.with_start(), StopLimits(seconds, limits.steps))
                if trainer.fit() is Outcome.STOPPED:
                    return Outcome.STOPPED
            return Outcome.DONE
        finally:
            distributed.shut_down()
