"""Runs in; how much sooner each reaches a loss than training from scratch does, and how surely.

t is what a run cost. t0 is what scratch needs for the same loss, read off the frontier of scratch
runs of several lengths, each with its learning rate decayed: between two of them the loss is linear
in the logarithm of the cost, and outside of them nothing is said.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np

from stacking.comparison_controls import WORST_FIRST, ControlVerdict, verdicts_on, worst
from stacking.comparison_costs import (
    AXES,
    TIME,
    medians,
    missing_switches,
    spent,
    step_rows,
    timed_step_rows,
)
from stacking.comparison_frontier import Floats, Frontier, Interval, Noise, interval
from stacking.comparison_groups import Group, groups_of
from stacking.comparison_runs import Run, refuse_other_places, unchecked
from stacking.comparison_seeds import seed_effects
from stacking.comparison_timing import ratio_errors, step_errors
from stacking.errors import UserError

SCRATCH, GROWN = range(2)  # streams of the bootstrap; comparison_controls has its own


@dataclass(frozen=True)
class Speedup:
    """One recipe against scratch on one axis; NaN where it was refused."""

    axis: str
    cost: float  # t
    scratch_cost: float  # t0, at equal loss
    ratio: float  # t0/t
    interval: Interval  # of the ratio; in reference time of that, too
    nats_ahead: float  # scratch's loss at equal cost less this recipe's
    nats_interval: Interval
    refusal: str

    @property
    def time_saved(self) -> float:
        """1 - t/t0."""
        return 1 - 1 / self.ratio

    @property
    def gain(self) -> float:
        """t0/t - 1."""
        return self.ratio - 1


@dataclass(frozen=True)
class Measure:
    """Training from scratch on one axis, and what other seeds would do to it."""

    frontier: Frontier
    errors: Floats  # draws, of its losses [DRAWS, K]


@dataclass(frozen=True)
class Comparison:
    """All that was found."""

    groups: tuple[Group, ...]
    step_rows: dict[str, list[float]]  # seconds of steps, by configuration
    measures: dict[str, Measure]  # by axis
    noise: Noise
    speedups: dict[str, tuple[Speedup, ...]]  # by the group's settings, an axis each
    controls: tuple[ControlVerdict, ...]
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        """Nobody could tell two recipes of one name apart."""
        names = [group.name for group in self.groups]
        assert len(set(names)) == len(names), f"names are not unique: {names}"

    @property
    def step_seconds(self) -> dict[str, float]:
        """Medians, by configuration."""
        return medians(self.step_rows)

    def of(self, group: Group) -> tuple[Speedup, ...]:
        """A group's speed-ups, an axis each; empty for scratch and what does not count."""
        return self.speedups.get(group.settings, ())

    def errors(self, group: Group) -> Floats:
        """Draws of what other seeds would add to the group's mean loss."""
        return seed_errors(self.noise, group, self.groups)

    def headline(self) -> tuple[Group, Speedup] | None:
        """The grown recipe with the largest speed-up in reference time; None without any.

        One whose controls all lose goes before any other: an equal loss that a small model reaches
        sooner is no gain of growth.
        """
        grown = [group for group in self.groups if group.role == "grown"]
        pairs = [(g, s) for g in grown for s in self.of(g) if s.axis == TIME]
        known = [pair for pair in pairs if math.isfinite(pair[1].ratio)]

        def rank(pair: tuple[Group, Speedup]) -> tuple[int, float]:
            return WORST_FIRST.index(worst(self.controls, pair[0].name)), pair[1].ratio

        return max(known, key=rank, default=None)


