"""Evidence of pilots and a budget in; out, the stages that make the most steps of it, and why.

The rule: the switch comes as late as the growth can still mix before the decay begins, tau = T -
decay - t_mix (Bu 2025, arXiv 2511.04981); one hop, as the pilots grew (Du et al. 2024, arXiv
2405.15319). What it saves is said as a ceiling, which no run reaches, and never as an expectation.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction

from stacking.config import LearningRateConfig, Recipe, Stage
from stacking.config_base import MOST_STEPS
from stacking.config_loading import merge
from stacking.errors import ConfigError
from stacking.stage_plan import LOWEST_CEILING
from stacking.stage_plan_pilots import Candidate, Evidence


@dataclass(frozen=True)
class RateShape:
    """Warm-up and decay as shares of all steps, so that they fit a run of any length."""

    warmup: Fraction
    decay: Fraction

    @classmethod
    def of(cls, recipe: Recipe) -> "RateShape":
        """Of its learning rate; ConfigError where that has no constant phase before a decay."""
        rate, faults = recipe.learning_rate, []
        if rate.schedule != "wsd":
            faults.append(
                f"learning_rate.schedule: got '{rate.schedule}'; allowed with --suggest: 'wsd', "
                "because a model has to grow, and to mix, while the rate is constant, and is "
                "judged when it has decayed: --set learning_rate.schedule=wsd "
                "--set learning_rate.decay_steps=N"
            )
        for name, usual in (("scope", "run"), ("total_steps", None)):
            given = getattr(rate, name)
            if given != usual:
                faults.append(
                    f"learning_rate.{name}: got {given!r}; allowed with --suggest: {usual!r}, "
                    "because the budget decides how long the run is"
                )
        if faults:
            raise ConfigError(faults)
        steps = recipe.total_steps
        return cls(Fraction(rate.warmup_steps, steps), Fraction(rate.decay_steps, steps))

    def warmup_steps(self, steps: int) -> int:
        """Of a run of `steps`."""
        return math.floor(self.warmup * steps)

    def decay_steps(self, steps: int) -> int:
        """Of a run of `steps`; at least one."""
        return math.ceil(self.decay * steps)

    def fitted(self, rate: LearningRateConfig, steps: int) -> LearningRateConfig:
        """The same schedule for a run of `steps`."""
        sizes = {"warmup_steps": self.warmup_steps(steps), "decay_steps": self.decay_steps(steps)}
        return rate.model_copy(update=sizes)


@dataclass(frozen=True)
class Schedule:
    """A run in two stages that fits the budget."""

    steps: int  # T, of both
    switch_step: int  # tau
    seconds: float  # of both and the switch
    ceiling: float  # seconds of the target for as many steps, over these


@dataclass(frozen=True)
class Option:
    """A candidate in the budget; without a schedule where there is no room for it."""

    candidate: Candidate
    schedule: Schedule | None
    refusal: str  # why it is not proposed; empty where it could be

    @property
    def ceiling(self) -> float:
        """Of its schedule; NaN without one."""
        return self.schedule.ceiling if self.schedule else math.nan

    @property
    def steps(self) -> int:
        """Of its schedule; 0 without one."""
        return self.schedule.steps if self.schedule else 0


@dataclass(frozen=True)
class Suggestion:
    """What to train, and all that was weighed."""

    recipe: Recipe  # the proposal, whole
    budget_seconds: float
    evidence: Evidence
    scratch_steps: int  # of the target alone in the budget
    options: tuple[Option, ...]
    chosen: Option | None  # None: from scratch

    @property
    def pilots_ceiling(self) -> float:
        """The chosen one's, with the pilots charged to it."""
        if not self.chosen or not self.chosen.schedule:
            return math.nan
        schedule = self.chosen.schedule
        return schedule.ceiling / (1 + self.evidence.pilot_seconds / schedule.seconds)

    @property
    def runs_to_pay(self) -> int:
        """After how many runs the chosen one can have saved what the pilots took; 1 otherwise."""
        if not self.pilots_ceiling < 1:  # NaN, too
            return 1
        assert self.chosen, "what has a ceiling was chosen"
        assert self.chosen.schedule, "what has no schedule is not chosen"
        saved = (self.chosen.ceiling - 1) * self.chosen.schedule.seconds
        return math.ceil(self.evidence.pilot_seconds / saved)


