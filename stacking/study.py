"""A run and its branches, trained one after the other in one process group."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stacking import distributed, engine
from stacking.branches import branch_runs
from stacking.config import Recipe
from stacking.run_branch import Trunk
from stacking.run_folder import BRANCHES
from stacking.stopping import Outcome, StopLimits
from stacking.trainer import Trainer


@dataclass(frozen=True)
class Run:
    """What is trained, where it is written, and the run that it begins with."""

    recipe: Recipe
    folder: Path
    trunk: Trunk | None = None

    def with_branches(self) -> Iterator["Run"]:
        """Itself, then each branch, with its own."""
        yield self
        for branch in branch_runs(self.recipe):
            trunk = Trunk(self.folder, branch.at) if branch.at else None
            folder = self.folder / BRANCHES / branch.name
            yield from Run(branch.recipe, folder, trunk).with_branches()


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
                if self._make(run, StopLimits(seconds, limits.steps)).fit() is Outcome.STOPPED:
                    return Outcome.STOPPED
            return Outcome.DONE
        finally:
            distributed.shut_down()
