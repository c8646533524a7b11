"""The learning-rate part of a recipe, and what one schedule reads and another does not."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from stacking.config_base import LARGEST_RATE, MOST_STEPS, FromList, Frozen

_Step = Annotated[int, Field(ge=0, le=MOST_STEPS)]
_Rate = Annotated[float, Field(ge=0, le=LARGEST_RATE)]
_Corner = Annotated[tuple[_Step, _Rate], FromList]

# Fields of LearningRateConfig that only some schedules read.
_READ_BY: dict[str, tuple[str, ...]] = {
    "warmup_steps": ("linear", "cosine", "constant", "wsd"),
    "decay_steps": ("wsd",),
    "end": ("linear", "cosine", "wsd"),
    "total_steps": ("linear", "cosine", "wsd"),
    "scope": ("linear", "cosine", "constant", "wsd"),
    "points": ("piecewise",),
}


class LearningRateConfig(Frozen):
    """The learning rate as a pure function of global_step (stacking/schedule.py)."""

    schedule: Literal["linear", "cosine", "constant", "wsd", "piecewise"] = Field(
        default="linear", description="Shape after warm-up."
    )
    scope: Literal["run", "stage"] = Field(
        default="run",
        description="Whether warm-up and decay span the run, or each stage has its own.",
    )
    peak: float = Field(default=1e-4, gt=0, le=LARGEST_RATE, description="Highest learning rate.")
    warmup_steps: _Step = Field(
        default=0, description="Optimizer steps of linear warm-up; the last one is at peak."
    )
    decay_steps: _Step = Field(
        default=0, description="wsd only: optimizer steps of the final linear decay."
    )
    end: float = Field(default=0.0, ge=0, description="Learning rate at total_steps.")
    total_steps: int | None = Field(
        default=None,
        gt=0,
        le=MOST_STEPS,
        description="Step at which the decay ends; default: sum of all stages.",
    )
    points: Annotated[tuple[_Corner, ...], FromList] = Field(
        default=(), description="piecewise only: (global_step, rate) corners, linear in between."
    )


def schedule_faults(rate: LearningRateConfig, stage_steps: Sequence[int] | None) -> list[str]:
    """Faults between the schedule's fields. `stage_steps`: of each stage; None: unknown."""
    faults = _unread_field_faults(rate)
    if rate.schedule == "piecewise":
        return faults + _corner_faults(rate)
    if rate.end > rate.peak:
        faults.append(
            f"learning_rate.end: got {rate.end}; allowed: 0 to learning_rate.peak, {rate.peak}"
        )
    if rate.schedule == "wsd" and not rate.decay_steps:
        faults.append(
            "learning_rate.decay_steps: got 0; allowed: at least 1 with schedule 'wsd'; a tenth of "
            "all steps is usual; without a decay use schedule 'constant'"
        )
    if rate.scope == "stage":
        return faults + _scope_faults(rate, stage_steps or ())
    run_steps = sum(stage_steps) if stage_steps else None
    total = rate.total_steps or run_steps
    if total is None:
        return faults
    faults += _ramp_faults(rate, total, "in total")
    if run_steps and total < run_steps and not rate.end:
        faults.append(
            f"learning_rate.total_steps: got {total} while all stages have {run_steps} steps, so "
            f"the rest would train at rate 0; allowed: at least {run_steps}, or an end above 0"
        )
    return faults


def _scope_faults(rate: LearningRateConfig, stage_steps: Sequence[int]) -> list[str]:
    faults = []
    if rate.total_steps:
        faults.append(
            f"learning_rate.total_steps: got {rate.total_steps} with scope 'stage', in which every "
            "decay ends with its stage; allowed: absent, or scope 'run'"
        )
    for index, steps in enumerate(stage_steps):
        faults += _ramp_faults(rate, steps, f"in stages.{index}")
    return faults


def _ramp_faults(rate: LearningRateConfig, steps: int, place: str) -> list[str]:
    """A warm-up and a decay that do not fit into `steps`."""
    if rate.warmup_steps < steps and rate.warmup_steps + rate.decay_steps <= steps:
        return []
    return [
        f"learning_rate.warmup_steps: got {rate.warmup_steps}, and decay_steps "
        f"{rate.decay_steps}, of {steps} steps {place}; allowed: a sum of at most {steps}, "
        f"and a warm-up of at most {steps - 1}"
    ]


def _unread_field_faults(rate: LearningRateConfig) -> list[str]:
    """A value that the schedule does not read would be ignored silently."""
    faults = []
    for name, readers in _READ_BY.items():
        value = getattr(rate, name)
        if rate.schedule not in readers and value != LearningRateConfig.model_fields[name].default:
            faults.append(
                f"learning_rate.{name}: got {value} with schedule '{rate.schedule}', which does "
                f"not read it; allowed: absent, or schedule {' or '.join(map(repr, readers))}"
            )
    return faults


def _corner_faults(rate: LearningRateConfig) -> list[str]:
    steps = [step for step, _ in rate.points]
    if len(steps) < 2 or any(b <= a for a, b in pairwise(steps)):
        return [
            f"learning_rate.points: got steps {steps}; allowed: at least 2 points, in strictly "
            "ascending order of global_step, with schedule 'piecewise'"
        ]
    highest = max(value for _, value in rate.points)
    if not math.isclose(highest, rate.peak):
        return [
            f"learning_rate.peak: got {rate.peak}; allowed: {highest}, the highest rate of points"
        ]
    return []
