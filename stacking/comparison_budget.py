"""What each recipe reaches within a fixed budget of reference time."""

import math
from dataclasses import dataclass

from stacking.comparison import Comparison
from stacking.comparison_costs import TIME
from stacking.errors import UserError


@dataclass(frozen=True)
class Affordable:
    """A recipe that ends, decayed, within the budget."""

    name: str
    role: str
    cost: float  # seconds of reference time
    loss: float  # nats, mean over the seeds


def within(comparison: Comparison, budget: float) -> list[Affordable]:
    """Every recipe that costs at most `budget` seconds, the best loss first.

    Training from scratch stands in it as its frontier is at just this budget, where runs bracket
    it; single scratch runs of other lengths stand beside that.
    """
    found = [
        Affordable(group.name, group.role, group.cost(TIME), group.loss)
        for group in comparison.groups
        if group.counted and group.cost(TIME) <= budget
    ]
    scratch = comparison.measures[TIME].frontier.loss_at(budget)
    if math.isfinite(scratch):
        found.append(Affordable("scratch, between its runs", "scratch", budget, scratch))
    return sorted(found, key=lambda one: one.loss)


def scratch_unknown(comparison: Comparison, seconds: float) -> list[str]:
    """A sentence where no scratch runs bracket so much reference time; none where they do."""
    costs = comparison.measures[TIME].frontier.costs
    if not len(costs) or costs[0] <= seconds <= costs[-1]:
        return []
    runs = "runs that count took"
    return [f"scratch is not known there: its {runs} {costs[0]:,.0f} to {costs[-1]:,.0f} s"]


def check_budget(budget: float) -> float:
    """`budget` itself; UserError where it is no time."""
    if not 0 < budget < math.inf:
        raise UserError(f"--budget: got {budget:g}; allowed: seconds of reference time, above 0")
    return budget
