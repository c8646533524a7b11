"""Runs in; out, the seconds of a step of each configuration, and what losses cost on every axis.

Everything is charged: small stages, stage switches and the steps on which a growth map is learned.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from stacking.comparison_runs import Run
from stacking.comparison_trunks import Part, by_folder, parts, root, trunk_of
from stacking.cost import training_flops
from stacking.errors import UserError
from stacking.schedule import stage_at, stage_start

AXES = {
    "steps": "optimizer steps",
    "tokens": "tokens, padding included",
    "flops": "FLOPs, matrix products of forward and backward",
    "reference_seconds": "reference time, s",
    "wall_seconds": "wall time, s",
}
"""What a loss is held against, and its name in words."""
TIME = "reference_seconds"
Costs = dict[str, float]  # by axis


@dataclass(frozen=True)
class Point:
    """A validation loss (nats per masked token) and what it cost, by axis."""

    costs: Mapping[str, float]
    loss: float


def reference_step_seconds(runs: Iterable[Run]) -> dict[str, float]:
    """Median seconds per step of each configuration, over all rows of all runs that have it."""
    return medians(step_rows(runs))


def medians(rows: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of each configuration's rows."""
    return {name: median(seconds) for name, seconds in rows.items()}


def step_rows(runs: Iterable[Run]) -> dict[str, list[float]]:
    """Seconds per step of each configuration, all rows of all runs that have it.

    A trunk's rows count once, however many of its branches have copies of them.
    """
    known = by_folder(runs)
    seconds: dict[str, dict[tuple[Path, int, float], float]] = {}
    for run in known.values():
        first = root(run, known)
        for stage in range(len(run.recipe.stages)):
            of_configuration = seconds.setdefault(run.configuration(stage), {})
            for row in run.metrics.train_rows(stage):
                if math.isfinite(row.step_seconds):
                    key = first, row.global_step, row.elapsed_seconds
                    of_configuration[key] = row.step_seconds
    return {name: list(rows.values()) for name, rows in seconds.items() if rows}


def timed_step_rows(timed: Sequence[Run], runs: Sequence[Run]) -> dict[str, list[float]]:
    """The same from runs that were made to be timed; UserError if one of `runs` has another
    configuration.
    """
    found = step_rows(timed)
    missing = [
        f"{run.folder}, stage {stage + 1}"
        for run in runs
        for stage in range(len(run.recipe.stages))
        if run.configuration(stage) not in found
    ]
    if missing:
        raise UserError(
            "--timed: no step of these stages was timed: " + "; ".join(missing) + "; give short "
            "runs of the same recipes, with as many steps in each stage as the JSON's "
            "steps_per_print or more, or leave the flag out"
        )
    return found


def curve(run: Run, step_seconds: Mapping[str, float]) -> list[Point]:
    """Each evaluation and its costs; the last is the run's result. NaN: a cost nobody measured."""
    costs_at, start_ups = _costs(run, step_seconds), _start_ups(run)
    return [
        Point(costs_at(row.global_step, row.stage)
              | {"wall_seconds": row.elapsed_seconds - _before(start_ups, row.global_step)},
              row.val_mlm_loss)
        for row in run.metrics.evaluations
    ]  # fmt: skip


def spent(runs: Iterable[Run], step_seconds: Mapping[str, float]) -> Costs:
    """By axis, what runs have cost together so far, finished or not.

    Steps that several of them share, a trunk's, were made once and are charged once.
    """
    known = by_folder(runs)
    longest: dict[Path, tuple[Part, Run]] = {}
    for run in known.values():
        for part in parts(run, known):
            if part.maker not in longest or longest[part.maker][0].end < part.end:
                longest[part.maker] = part, run
    total = dict.fromkeys(AXES, 0.0)
    for part, run in longest.values():
        until, before = (_so_far(run, step, step_seconds) for step in (part.end, part.begin))
        for axis in AXES:
            total[axis] += until[axis] - before[axis]
    return total


def _so_far(run: Run, step: int, step_seconds: Mapping[str, float]) -> Costs:
    """What the first `step` steps of a run cost; a growth right after them is not among it."""
    if not step:
        return dict.fromkeys(AXES, 0.0)
    stage = stage_at(step - 1, run.recipe.stages).stage
    elapsed = [at for done, at in _clock(run) if done <= step]
    wall = max(elapsed, default=math.nan) - _before(_start_ups(run), step)
    return _costs(run, step_seconds)(step, stage) | {"wall_seconds": wall}


