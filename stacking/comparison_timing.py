"""How well the seconds of a step are known, and what that does to a ratio of reference times."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median

import numpy as np

from stacking.comparison_costs import TIME
from stacking.comparison_frontier import DRAWS, Floats
from stacking.comparison_groups import Group

STREAM = 3  # of the bootstrap; comparison and comparison_controls have the others


def step_errors(rows: Mapping[str, Sequence[float]]) -> dict[str, Floats]:
    """Draws of ln(median of other rows / median of these), by configuration [DRAWS].

    The bootstrap's median of n rows lies at a share of the sorted ones that is distributed as
    Beta((n + 1)/2, (n + 1)/2). It knows of the rows' scatter, not of a machine that was slower for
    all of them.
    """
    found = {}
    for place, (name, seconds) in enumerate(sorted(rows.items())):
        half = (len(seconds) + 1) / 2
        shares = np.random.default_rng((STREAM, place)).beta(half, half, DRAWS)
        found[name] = np.log(np.quantile(seconds, shares) / median(seconds))
    return found


def ratio_errors(
    group: Group,
    scratch: Sequence[Group],
    step_seconds: Mapping[str, float],
    errors: Mapping[str, Floats],
) -> Floats:
    """Draws of ln(t0/t with other step times / t0/t), to first order [DRAWS].

    A configuration that both sides spend the same share of their time in cancels out.
    """
    ours, theirs = _shares(group, step_seconds), [_shares(one, step_seconds) for one in scratch]
    total = np.zeros(DRAWS)
    for name, error in errors.items():
        total += (fmean(one.get(name, 0.0) for one in theirs) - ours.get(name, 0.0)) * error
    return total


def _shares(group: Group, step_seconds: Mapping[str, float]) -> dict[str, float]:
    """Of a recipe's reference time, pilots included, by configuration; the rest is switches'."""
    run, cost = group.first, group.cost(TIME)
    shares: dict[str, float] = {}
    for stage, plan in enumerate(run.recipe.stages):
        name = run.configuration(stage)
        share = plan.steps * step_seconds.get(name, math.nan) / cost
        shares[name] = shares.get(name, 0.0) + (share if math.isfinite(share) else 0.0)
    return shares