def compare(
    runs: Sequence[Run],
    baseline: Sequence[Path] = (),
    control: Path | None = None,
    pilots: Sequence[Run] = (),
    timed: Sequence[Run] = (),
) -> Comparison:
    """Compare runs of `read_runs`. `baseline`, `control`: folders of some of them, if not found
    by what they train: one stage, of the target's size; of a grown run's smaller ones, which are
    controls besides the named one. `pilots`: runs by which the grown recipes were chosen; each of
    these is charged for all of them. `timed`: runs that had the machine for themselves; their rows
    alone say what a step takes, if there are any.

    UserError where no scratch run counts, grown runs end at different sizes, a role is named for
    a run that cannot play it, pilots were timed elsewhere, or `timed` lacks a configuration.
    """
    refuse_other_places(runs, [*pilots, *timed])
    # What the runs' own rows say of a configuration no pilot changes.
    rows = step_rows(pilots) | step_rows(runs)
    if timed:
        rows = timed_step_rows(timed, [*runs, *pilots])
    step_seconds = medians(rows)
    groups = groups_of(runs, step_seconds, baseline, control)
    families = [group.family for group in groups]
    effects = seed_effects([group.seed_losses for group in groups], families)
    groups = tuple(
        replace(group, charged=_charged(group, pilots, step_seconds), seed_effects=effects)
        for group in groups
    )
    scratch = _scratch_that_counts(groups)
    noise = Noise.of([group.losses for group in groups], families, len(effects))
    measures = {axis: measure_of(scratch, axis, noise) for axis in AXES}
    named = next((run.target for run in runs if run.folder == control), None)
    timing = step_errors(rows)
    speedups: dict[str, tuple[Speedup, ...]] = {}
    controls: list[ControlVerdict] = []
    for group in groups:
        if group.role == "scratch" or not group.counted:
            continue
        errors = seed_errors(noise, group, groups)
        timed_errors = ratio_errors(group, scratch, step_seconds, timing)
        speedups[group.settings] = tuple(
            speedup_of(group, axis, measures[axis], errors, timed_errors if axis == TIME else None)
            for axis in AXES
        )
        if group.role == "grown":
            controls += verdicts_on(group, groups, noise, errors, named)
    notes = (*unchecked(runs, timed), *_notes(groups, scratch, noise),
             *_seed_notes(groups, effects), *_pilot_notes(pilots, step_seconds))  # fmt: skip
    return Comparison(groups, rows, measures, noise, speedups, tuple(controls), notes)


def _scratch_that_counts(groups: Sequence[Group]) -> list[Group]:
    scratch = [group for group in groups if group.role == "scratch" and group.counted]
    if not scratch:
        raise UserError(
            "none of these runs is a finished and decayed run from scratch, in one stage of the "
            "target's size, to compare with; give some of several lengths, or name them with "
            "--baseline. "
            + "; ".join(
                f"{g.name}: {g.role}, {r.fault or 'counts'}" for g in groups for r in g.results
            )
        )
    return scratch


def _charged(
    group: Group, pilots: Sequence[Run], step_seconds: Mapping[str, float]
) -> dict[str, float]:
    """By axis, what pilots cost besides the group's own runs; steps that they share cost once."""
    own = {result.run.folder.resolve() for result in group.results}
    others = [pilot for pilot in pilots if pilot.folder.resolve() not in own]
    if group.role != "grown" or not others:
        return {}
    runs = [result.run for result in group.results]
    together = [spent([run, *others], step_seconds) for run in runs]
    alone = [spent([run], step_seconds) for run in runs]
    return {
        axis: fmean(both[axis] - one[axis] for both, one in zip(together, alone, strict=True))
        for axis in AXES
    }


def measure_of(scratch: Sequence[Group], axis: str, noise: Noise) -> Measure:
    """The frontier of scratch groups that count, and draws of what other seeds do to it.

    Recipes of one family move together where seeds change, the others each for itself.
    """
    frontier = Frontier.of([(group.cost(axis), group.loss) for group in scratch])
    fewest: dict[int, int] = {}
    for group in scratch:
        fewest[group.family] = min(len(group.counted), fewest.get(group.family, len(group.counted)))
    draws = {family: noise.draws(n, SCRATCH, family) for family, n in fewest.items()}
    kept = [draws[scratch[place].family] for place in frontier.places]
    return Measure(frontier, np.stack(kept, axis=1) if kept else np.zeros((0, 0)))


def seed_errors(noise: Noise, group: Group, groups: Sequence[Group]) -> Floats:
    """Draws of what other seeds add to a group's mean loss; `groups`: all, it among them.

    Independent of all others', and of scratch's: what equal seeds have in common was taken out of
    the losses, where enough runs tell it.
    """
    return noise.draws(len(group.counted), GROWN, groups.index(group))


