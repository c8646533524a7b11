"""What scratch's loss costs, between the runs that were made, and what other seeds would change."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAWS = 10_000  # of the bootstrap
TAILS = (2.5, 97.5)  # percent: intervals of 95 %
_SIZE = (2**32,)  # the stream of the noise's size


@dataclass(frozen=True)
class Frontier:
    """The best losses that a cost has bought, cheapest first: the dominated are left out."""

    costs: Floats
    losses: Floats  # strictly falling
    places: tuple[int, ...] = ()  # of the kept among the points given

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> "Frontier":
        """From (cost, loss) pairs; those that nobody measured are passed by."""
        kept: list[tuple[float, float, int]] = []
        for (cost, loss), place in sorted((point, n) for n, point in enumerate(points)
                                          if math.isfinite(sum(point))):  # fmt: skip
            if cost > 0 and (not kept or loss < kept[-1][1]):
                kept.append((cost, loss, place))
        costs, losses, places = zip(*kept, strict=True) if kept else ((), (), ())
        return cls(np.array(costs, dtype=float), np.array(losses, dtype=float), places)

    def cost_of(self, losses: Floats) -> Floats:
        """The cost of each loss: 0 where it is above all, infinity where it is below all."""
        return self.costs_of(losses, np.zeros((len(losses), len(self.costs))))

    def costs_of(self, losses: Floats, errors: Floats) -> Floats:
        """The cost of each loss [D] where the frontier's own losses are off by errors [D, K]."""
        moved = np.minimum.accumulate(self.losses + errors, axis=1)
        is_reached = moved <= losses[:, None]
        first, draw, logs = is_reached.argmax(axis=1), np.arange(len(losses)), np.log(self.costs)
        last = np.maximum(first - 1, 0)
        above, below = moved[draw, last], moved[draw, first]
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(first > 0, (above - losses) / (above - below), 0.0)
        found: Floats = np.exp(logs[last] + share * (logs[first] - logs[last]))
        found[(first == 0) & (below < losses)] = 0.0
        found[~is_reached.any(axis=1)] = math.inf
        found[np.isnan(losses + moved.sum(axis=1))] = math.nan
        return found

    def loss_at(self, cost: float) -> float:
        """The loss that `cost` buys; NaN outside."""
        return float(self.losses_at(cost, np.zeros((1, len(self.costs))))[0])

    def losses_at(self, cost: float, errors: Floats) -> Floats:
        """The same where the frontier's own losses are off by errors [D, K]: [D]."""
        moved = np.minimum.accumulate(self.losses + errors, axis=1)
        if not len(self.costs) or not self.costs[0] <= cost <= self.costs[-1]:
            return np.full(len(errors), math.nan)
        logs = np.log(self.costs)
        place = np.interp(math.log(cost), logs, np.arange(len(logs)))
        left, share = int(place), place - int(place)
        right = min(left + 1, len(logs) - 1)
        found: Floats = (1 - share) * moved[:, left] + share * moved[:, right]
        return found


@dataclass(frozen=True)
class Interval:
    """95 % by bootstrap over seeds; NaN without several, 0 or infinity beyond the frontier."""

    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Noise:
    """What another choice of seeds does to a mean loss: bootstrap of pooled residuals.

    Three seeds of one recipe say little about its noise; that of all recipes together, which are
    taken to be alike in this, says more. Recipes of one family, a trunk's branches, have their
    noise in common: together they weigh, and count, as one.
    """

    residuals: Floats
    weights: Floats  # chances to be drawn; their sum is 1
    freedom: float  # degrees, by which it is known how large the noise is

    @classmethod
    def of(
        cls,
        samples: Sequence[Sequence[float]],
        families: Sequence[int] = (),
        num_effects: int = 0,
    ) -> "Noise":
        """`samples`: the losses of each recipe's seeds; single ones say nothing.

        `families`: a number for each recipe, the same for those of one trunk (default: all differ).
        `num_effects`: of seeds, that were estimated from these samples and taken out of them.
        """
        of_family: dict[int, list[Sequence[float]]] = {}
        for losses, family in zip(samples, families or range(len(samples)), strict=True):
            if len(losses) > 1:
                of_family.setdefault(family, []).append(losses)
        residuals, weights, freedom = [], [], 0.0
        for members in of_family.values():
            for losses in members:
                n = len(losses)
                mean, scale = math.fsum(losses) / n, math.sqrt(n / (n - 1))
                residuals += [(loss - mean) * scale for loss in losses]
                weights += [1 / len(members)] * n
                freedom += (n - 1) / len(members)
        shares, left = np.array(weights, dtype=float), freedom - max(0, num_effects - 1)
        found = np.array(residuals, dtype=float) * math.sqrt(freedom / left if left else 1.0)
        return cls(found, shares / max(1.0, shares.sum()), left)

    def draws(self, num_seeds: int, *stream: int) -> Floats:
        """Errors of a mean over `num_seeds` [DRAWS]; other streams are independent. NaN: unknown.

        Few residuals do not tell how large the noise is, so each draw has a size of its own, the
        same in all streams: the divisor of Student's t. The same numbers give the same draws.
        """
        if not len(self.residuals):
            return np.full(DRAWS, math.nan)
        generator = np.random.default_rng(stream)
        means = generator.choice(self.residuals, (DRAWS, num_seeds), p=self.weights).mean(axis=1)
        chi_squares = np.random.default_rng(_SIZE).chisquare(self.freedom, DRAWS)
        found: Floats = means * np.sqrt(self.freedom / chi_squares)
        return found


def interval(draws: Floats) -> Interval:
    """Percentiles; unknown if any draw is no number."""
    if np.isnan(draws).any():
        return Interval()
    # An observed draw, not one between two: there is nothing between a number and infinity.
    low, high = np.percentile(draws, TAILS, method="nearest")
    return Interval(float(low), float(high))
