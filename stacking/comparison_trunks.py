"""Which steps of several runs are the same: a branch's first ones were made once, by its trunk."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stacking.comparison_runs import Run
from stacking.run_folder import BRANCHES


@dataclass(frozen=True)
class Part:
    """Optimizer steps that one run made itself."""

    maker: Path  # its folder, resolved
    begin: int  # steps done before
    end: int


def by_folder(runs: Iterable[Run]) -> dict[Path, Run]:
    """Runs by their resolved folders."""
    return {run.folder.resolve(): run for run in runs}


def trunk_of(run: Run) -> tuple[Path, int] | None:
    """The resolved folder that a run branched from and the step; None if it began by itself.

    A branch that lies in its trunk's folder is found there, wherever that was moved to.
    """
    folder, _, step = run.metrics.start.branch_from.rpartition("@")
    if not folder or not step.isdecimal():
        return None
    around = run.folder.resolve().parent
    trunk = around.parent if around.name == BRANCHES else Path(folder).resolve()
    return trunk, int(step)


def parts(run: Run, known: Mapping[Path, Run]) -> list[Part]:
    """Who made a run's steps so far, from step 0 on, itself last; `known`: runs `by_folder`.

    What a trunk that is not known branched from is counted as the trunk's own.
    """
    found: list[Part] = []
    maker, end, left = run.folder.resolve(), run.metrics.global_step, trunk_of(run)
    while left and left[0] != maker and left[0] not in {part.maker for part in found}:
        found.append(Part(maker, min(left[1], end), end))
        maker, end = left[0], found[-1].begin
        left = trunk_of(known[maker]) if maker in known else None
    return [Part(maker, 0, end), *found[::-1]]


def root(run: Run, known: Mapping[Path, Run]) -> Path:
    """Who made a run's first step: equal for all branches of a trunk."""
    return parts(run, known)[0].maker