def speedup_of(
    group: Group, axis: str, measure: Measure, errors: Floats, timing: Floats | None = None
) -> Speedup:
    """What a group took on one axis against scratch; `errors`: its `seed_errors`, `timing`: its
    `ratio_errors`, where step times are only known so well.
    """
    cost, loss, frontier = group.cost(axis), group.loss, measure.frontier
    refusal = _outside(group, axis, frontier)
    scratch_cost = math.nan if refusal else float(frontier.cost_of(np.array([loss]))[0])
    ratios = None if refusal else frontier.costs_of(loss + errors, measure.errors) / cost
    if ratios is not None and timing is not None:
        ratios = ratios * np.exp(timing)
    return Speedup(
        axis=axis,
        cost=cost,
        scratch_cost=scratch_cost,
        ratio=math.nan if refusal else scratch_cost / cost,
        interval=Interval() if ratios is None else interval(ratios),
        nats_ahead=frontier.loss_at(cost) - loss,
        nats_interval=interval(frontier.losses_at(cost, measure.errors) - (loss + errors)),
        refusal=refusal,
    )


def _outside(group: Group, axis: str, frontier: Frontier) -> str:
    """Why the frontier says nothing about a loss; empty if it does."""
    if not 0 < group.cost(axis) < math.inf:  # NaN, too
        return f"nobody measured its {AXES[axis]}; name the run that it was branched from, too"
    if len(frontier.costs) < 2:
        return (
            "the frontier is a single point, because only one scratch run counts that no cheaper "
            "one beats; add scratch runs of other lengths, each decayed to its end"
        )
    best, worst, loss = frontier.losses[-1], frontier.losses[0], group.loss
    if loss < best:
        ratio = frontier.costs[-1] / group.cost(axis)
        return (
            f"its loss {loss:.4f} is below {best:.4f}, the best of the scratch runs, so t0/t is "
            f"above {ratio:.2f}; add a longer scratch run to know it"
        )
    if loss > worst:
        ratio = frontier.costs[0] / group.cost(axis)
        return (
            f"its loss {loss:.4f} is above {worst:.4f}, that of the shortest scratch run, so t0/t "
            f"is below {ratio:.2f}; add a shorter scratch run to know it"
        )
    return ""


def _pilot_notes(pilots: Sequence[Run], step_seconds: Mapping[str, float]) -> list[str]:
    if not pilots:
        return []
    count = "1 pilot" if len(pilots) == 1 else f"{len(pilots)} pilots"
    return [
        f"Each grown recipe is charged for {count}, {spent(pilots, step_seconds)[TIME]:,.0f} s of "
        "reference time, steps that they share with each other or with it once; the curves are "
        "drawn without them."
    ]


def _seed_notes(groups: Sequence[Group], effects: Mapping[int, float]) -> list[str]:
    notes = []
    if len({tuple(group.seeds) for group in groups if group.counted}) > 1:
        notes.append(
            "Not all recipes have the same seeds. A seed decides the order of the samples and the "
            "masks of the evaluation, too: equal seeds make the comparison sharper."
        )
    if effects:
        by_seed = ", ".join(f"seed {seed} {effect:+.4f}" for seed, effect in effects.items())
        notes.append(
            "A seed does something to all recipes alike, by its masks of the evaluation and its "
            f"order of the samples ({by_seed} nats): the losses of recipes, but not the curves and "
            "the single runs', are without it."
        )
    return notes


def _notes(groups: Sequence[Group], scratch: Sequence[Group], noise: Noise) -> list[str]:
    """What a reader has to know before believing the numbers."""
    notes = [f"{r.run.folder}: {r.fault}; it is drawn and does not count."
             for group in groups for r in group.results if r.fault]  # fmt: skip
    notes += [
        f"{r.run.folder}: {missing_switches(r.run)} stage switches are not in its metrics, so "
        "their time is not charged."
        for group in groups for r in group.counted if missing_switches(r.run)
    ]  # fmt: skip
    if not len(noise.residuals):
        notes.append(
            "One seed of each recipe: no interval is known, small differences mean nothing."
        )
    lengths = {group.cost("steps") for group in scratch}
    rates = {group.first.recipe.learning_rate.peak for group in scratch}
    if len(rates) == 1:
        notes.append(
            f"All scratch runs have the same peak learning rate, {rates.pop():g}. A fair baseline "
            "has a tuned one: give runs with other rates, the frontier takes the best."
        )
    if len(lengths) < 2:
        notes.append("All scratch runs have one length: the frontier needs at least two.")
    return notes
