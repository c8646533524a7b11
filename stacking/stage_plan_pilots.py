"""Pilot runs in; out, what they say of growing into a target: step times, mixing, controls.

A pilot is a run folder of the recipe's own task, finished or not. Losses of two pilots are held
against each other only where both have the peak learning rate: a decay lowers every loss, and a
model that grows inside one does not catch up (Bu 2025, arXiv 2511.04981).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from stacking.comparison_costs import TIME, Point, curve, reference_step_seconds, spent
from stacking.comparison_runs import Run, unchecked
from stacking.comparison_trunks import by_folder, root
from stacking.config import BertConfig, DataConfig, Recipe, Stage
from stacking.config_stage import DATA_FIELDS, MODEL_FIELDS
from stacking.errors import UserError
from stacking.schedule import base_rate, stage_start
from stacking.stage_plan_curves import (
    Control,
    Flattening,
    Growth,
    Mixing,
    flattening,
    judge_control,
    mixing,
)

_SIZES = {"steps", "deepspeed", *MODEL_FIELDS, *DATA_FIELDS}
"""Of a stage, what is not how it is entered."""


@dataclass(frozen=True)
class Pilot:
    """A run, and what its losses cost."""

    run: Run
    points: Sequence[Point]

    @property
    def constant(self) -> list[Point]:
        """Evaluations at whose last step the rate was at its peak."""
        recipe, peak = self.run.recipe, self.run.recipe.learning_rate.peak
        return [
            point
            for point in self.points
            if math.isfinite(point.loss) and point.costs["steps"] >= 1
            and math.isclose(base_rate(recipe, round(point.costs["steps"]) - 1), peak)
        ]  # fmt: skip

    @property
    def switch_step(self) -> int:
        """Global step at which the first stage ends."""
        return stage_start(1, self.run.recipe.stages)

    def half(self, stage: int) -> list[Point]:
        """`constant`, before (0) or after (1) the growth."""
        return [p for p in self.constant if (p.costs["steps"] > self.switch_step) == bool(stage)]


@dataclass(frozen=True)
class StepTime:
    """Median seconds of an optimizer step; NaN where nobody knows."""

    seconds: float
    source: str  # for people


@dataclass(frozen=True)
class Candidate:
    """A smaller model to begin with, and what is known of growing from it."""

    name: str  # such as "2 layers, moments keep"
    model: str  # the same without how it grows
    first: Stage  # as it would be trained, but for its steps
    second: Stage
    time: StepTime
    mixing: Mixing
    flattening: Flattening
    control: Control  # it never grew


@dataclass(frozen=True)
class Evidence:
    """All that a schedule is made of."""

    target: str  # such as "8 layers"
    target_time: StepTime
    switch_seconds: float  # median; NaN where no pilot has grown
    pilot_seconds: float  # of all pilots, in steps and switches; NaN where nobody timed some
    candidates: tuple[Candidate, ...]  # the shallowest first
    notes: tuple[str, ...]


@dataclass
class _Form:
    """Stages of a candidate, and the pilots that grew in this way."""

    first: Stage
    second: Stage
    model: BertConfig
    data: DataConfig
    grown: list[Pilot] = field(default_factory=list)


def gather(
    recipe: Recipe, runs: Sequence[Run], measured: Mapping[int, float], tolerance: float
) -> Evidence:
    """What `runs` of `read_runs` say of growing into `recipe.model`, whatever its stages.

    `measured`: seconds of a step by depth, timed on this machine. `tolerance`: nats by which a
    grown model may lag where it counts as mixed. UserError where the runs are of another task.
    """
    _refuse_other_tasks(recipe, runs)
    step_seconds = reference_step_seconds(runs)
    pilots = [Pilot(run, curve(run, step_seconds)) for run in runs]
    times = _StepTimes(recipe, pilots, measured)
    scratch = [pilot for pilot in pilots if _is_alone(pilot, recipe.model, recipe.data)]
    found = [
        _candidate(form, pilots, scratch, times, tolerance)
        for form in _forms(recipe, pilots, measured)
    ]
    switches = [
        switch.seconds
        for run in runs for switch in run.metrics.switches if math.isfinite(switch.seconds)
    ]  # fmt: skip
    candidates = sorted(found, key=lambda one: one.first.num_hidden_layers)
    return Evidence(
        target=_name(Stage(num_hidden_layers=recipe.model.num_hidden_layers, steps=1)),
        target_time=times.of(recipe.model, recipe.data),
        switch_seconds=median(switches) if switches else math.nan,
        pilot_seconds=spent(runs, step_seconds)[TIME],
        candidates=tuple(candidates),
        notes=(*(unchecked(runs) if runs else ()), *_odd_times(candidates)),
    )


def _odd_times(candidates: Sequence[Candidate]) -> list[str]:
    """A note for each candidate that seems slower than the next one with more layers."""
    return [
        f"{small.model} took longer than {large.model}, {small.time.seconds:.3g} against "
        f"{large.time.seconds:.3g} s a step: one of them was timed on a busy machine. Time them "
        "here with --measure, and nothing else running."
        for small, large in pairwise(candidates)
        if small.first.num_hidden_layers < large.first.num_hidden_layers
        and small.time.seconds > large.time.seconds
    ]


def _refuse_other_tasks(recipe: Recipe, runs: Sequence[Run]) -> None:
    """One message with all that differs from the recipe; depth may, and a grown run's first model.

    That the runs are alike among themselves is `read_runs`' business.
    """
    wanted = _facts(recipe)
    firsts = [run.recipe.stage_model(0) for run in runs if _grows_into(run, recipe.model)]
    owners: dict[str, list[str]] = {}
    for run in runs:
        given = _facts(run.recipe)
        for name in wanted:
            is_size = name.startswith("model.") and run.recipe.model in firsts
            if given[name] != wanted[name] and not is_size:
                fault = f"{name}: {wanted[name]} in the recipe; {given[name]}"
                owners.setdefault(fault, []).append(str(run.folder))
    if owners:
        faults = [f"  - {fault} in {', '.join(who)}" for fault, who in owners.items()]
        raise UserError(
            "\n".join(["these pilots say nothing of this recipe, which they differ from in more "
                       "than depth and length:", *faults,
                       "give pilots of this recipe, or change it with --set"])
        )  # fmt: skip


def _facts(recipe: Recipe) -> dict[str, object]:
    """What step times, losses and mixing depend on."""
    model = recipe.model.model_dump(exclude={"num_hidden_layers"})
    return {
        **{f"model.{name}": value for name, value in model.items()},
        **{f"data.{name}": value for name, value in recipe.data.model_dump().items()},
        **{f"optimizer.{name}": value for name, value in recipe.optimizer.model_dump().items()},
        "global_batch_size": recipe.global_batch_size,
        "learning_rate.peak": recipe.learning_rate.peak,
    }


def _grows_into(run: Run, target: BertConfig) -> bool:
    """In one hop, from a smaller model or shorter sequences, with nothing frozen."""
    recipe = run.recipe
    if any(stage.freeze for stage in recipe.stages):
        return False
    forms = [(recipe.stage_model(n), recipe.stage_data(n)) for n in range(len(recipe.stages))]
    return len(forms) == 2 and run.target == target and forms[0] != forms[1]


def _is_alone(pilot: Pilot, model: BertConfig, data: DataConfig) -> bool:
    """Whether the pilot trained this and nothing else."""
    recipe = pilot.run.recipe
    return len(recipe.stages) == 1 and (pilot.run.target, recipe.stage_data(0)) == (model, data)


def _forms(recipe: Recipe, pilots: Sequence[Pilot], measured: Mapping[int, float]) -> list[_Form]:
    """What the pilots grew from; then other depths that the target's is a multiple of."""
    target, layers = recipe.model, recipe.model.num_hidden_layers
    forms: dict[str, _Form] = {}
    for pilot in pilots:
        run = pilot.run
        if _grows_into(run, target):
            first, second = (_without_full_sizes(stage, recipe) for stage in run.recipe.stages)
            model, data = run.recipe.stage_model(0), run.recipe.stage_data(0)
            entry = second.model_dump_json(exclude=_SIZES)
            key = model.model_dump_json() + data.model_dump_json() + entry
            forms.setdefault(key, _Form(first, second, model, data)).grown.append(pilot)
    for depth in (depth for depth in range(1, layers) if layers % depth == 0):
        model = target.model_copy(update={"num_hidden_layers": depth})
        is_tried = depth in measured or any(_is_alone(p, model, recipe.data) for p in pilots)
        is_known = any((form.model, form.data) == (model, recipe.data) for form in forms.values())
        if is_tried and not is_known:
            first, second = (Stage(num_hidden_layers=n, steps=1) for n in (depth, layers))
            forms[str(depth)] = _Form(first, second, model, recipe.data)
    return list(forms.values())


