"""A recipe's branches as recipes of their own, and what a branch must share with its trunk.

A branch is the run that its recipe describes from step 0 on. That its first steps were made by
another run, the trunk, saves their time and changes nothing: both recipes say the same of them.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from stacking.config import Recipe, Stage, faults_between
from stacking.config_branches import GrowthBranch
from stacking.config_stage import DATA_FIELDS, MODEL_FIELDS
from stacking.schedule import rate_corners, stage_rates, stage_start

# Of a stage: sizes and length are compared as what they make; these do not change what is trained.
_NOT_COMPARED = {"steps", "deepspeed", "broken_promise", *MODEL_FIELDS, *DATA_FIELDS}
_MOST_LISTED = 8
_RATES_COMPARED = 16  # between two corners; two cosines, each times a ramp, meet less often


@dataclass(frozen=True)
class BranchRun:
    """A branch that a recipe asks for."""

    name: str  # its folder's
    recipe: Recipe
    at: int  # optimizer steps that it shares with the trunk


def branch_runs(recipe: Recipe) -> list[BranchRun]:
    """Decay branches, shortest first, then growth branches; a share of 1 is the run itself."""
    shares = sorted(set(recipe.branches) - {1.0})
    decaying = [_decay_branch(recipe, share) for share in shares]
    return decaying + [_growth_branch(recipe, branch) for branch in recipe.growth_branches]


def branch_steps(recipe: Recipe) -> frozenset[int]:
    """After which of its steps a run must be saved for its branches."""
    return frozenset(run.at for run in branch_runs(recipe) if run.at)


def branch_faults(recipe: Recipe) -> list[str]:
    """What keeps the recipe's branches from being runs, one line each."""
    rate, faults = recipe.learning_rate, []
    if recipe.branches and (rate.schedule != "wsd" or rate.scope != "run" or rate.total_steps):
        return [
            f"branches: got {list(recipe.branches)} with learning_rate.schedule "
            f"'{rate.schedule}', scope '{rate.scope}' and total_steps {rate.total_steps}; allowed: "
            "with schedule 'wsd' over the run, where shorter runs share the constant rate; "
            "otherwise leave branches away"
        ]
    runs = branch_runs(recipe)
    names = [run.name.casefold() for run in runs]  # A and a are one folder on some file systems
    for path, run in zip(_paths(recipe), runs, strict=True):
        if names.count(run.name.casefold()) > 1:
            faults.append(f"{path}.name: got {run.name!r}, the name of another branch, in capital "
                          "or small letters; give each one of its own")  # fmt: skip
        faults += _faults_of(path, run, recipe)
    return faults


def _paths(recipe: Recipe) -> Iterator[str]:
    for share in sorted(set(recipe.branches) - {1.0}):
        yield f"branches.{recipe.branches.index(share)}"
    for index in range(len(recipe.growth_branches)):
        yield f"growth_branches.{index}"


def _faults_of(path: str, run: BranchRun, trunk: Recipe) -> list[str]:
    part = run.recipe
    if run.at > trunk.total_steps:
        return [
            f"{path}: got a branch at step {run.at}; allowed: 0 to {trunk.total_steps}, the steps "
            "of the run that it leaves"
        ]
    is_decay = path.startswith("branches")
    if is_decay and len(part.stages) < len(trunk.stages):
        return [
            f"{path}: got {run.name} of the run, which ends at step {part.total_steps}; allowed: "
            f"shares that end after step {stage_start(len(trunk.stages) - 1, trunk.stages)}, where "
            "the last stage begins"
        ]
    if is_decay and run.at <= trunk.learning_rate.warmup_steps:
        return [
            f"{path}: got {run.name} of the run, which decays from step {run.at} on; allowed: "
            f"shares that decay after the warm-up of {trunk.learning_rate.warmup_steps} steps"
        ]
    found = faults_between(part.model, part.data, part.learning_rate, list(part.stages))
    found = found or history_faults(trunk, part, run.at)
    found = found or branch_faults(part)
    return [f"{path}: {fault}" for fault in found]


def _decay_branch(recipe: Recipe, share: float) -> BranchRun:
    """The same run, shorter: its steps and its decay are `share` of the whole run's."""
    total = max(1, round(share * recipe.total_steps))
    decay = max(1, round(share * recipe.learning_rate.decay_steps))
    rate = recipe.learning_rate.model_copy(update={"decay_steps": decay})
    name = f"{share:g}"
    changes = {
        "name": f"{recipe.name} {name}",
        "learning_rate": rate,
        "stages": _until(recipe.stages, total),
        "branches": (),
        "growth_branches": (),
    }
    return BranchRun(name, recipe.model_copy(update=changes), max(0, total - decay))


