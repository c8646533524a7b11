"""global_step in; stage, position and learning rate out: pure arithmetic, nothing to carry over.

All steps are 0-based optimizer updates; a rate belongs to the step that is about to be made.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from stacking.config import LearningRateConfig, Recipe, Rewarm, Stage


@dataclass(frozen=True)
class StagePosition:
    """Where a global step lies in the list of stages; everything 0-based."""

    stage: int
    step_in_stage: int
    is_last_step_of_stage: bool


def stage_start(stage: int, stages: Sequence[Stage]) -> int:
    """First global step of `stage`; of `len(stages)`: the total number of steps."""
    assert 0 <= stage <= len(stages), f"stage {stage} of {len(stages)}"
    return sum(s.steps for s in stages[:stage])


def stage_at(step: int, stages: Sequence[Stage]) -> StagePosition:
    """The stage that makes global step `step`."""
    assert step >= 0, f"step {step} is negative"
    start = 0
    for index, stage in enumerate(stages):
        if step < start + stage.steps:
            return StagePosition(index, step - start, step == start + stage.steps - 1)
        start += stage.steps
    raise AssertionError(f"step {step} lies after the last stage's end, {start}")


def learning_rate(step: int, config: LearningRateConfig, total_steps: int) -> float:
    """Rate used by optimizer step `step`, for a run of `total_steps` steps.

    Warm-up step s of W uses peak * (s + 1) / W: the first step is not wasted on rate 0, the last
    one is at peak. A decay starts at peak and reaches `end` at step T = config.total_steps (or
    `total_steps`), the first step that is no longer made; later steps, if any, stay at `end`.
    """
    if config.schedule == "piecewise":
        return _between_points(step, config.points)
    if step < config.warmup_steps:
        return config.peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.peak
    end_step = config.total_steps or total_steps
    start_step = config.warmup_steps
    if config.schedule == "wsd":  # warm-up, stable, decay: Hu et al. 2024 (MiniCPM), section 4
        start_step = end_step - config.decay_steps
    if step >= end_step:
        return config.end
    if step <= start_step:
        return config.peak
    share_left = (end_step - step) / (end_step - start_step)
    if config.schedule == "cosine":  # Loshchilov and Hutter 2017, equation 5, without restarts
        share_left = 0.5 * (1 + math.cos(math.pi * (1 - share_left)))
    return config.end + (config.peak - config.end) * share_left


def base_rate(recipe: Recipe, step: int) -> float:
    """Rate of optimizer step `step`, without its stage's factor.

    With scope "stage" every stage is a run of its own: it warms up and decays over its own steps.
    """
    if recipe.learning_rate.scope == "run":
        return learning_rate(step, recipe.learning_rate, recipe.total_steps)
    position = stage_at(step, recipe.stages)
    steps = recipe.stages[position.stage].steps
    return learning_rate(position.step_in_stage, recipe.learning_rate, steps)


def rewarm_factor(step_in_stage: int, rewarm: Rewarm | None, *, is_new: bool) -> float:
    """Factor on the rate of the stage's step `step_in_stage` (0-based).

    `is_new`: of the parameters that came with the stage; the others have 1 where only these are
    warmed. A ramp of W steps ends with step W - 1 at `factor` (SPARKLING, arXiv 2602.02472: new
    parameters alone, from 1 to 1.3).
    """
    if rewarm is None or (rewarm.parameters == "new" and not is_new):
        return 1.0
    if step_in_stage >= rewarm.steps:
        return rewarm.factor
    share = (step_in_stage + 1) / rewarm.steps
    return rewarm.start + (rewarm.factor - rewarm.start) * share


def stage_rates(recipe: Recipe, step: int) -> tuple[float, float]:
    """Rates of optimizer step `step`: of all parameters, and of those that came with its stage."""
    position = stage_at(step, recipe.stages)
    rate = base_rate(recipe, step)
    rewarm = recipe.stages[position.stage].rewarm
    old, new = (
        rewarm_factor(position.step_in_stage, rewarm, is_new=is_new) for is_new in (False, True)
    )
    return rate * old, rate * new


def rate_corners(recipe: Recipe) -> set[int]:
    """Where the formula of `stage_rates` changes; some may lie outside of the run.

    From one such step to the next a rate is linear or a cosine, times a factor that is linear.
    """
    rate, stages = recipe.learning_rate, recipe.stages
    bounds = [stage_start(stage, stages) for stage in range(len(stages) + 1)]
    run = [(0, rate.total_steps or bounds[-1])]
    found = {*bounds, *(step for step, _ in rate.points)}
    for begin, end in pairwise(bounds) if rate.scope == "stage" else run:
        found |= {begin + rate.warmup_steps, end - rate.decay_steps, end}
    for begin, stage in zip(bounds, stages, strict=False):
        found.add(begin + (stage.rewarm.steps if stage.rewarm else 0))
    return found


def _between_points(step: int, points: Sequence[tuple[int, float]]) -> float:
    """Linear between (global_step, rate) corners; the outermost rates hold outside of them."""
    assert points, "schedule 'piecewise' without points"
    if step <= points[0][0]:
        return points[0][1]
    for (left, left_rate), (right, right_rate) in pairwise(points):
        if step <= right:
            # Weighted, not left + slope * step: exact at both corners.
            return (left_rate * (right - step) + right_rate * (step - left)) / (right - left)
    return points[-1][1]