def _without_full_sizes(stage: Stage, recipe: Recipe) -> Stage:
    """The same stage of `recipe`, stating no size that is the full model's, as branches do."""
    full = recipe.model.model_dump() | recipe.data.model_dump()
    said = stage.changes(MODEL_FIELDS + DATA_FIELDS)
    same = [name for name in said if name != "num_hidden_layers" and said[name] == full[name]]
    return stage.model_copy(update=dict.fromkeys(same))


def _candidate(
    form: _Form,
    pilots: Sequence[Pilot],
    scratch: Sequence[Pilot],
    times: "_StepTimes",
    tolerance: float,
) -> Candidate:
    name = _name(form.first, form.second)
    alone = [pilot for pilot in pilots if _is_alone(pilot, form.model, form.data)]
    longest = max(scratch, key=_length, default=None)
    small = [pilot.constant for pilot in alone] + [pilot.half(0) for pilot in form.grown]
    return Candidate(
        name=name,
        model=_name(form.first),
        first=form.first,
        second=form.second,
        time=times.of(form.model, form.data),
        mixing=_mixing(form, scratch, tolerance),
        flattening=flattening(max(small, key=len, default=[]), longest.constant if longest else []),
        control=_control(alone, max(form.grown, key=_length, default=None), longest),
    )