def suggest(recipe: Recipe, evidence: Evidence, budget_seconds: float) -> Suggestion:
    """The best stages for `recipe.model` in so many seconds of steps and switches.

    ConfigError where the learning rate allows no growth, or the budget no step.
    """
    shape, seconds = RateShape.of(recipe), evidence.target_time.seconds
    if not seconds > 0:
        raise ConfigError(
            f"--pilot: none of these runs trained {evidence.target}, so nobody knows the seconds "
            "of a step; add a pilot of the target, or time it here with --measure"
        )
    scratch_steps = min(int(budget_seconds / seconds), MOST_STEPS)
    if scratch_steps < 1:
        raise ConfigError(
            f"--budget: got {budget_seconds:g} s, less than one step of {evidence.target}, "
            f"{seconds:.3g} s; give more"
        )
    options = tuple(_option(one, evidence, shape, budget_seconds) for one in evidence.candidates)
    fit = [option for option in options if not option.refusal]
    chosen = max(fit, key=lambda option: option.steps, default=None)
    proposal = _proposal(recipe, shape, chosen, scratch_steps)
    return Suggestion(proposal, budget_seconds, evidence, scratch_steps, options, chosen)


def _option(
    candidate: Candidate, evidence: Evidence, shape: RateShape, budget_seconds: float
) -> Option:
    schedule, mixing = _longest(candidate, evidence, shape, budget_seconds), candidate.mixing
    if not candidate.time.seconds > 0:
        return Option(candidate, None, candidate.time.source)
    if schedule is None:
        needed = f"{mixing.steps:,} steps of t_mix" if mixing.steps else "a switch"
        return Option(candidate, None, f"the budget has no room for warm-up, {needed} and decay")
    if schedule.ceiling < LOWEST_CEILING:
        refusal = (
            f"its ceiling, {schedule.ceiling:.2f}x, is below {LOWEST_CEILING}x, and no run reaches "
            "its ceiling"
        )
        return Option(candidate, schedule, refusal)
    if not mixing.is_known:
        return Option(candidate, schedule, "its t_mix is not known")
    rewarm, left = candidate.second.rewarm, schedule.steps - schedule.switch_step
    if rewarm and rewarm.steps > left:
        refusal = f"it re-warms for {rewarm.steps:,} steps, and {left:,} come after the switch"
        return Option(candidate, schedule, refusal)
    return Option(candidate, schedule, "")


def _longest(
    candidate: Candidate, evidence: Evidence, shape: RateShape, budget_seconds: float
) -> Schedule | None:
    """The most steps in the budget, with the latest switch that leaves t_mix before the decay."""
    small, large = candidate.time.seconds, evidence.target_time.seconds
    switching = evidence.switch_seconds if math.isfinite(evidence.switch_seconds) else 0.0
    if not small > 0:
        return None

    def switch_step(steps: int) -> int:
        return max(0, steps - shape.decay_steps(steps) - candidate.mixing.steps)

    def seconds(steps: int) -> float:  # never falls with more steps
        early = switch_step(steps)
        return early * small + switching + (steps - early) * large

    steps = bisect_right(range(1, MOST_STEPS + 1), budget_seconds, key=seconds)
    switch = switch_step(steps)
    if steps < 2 or switch < max(1, shape.warmup_steps(steps)):
        return None
    spent = seconds(steps)
    return Schedule(steps, switch, spent, steps * large / spent)


def _proposal(
    recipe: Recipe, shape: RateShape, chosen: Option | None, scratch_steps: int
) -> Recipe:
    """A whole recipe, validated anew."""
    if chosen and chosen.schedule:
        candidate, schedule = chosen.candidate, chosen.schedule
        steps, switch = schedule.steps, schedule.switch_step
        stages = [candidate.first.model_copy(update={"steps": switch}),
                  candidate.second.model_copy(update={"steps": steps - switch})]  # fmt: skip
        why = (
            f"from {candidate.name} at step {switch:,} of {steps:,}, at most "
            f"{schedule.ceiling:.2f}x faster than from scratch for as many steps"
        )
    else:
        steps, why = scratch_steps, "from scratch"
        layers, engine = recipe.model.num_hidden_layers, recipe.stages[-1].deepspeed
        stages = [Stage(num_hidden_layers=layers, steps=steps, deepspeed=engine)]
    changes = {
        "name": f"{recipe.name}_suggested",
        "description": f"Suggested from pilots: {why}.",
        "learning_rate": shape.fitted(recipe.learning_rate, steps).model_dump(mode="json"),
        "stages": [stage.model_dump(mode="json") for stage in stages],
        "branches": [],
        "growth_branches": [],
    }
    return Recipe.model_validate(merge(recipe.model_dump(mode="json"), changes))