def _clock(run: Run) -> list[tuple[int, float]]:
    """(steps done, seconds elapsed) of all rows that say both."""
    metrics = run.metrics
    rows = [(row.global_step, row.elapsed_seconds) for row in metrics.train]
    return sorted(rows + [(row.global_step, row.elapsed_seconds) for row in metrics.evaluations])


def _start_ups(run: Run) -> list[tuple[int, float]]:
    """(steps done, seconds) of each process' start: what its first row took longer than others.

    Of the runs that one process trains only the first pays for loading and warming up, and a run
    that was resumed pays again, so it is left out of wall time.
    """
    branched = trunk_of(run)
    begins = {0, *run.metrics.resumes, *([branched[1]] if branched else [])}
    found = [(begin, _start_up(run, begin)) for begin in sorted(begins)]
    return [(begin, seconds) for begin, seconds in found if seconds > 0]


def _start_up(run: Run, begin: int) -> float:
    """Of the process that went on after `begin` steps; 0 where nothing tells."""
    metrics = run.metrics
    row = next((row for row in metrics.train if row.global_step > begin), None)
    if row is None:
        return 0.0
    done, before = max((at for at in _clock(run) if at[0] <= begin), default=(0, 0.0))
    growing = sum(
        switch.seconds for switch in metrics.switches
        if switch.global_step == begin and math.isfinite(switch.seconds)
    )  # fmt: skip
    usual = _wall_step_seconds(run, row.stage) * (row.global_step - done)
    longer = row.elapsed_seconds - before - growing - usual
    return longer if math.isfinite(longer) else 0.0


def _wall_step_seconds(run: Run, stage: int) -> float:
    """Median seconds of wall time for a step, from row to row; NaN without two rows."""
    rows = run.metrics.train_rows(stage)
    steps = [
        (b.elapsed_seconds - a.elapsed_seconds) / (b.global_step - a.global_step)
        for a, b in pairwise(rows)
    ]
    return median(steps) if steps else math.nan


def _before(start_ups: Sequence[tuple[int, float]], step: int) -> float:
    return sum(seconds for begin, seconds in start_ups if begin < step)


def _costs(run: Run, step_seconds: Mapping[str, float]) -> Callable[[int, int], Costs]:
    """`(step, stage) -> costs` of all steps until there, by axis; wall time is left at 0."""
    stages = range(len(run.recipe.stages))
    rates = [_step_costs(run, stage, step_seconds) for stage in stages]
    entries = [_entry_costs(run, stage) for stage in stages]

    def at(step: int, last: int) -> Costs:
        costs = dict.fromkeys(AXES, 0.0)
        for stage in range(last + 1):
            begin, end = (stage_start(stage + n, run.recipe.stages) for n in (0, 1))
            for axis, rate in rates[stage].items():
                costs[axis] += entries[stage].get(axis, 0.0) + rate * (min(end, step) - begin)
        return costs

    return at


def missing_switches(run: Run) -> int:
    """Switches of a finished run that its metrics do not hold, so that nobody can charge them."""
    known = [s.to_stage for s in run.metrics.switches if math.isfinite(s.seconds)]
    return len(run.recipe.stages) - 1 - len(set(known))


def _step_costs(run: Run, stage: int, step_seconds: Mapping[str, float]) -> Costs:
    """Of one optimizer step."""
    recipe, data = run.recipe, run.recipe.stage_data(stage)
    sizes = recipe.global_batch_size, data.max_seq_length, data.max_predictions_per_seq
    freeze = recipe.stages[stage].freeze
    return {
        "steps": 1.0,
        "tokens": float(recipe.global_batch_size * data.max_seq_length),
        "flops": float(training_flops(recipe.stage_model(stage), *sizes, freeze=freeze)),
        "reference_seconds": step_seconds.get(run.configuration(stage), math.nan),
    }


def _entry_costs(run: Run, stage: int) -> Costs:
    """Of growing into `stage`; a learned map's steps run the large model forward and backward."""
    seconds = [s.seconds for s in run.metrics.switches if s.to_stage == stage]
    costs = {"reference_seconds": sum(filter(math.isfinite, seconds))}
    learned = run.recipe.stages[stage].learned
    if stage and learned:
        data = run.recipe.stage_data(stage)
        sizes = learned.batch_size, data.max_seq_length, data.max_predictions_per_seq
        costs["tokens"] = float(learned.steps * learned.batch_size * data.max_seq_length)
        model = run.recipe.stage_model(stage)
        costs["flops"] = float(learned.steps * training_flops(model, *sizes))
    return costs