def _growth_branch(recipe: Recipe, branch: GrowthBranch) -> BranchRun:
    """The stages until `at`, stating all that they leave to the full size, then its own."""
    name = branch.name or f"at_{branch.at}"
    before = [
        _stated(recipe, index, stage)
        for index, stage in enumerate(_until(recipe.stages, branch.at))
    ]
    last, rate = branch.stages[-1], recipe.learning_rate
    if branch.decay_steps is not None:
        rate = rate.model_copy(update={"decay_steps": branch.decay_steps})
    changes = {
        "name": f"{recipe.name} {name}",
        "model": recipe.model.model_copy(update=last.changes(MODEL_FIELDS)),
        "data": recipe.data.model_copy(update=last.changes(DATA_FIELDS)),
        "learning_rate": rate,
        "stages": (*before, *branch.stages),
        "branches": branch.branches,
        "growth_branches": (),
    }
    return BranchRun(name, recipe.model_copy(update=changes), branch.at)


def _stated(recipe: Recipe, index: int, stage: Stage) -> Stage:
    """`stage` (0-based `index`) with every size written out."""
    model, data = recipe.stage_model(index), recipe.stage_data(index)
    sizes = {name: getattr(model, name) for name in MODEL_FIELDS}
    sizes |= {name: getattr(data, name) for name in DATA_FIELDS}
    return stage.model_copy(update=sizes)


def _until(stages: Sequence[Stage], end: int) -> tuple[Stage, ...]:
    """The first `end` steps."""
    kept, left = [], end
    for stage in stages:
        if left > 0:
            kept.append(stage.model_copy(update={"steps": min(left, stage.steps)}))
        left -= stage.steps
    return tuple(kept)


def history_faults(trunk: Recipe, recipe: Recipe, step: int) -> list[str]:
    """How the first `step` optimizer steps of the two differ, one line each; empty: not at all."""
    if step > trunk.total_steps:
        return [f"step {step}: the trunk has {trunk.total_steps} steps"]
    ours, theirs = _history(recipe, step), _history(trunk, step)
    faults = [
        f"{name}: {_show(theirs.get(name))} in the trunk, {_show(ours.get(name))} here"
        for name in dict.fromkeys([*theirs, *ours])
        if theirs.get(name) != ours.get(name)
    ]
    if not faults and (different := _different_rate(trunk, recipe, step)):
        faults.append(different)
    more = len(faults) - _MOST_LISTED
    return faults[:_MOST_LISTED] + ([f"and {more} more"] if more > 0 else [])


def _history(recipe: Recipe, step: int) -> dict[str, object]:
    """All that decides the first `step` steps but the rate; by path."""
    found: dict[str, object] = {
        "seed": recipe.seed,
        "global_batch_size": recipe.global_batch_size,
        **{f"optimizer.{k}": v for k, v in recipe.optimizer.model_dump().items()},
    }
    for index, stage in enumerate(recipe.stages):
        begin, end = (stage_start(index + n, recipe.stages) for n in (0, 1))
        if begin >= step:
            break
        found[f"stages.{index} ends at step"] = min(end, step)
        parts = recipe.stage_model(index).model_dump() | recipe.stage_data(index).model_dump()
        if index:  # nothing grows into the first
            parts |= stage.model_dump(exclude=_NOT_COMPARED)
        found |= {f"stages.{index}.{name}": value for name, value in parts.items()}
    return found


def _different_rate(trunk: Recipe, recipe: Recipe, step: int) -> str:
    at = first_different_rate(trunk, recipe, step)
    if at is None:
        return ""
    theirs, ours = (stage_rates(each, at)[0] for each in (trunk, recipe))
    return (
        f"learning_rate: {theirs:.4g} at step {at} in the trunk, {ours:.4g} here; branches leave "
        "where the rate is constant or still the same: schedule 'wsd' before its decay, or "
        "'constant'"
    )


def first_different_rate(trunk: Recipe, recipe: Recipe, end: int) -> int | None:
    """The step, of the first `end`, from which on the two rates differ.

    Between two corners both are one formula each, and two formulas that agree at so many steps
    are one: not every step is looked at, as there may be millions.
    """

    def differ(at: int) -> bool:
        return not all(map(math.isclose, stage_rates(trunk, at), stage_rates(recipe, at)))

    corners = rate_corners(trunk) | rate_corners(recipe)
    equal = -1
    for begin, after in pairwise(sorted({0, end, *(c for c in corners if 0 < c < end)})):
        span = after - 1 - begin
        for at in (begin + span * k // _RATES_COMPARED for k in range(_RATES_COMPARED + 1)):
            if differ(at):
                between = range(equal + 1, at + 1)
                return between[bisect_left(between, True, key=differ)]
            equal = at
    return None


def _show(value: object) -> str:
    return "nothing" if value is None else str(value)
