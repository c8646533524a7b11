"""The never-grown control: what the small models of a grown recipe reach alone in its time.

A grown recipe passes through smaller models. One of them that, never grown, is as good for the same
time says that growing on was not worth its price.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stacking.comparison_costs import TIME
from stacking.comparison_frontier import Floats, Frontier, Interval, Noise, interval
from stacking.comparison_groups import Group, smaller_models
from stacking.config import BertConfig
from stacking.cost import num_parameters

STREAM = 2  # of the bootstrap
ABOUT_EQUAL = 0.95  # share of a run's cost from which a control counts as trained for as long
WORST_FIRST = ("wins", "undecided", "loses")


@dataclass(frozen=True)
class ControlVerdict:
    """A grown recipe against one small model that never grew, at equal reference time."""

    grown: str
    control: str
    verdict: str  # one of WORST_FIRST, said of the control
    nats: float  # the control's loss less the grown recipe's; NaN where not known
    interval: Interval
    reason: str


def worst(verdicts: Sequence[ControlVerdict], grown: str) -> str:
    """What is to be said of all controls of a grown recipe; of none, "undecided"."""
    found = (v.verdict for v in verdicts if v.grown == grown)
    return min(found, key=WORST_FIRST.index, default="undecided")


def verdicts_on(
    grown: Group, groups: Sequence[Group], noise: Noise, errors: Floats, named: BertConfig | None
) -> list[ControlVerdict]:
    """One for each of its smaller models that was trained alone, and for the `named` one.

    Its first model was to be: without it the last verdict says so. `errors`: `grown`'s seed errors.
    """
    cost, models = grown.cost(TIME), smaller_models(grown.first)
    models += [named] if named is not None and named not in models else []
    if not cost > 0:  # NaN, too
        return [_nothing_known(grown, "the grown recipe's reference time is not known")]
    alone = [
        [group for group in groups
         if group.role == "control" and group.first.target == model and group.cost(TIME) > 0]
        for model in models
    ]  # fmt: skip
    found = [_against(grown, controls, noise, errors) for controls in alone if controls]
    if not alone[0] and named is None:
        found.append(_nothing_known(
            grown,
            f"no never-grown control: train its first model ({models[0].num_hidden_layers} layers, "
            f"{num_parameters(models[0]):,} parameters) alone for as long, {cost:,.0f} s",
        ))  # fmt: skip
    return found or [_nothing_known(grown, "no run of the named control counts")]


def _nothing_known(grown: Group, reason: str) -> ControlVerdict:
    return ControlVerdict(grown.name, "none", "undecided", math.nan, Interval(), reason)


def _against(
    grown: Group, controls: Sequence[Group], noise: Noise, errors: Floats
) -> ControlVerdict:
    """`controls`: one model's, of several lengths."""
    cost = grown.cost(TIME)
    points = [(group.cost(TIME) / cost, group.loss) for group in controls]
    nats = _loss_at_equal_cost(points) - grown.loss
    fewest = min(len(group.counted) for group in controls)
    found = interval(nats + noise.draws(fewest, STREAM) - errors)
    verdict, reason = _judge(nats, found, [share for share, _ in points])
    return ControlVerdict(grown.name, _name(controls, cost), verdict, nats, found, reason)


def _name(controls: Sequence[Group], cost: float) -> str:
    """The one that is nearest in time, and how many others there are of its model."""
    nearest = min(controls, key=lambda group: abs(math.log(group.cost(TIME) / cost)))
    more = len(controls) - 1
    return f"{nearest.name} and {more} more of its size" if more else nearest.name


def _loss_at_equal_cost(points: Sequence[tuple[float, float]]) -> float:
    """Of (share of the cost, loss): between two of them, or the best that costs no more."""
    between = Frontier.of(points).loss_at(1.0)
    if math.isfinite(between):
        return between
    affordable = [loss for share, loss in points if share <= 1 / ABOUT_EQUAL]
    return min(affordable or [loss for _, loss in points])


def _judge(nats: float, found: Interval, shares: Sequence[float]) -> tuple[str, str]:
    """Verdict and reason; `nats`: the control's lag; `shares`: of the time that controls took."""
    if nats > 0 and max(shares) < ABOUT_EQUAL:
        reason = f"it was trained for {max(shares):.0%} of the time only; train it for as long"
        return "undecided", reason
    if nats <= 0 and min(shares) > 1 / ABOUT_EQUAL:
        return "undecided", "it was trained for longer; train a shorter one, too"
    if found.low <= 0 <= found.high:
        return "undecided", "the difference lies within the seeds' noise"
    told = f"{abs(nats):.4f} nats {'behind' if nats > 0 else 'ahead'} at equal time"
    if not math.isfinite(found.low):
        return "undecided", f"{told}, but with one seed of each recipe nobody knows the noise"
    return ("loses", told) if nats > 0 else ("wins", f"{told}: growth does not pay here")
