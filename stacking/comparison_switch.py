"""A Comparison -> what growing at one step or another brought: Gong et al. 2019, figure 7.

Of runs that grow once and differ in when, and in what follows from it: their length or the steps
after the growth, the other being equal, and the decay.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stacking.comparison import Comparison
from stacking.comparison_costs import TIME
from stacking.comparison_frontier import interval
from stacking.comparison_groups import Group
from stacking.comparison_names import among_equal, differences
from stacking.config import BertConfig
from stacking.config_loading import JsonObject
from stacking.config_stage import DATA_FIELDS, MODEL_FIELDS

FEWEST = 3  # switch times that make a curve
_NOT_ENTRY = {"steps", "broken_promise", *MODEL_FIELDS, *DATA_FIELDS}
_TOLD_APART = {"stages", "model", "data", "learning_rate"}


@dataclass(frozen=True)
class SwitchTime:
    """One recipe of the curve; losses in nats."""

    name: str
    step: int  # of the growth
    losses: tuple[float, ...]  # of its seeds
    loss: float  # their mean
    scratch_loss: float  # at equal reference time; NaN outside of the frontier

    @property
    def gain(self) -> float:
        """How much lower it ends than scratch; NaN where that is not known."""
        return self.scratch_loss - self.loss


@dataclass(frozen=True)
class SwitchCurve:
    """One way of growing, at several steps."""

    family: str  # what its recipes share, for people
    points: tuple[SwitchTime, ...]  # by step, no two at one
    threshold: int | None  # a step after which none is surely better; None: see `told`
    told: str  # of the threshold


def switch_curves(comparison: Comparison) -> list[SwitchCurve]:
    """A curve for each way of growing that was tried at FEWEST steps or more."""
    families: dict[str, list[Group]] = {}
    for group in comparison.groups:
        recipe = group.first.recipe
        if group.role == "grown" and group.counted and len(recipe.stages) == 2:
            shared = json.dumps(_shared(group), sort_keys=True)
            after = f"{recipe.stages[1].steps:,} steps after the growth"
            in_all = f"{recipe.total_steps:,} steps in all"
            for length in (after, in_all):
                families.setdefault(f"{shared}|{length}", []).append(group)
    parts = [
        (key.rpartition("|")[2], part)
        for key, family in families.items() for part in _without_twins(family)
        if len(part) >= FEWEST
    ]  # fmt: skip
    words = _words([part for _, part in parts])
    return [_curve(comparison, part, f"{about}; each {length}")
            for (length, part), about in zip(parts, words, strict=True)]  # fmt: skip


def _shared(group: Group) -> JsonObject:
    """All settings but lengths; models as they are, however the recipe states them."""
    recipe = group.first.recipe
    settings: JsonObject = json.loads(group.settings)
    first, second = recipe.stages
    return {
        **{name: value for name, value in settings.items() if name not in _TOLD_APART},
        "learning_rate": recipe.learning_rate.model_dump(mode="json", exclude={"decay_steps"}),
        "models": [recipe.stage_model(stage).model_dump(mode="json") for stage in (0, 1)],
        "data": [recipe.stage_data(stage).model_dump(mode="json") for stage in (0, 1)],
        "first": first.model_dump(mode="json", include={"freeze", "deepspeed"}),
        "growth": second.model_dump(mode="json", exclude=_NOT_ENTRY),
    }


def _without_twins(family: Sequence[Group]) -> list[list[Group]]:
    """By step; where several grow at one, those of equal decay apart."""
    ordered = sorted(family, key=_step)
    if len({_step(group) for group in ordered}) == len(ordered):
        return [ordered]
    by_decay: dict[int, list[Group]] = {}
    for group in ordered:
        by_decay.setdefault(group.first.recipe.learning_rate.decay_steps, []).append(group)
    return list(by_decay.values())


def _words(families: Sequence[Sequence[Group]]) -> list[str]:
    """What each family is; where two would be told alike, by what differs."""
    told = [_about(family[0]) for family in families]
    documents = [_shared(family[0]) | {"decay_steps": _decay(family)} for family in families]
    more = among_equal(told, lambda places: differences([documents[n] for n in places]))
    return [
        f"{words}, {values}" if values else words for words, values in zip(told, more, strict=True)
    ]


def _decay(family: Sequence[Group]) -> int | str:
    """What all of them have, if it is one."""
    steps = {group.first.recipe.learning_rate.decay_steps for group in family}
    return steps.pop() if len(steps) == 1 else "several"


def _about(group: Group) -> str:
    recipe = group.first.recipe
    entry = recipe.stages[1]
    said = {"depth": entry.depth, "moments": entry.moments}
    said |= entry.model_dump(exclude_defaults=True, exclude=_NOT_ENTRY)
    words = [f"{name} {value}" for name, value in said.items()]
    sizes = _sizes(recipe.stage_model(0), recipe.stage_model(1))
    rate = f"peak rate {recipe.learning_rate.peak:g}"
    return ", ".join([*sizes, *words, rate])


def _sizes(small: BertConfig, large: BertConfig) -> list[str]:
    """What grows, from what to what."""
    before, after = small.model_dump(), large.model_dump()
    return [
        f"{name.removeprefix('num_').replace('_', ' ')} {before[name]} to {after[name]}"
        for name in before
        if before[name] != after[name]
    ]


def _curve(comparison: Comparison, family: Sequence[Group], words: str) -> SwitchCurve:
    points = tuple(_point(comparison, group) for group in family)
    unknown = sum(math.isnan(point.gain) for point in points)
    if unknown:
        told = (
            f"no threshold is told: scratch's loss is not known at {unknown} of these "
            f"{len(points)} times, outside of its runs"
        )
        return SwitchCurve(words, points, None, told)
    if not len(comparison.noise.residuals):
        told = "no threshold is told: with one seed of each recipe nobody knows the noise"
        return SwitchCurve(words, points, None, told)
    step = _threshold(comparison, family)
    if step is None:
        told = "no threshold: for every other time a later one is surely better"
    else:
        told = f"threshold, step {step:,}: no later growth gained more beyond the seeds' noise"
    return SwitchCurve(words, points, step, told)


def _threshold(comparison: Comparison, family: Sequence[Group]) -> int | None:
    """The first step that no later one surely beats (95 %); None where that is the last."""
    measure = comparison.measures[TIME]
    gains = [
        measure.frontier.losses_at(group.cost(TIME), measure.errors)
        - (group.loss + comparison.errors(group))
        for group in family
    ]
    for place, gain in enumerate(gains[:-1]):
        if all(interval(np.asarray(later - gain)).low <= 0 for later in gains[place + 1 :]):
            return _step(family[place])
    return None


def _step(group: Group) -> int:
    return group.first.recipe.stages[0].steps


def _point(comparison: Comparison, group: Group) -> SwitchTime:
    ahead = next(found.nats_ahead for found in comparison.of(group) if found.axis == TIME)
    return SwitchTime(group.name, _step(group), tuple(group.losses), group.loss, group.loss + ahead)
