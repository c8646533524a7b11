"""Runs in; out, one group for each recipe, with its seeds, a role and a name of its own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from stacking.comparison_costs import Point, curve
from stacking.comparison_names import unique_names
from stacking.comparison_runs import Run
from stacking.comparison_trunks import by_folder, root
from stacking.config import BertConfig
from stacking.cost import num_parameters
from stacking.errors import UserError

ROLES = ("grown", "control", "other", "scratch")


@dataclass(frozen=True)
class Result:
    """A run that counts, or why it does not; costs and losses of all its evaluations."""

    run: Run
    points: Sequence[Point]
    fault: str


@dataclass(frozen=True)
class Group:
    """One recipe: the seeds that were trained, and their means."""

    name: str  # no other group's
    role: str  # of ROLES
    results: tuple[Result, ...]
    family: int  # the same for recipes whose runs branched from the same
    charged: Mapping[str, float] = field(default_factory=dict)  # by axis, besides: pilots
    seed_effects: Mapping[int, float] = field(default_factory=dict)  # what is left out of losses

    @property
    def settings(self) -> str:
        """What makes it one recipe, and tells it from every other."""
        return self.first.settings

    @property
    def counted(self) -> list[Result]:
        """Finished and decayed."""
        return [result for result in self.results if not result.fault]

    @property
    def seed_losses(self) -> list[tuple[int, float]]:
        """(seed, final validation loss) as they were measured."""
        return [(result.run.recipe.seed, result.points[-1].loss) for result in self.counted]

    @property
    def losses(self) -> list[float]:
        """Final validation losses, one a seed, without what the seed does to every recipe."""
        return [loss - self.seed_effects.get(seed, 0.0) for seed, loss in self.seed_losses]

    @property
    def loss(self) -> float:
        """Mean of `losses`; NaN without any."""
        return fmean(self.losses or [math.nan])

    def cost(self, axis: str) -> float:
        """Mean over the seeds of what the whole run cost, and what is charged; NaN without any."""
        costs = [result.points[-1].costs[axis] for result in self.counted]
        return fmean(costs or [math.nan]) + self.charged.get(axis, 0.0)

    @property
    def seeds(self) -> list[int]:
        """In order."""
        return sorted(result.run.recipe.seed for result in self.counted)

    @property
    def first(self) -> Run:
        """One of its runs, for what they share."""
        return self.results[0].run


def groups_of(
    runs: Sequence[Run],
    step_seconds: Mapping[str, float],
    baseline: Sequence[Path],
    control: Path | None,
) -> tuple[Group, ...]:
    """Seeds together; the grown first, scratch last. UserError where a role cannot be."""
    roles = _roles(runs, baseline, control)
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        by_settings.setdefault(run.settings, []).append(run)
    same = list(by_settings.values())
    groups = [
        Group(name, roles[group[0].settings],
              tuple(Result(run, curve(run, step_seconds), run.fault) for run in group), family)
        for group, name, family in zip(same, unique_names(same), _families(same), strict=True)
    ]  # fmt: skip
    return tuple(sorted(groups, key=lambda group: ROLES.index(group.role)))


def _families(groups: Sequence[Sequence[Run]]) -> list[int]:
    """A number for each group: equal where any of their seeds began as the same run."""
    known = by_folder(run for group in groups for run in group)
    roots = [{root(run, known) for run in group} for group in groups]
    families = list(range(len(groups)))
    for place, makers in enumerate(roots):
        for other in range(place):
            if makers & roots[other] and families[other] != families[place]:
                one, two = families[place], families[other]
                families = [one if family == two else family for family in families]
    return families


def _roles(runs: Sequence[Run], baseline: Sequence[Path], control: Path | None) -> dict[str, str]:
    """By settings: a baseline that is named for one seed is one for all."""
    grown = [run for run in runs if len(run.recipe.stages) > 1]
    target = _target(runs, grown)
    scratch = {run.settings for run in runs if run.folder in baseline}
    _refuse_impossible_roles(runs, target, baseline, control)
    small = [run.target for run in runs if run.folder == control]
    small += [model for run in grown for model in smaller_models(run)]
    roles = {}
    for run in runs:
        if run.settings in scratch:
            role = "scratch"
        elif len(run.recipe.stages) > 1:
            role = "grown"
        elif run.target == target:
            role = "other" if baseline else "scratch"
        else:
            role = "control" if run.target in small else "other"
        roles[run.settings] = role
    return roles


def smaller_models(run: Run) -> list[BertConfig]:
    """What a run trains before it has its last size, each once, in its order; its first always."""
    models = [run.recipe.stage_model(stage) for stage in range(len(run.recipe.stages))]
    return [m for i, m in enumerate(models) if i == 0 or m not in (*models[:i], models[-1])]


def _target(runs: Sequence[Run], grown: Sequence[Run]) -> BertConfig:
    """What all grown runs end with; without any, the largest model."""
    targets = {run.target.model_dump_json(): run for run in grown}
    if len(targets) > 1:
        ends = ", ".join(
            f"{num_parameters(r.target):,} parameters in {r.folder}" for r in targets.values()
        )
        raise UserError(f"the grown runs end as different models: {ends}; compare one target's")
    return (grown or [max(runs, key=lambda run: num_parameters(run.target))])[0].target


def _refuse_impossible_roles(
    runs: Sequence[Run], target: BertConfig, baseline: Sequence[Path], control: Path | None
) -> None:
    """One message for all roles that were named for runs which cannot play them."""
    faults = []
    for run in runs:
        stages, size = len(run.recipe.stages), num_parameters(run.target)
        if run.folder in baseline and stages > 1:
            faults.append(
                f"--baseline {run.folder}: grows, in {stages} stages; allowed: runs from scratch, "
                "of one stage"
            )
        if run.folder == control and stages > 1:
            faults.append(
                f"--control {run.folder}: grows, in {stages} stages; allowed: a run that never "
                "grew, of one stage"
            )
        elif run.folder == control and size >= num_parameters(target):
            faults.append(
                f"--control {run.folder}: has {size:,} parameters, as many as the target's "
                f"{num_parameters(target):,} or more; allowed: a smaller model that never grew"
            )
    if faults:
        raise UserError("\n".join(faults))