def _name(first: Stage, second: Stage | None = None) -> str:
    """Layers, and what else is not as in the model at full size or by default."""
    entry = second.model_dump(exclude_defaults=True) if second else {}
    said = first.changes(MODEL_FIELDS + DATA_FIELDS)
    said |= {name: value for name, value in entry.items() if name not in _SIZES}
    count = first.num_hidden_layers
    words = [f"{name} {value}" for name, value in said.items() if name != "num_hidden_layers"]
    return ", ".join([f"{count} layer{'s' if count > 1 else ''}", *words])


def _length(pilot: Pilot) -> int:
    return pilot.run.metrics.global_step


def _mixing(form: _Form, scratch: Sequence[Pilot], tolerance: float) -> Mixing:
    """The slowest that any pilot has seen."""
    if not form.grown:
        return Mixing(0, False, 0, f"no pilot grows from {_name(form.first)} in one hop")
    if not scratch:
        return Mixing(0, False, 0, "no pilot trains the target from scratch to compare with")
    found = []
    for pilot in form.grown:
        # The seed decides the evaluation's masks: the same one compares best.
        twin = max(scratch, key=lambda s: (s.run.recipe.seed == pilot.run.recipe.seed, _length(s)))
        names = f"{pilot.run.folder} against {twin.run.folder}"
        if twin.run.recipe.seed != pilot.run.recipe.seed:
            names += ", which has another seed, and so other evaluation masks"
        halves = pilot.half(0), pilot.half(1)
        growth = Growth(pilot.switch_step, *halves, twin.constant, names)
        found.append(mixing(growth, tolerance))
    return max(found, key=lambda one: (one.steps, not one.is_known))


def _control(alone: Sequence[Pilot], grown: Pilot | None, scratch: Pilot | None) -> Control:
    """The small model that never grew, against the grown pilot; without any, against scratch."""
    rival, name = (grown, "the grown pilot") if grown else (scratch, "scratch's pilot")
    if rival is None:
        return Control("unknown", math.nan, "no pilot to hold it against")
    decayed = [pilot.points[-1] for pilot in alone if not pilot.run.fault]
    if decayed and not rival.run.fault:
        return judge_control([[point] for point in decayed], rival.points[-1], name)
    ends = rival.half(1) if grown else rival.constant
    if not ends:
        reason = f"{name} has no loss at the constant rate to hold it against"
        return Control("unknown", math.nan, reason)
    return judge_control([pilot.constant for pilot in alone], ends[-1], name)


class _StepTimes:
    """Seconds of a step by the rows of all pilots, or as timed here in ratio to the target's."""

    def __init__(
        self, recipe: Recipe, pilots: Iterable[Pilot], measured: Mapping[int, float]
    ) -> None:
        self._recipe, self._pilots = recipe, list(pilots)
        self._measured, self._scale = measured, 1.0
        target = self._of_pilots(recipe.model, recipe.data)
        if target and measured:
            self._scale = median(target) / measured[recipe.model.num_hidden_layers]

    def of(self, model: BertConfig, data: DataConfig) -> StepTime:
        """Of whole stages of the model; frozen layers do not count."""
        rows = self._of_pilots(model, data)
        if rows:
            return StepTime(median(rows), f"{len(rows)} rows of the pilots")
        depth = model.num_hidden_layers
        full = model.model_copy(update={"num_hidden_layers": self._recipe.model.num_hidden_layers})
        if (full, data) == (self._recipe.model, self._recipe.data) and depth in self._measured:
            how = "" if self._scale == 1 else ", in ratio to the target's in the pilots"
            return StepTime(self._scale * self._measured[depth], f"timed here{how}")
        return StepTime(math.nan, "nobody timed a step of it")

    def _of_pilots(self, model: BertConfig, data: DataConfig) -> list[float]:
        """Of all rows of it; a trunk's count once, however many branches have copies of them."""
        runs = [pilot.run for pilot in self._pilots]
        known = by_folder(runs)
        rows = {
            (root(run, known), row.global_step, row.elapsed_seconds): row.step_seconds
            for run in runs
            for stage, plan in enumerate(run.recipe.stages)
            if (run.recipe.stage_model(stage), run.recipe.stage_data(stage)) == (model, data)
            and plan.freeze is None
            for row in run.metrics.train_rows(stage)
            if math.isfinite(row.step_seconds)
        }
        return list(rows.values())
