"""Losses of two pilots in; out, when one is as good as the other, by steps or by seconds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from stacking.comparison_controls import ABOUT_EQUAL
from stacking.comparison_costs import TIME, Point


@dataclass(frozen=True)
class Mixing:
    """How long after its growth a model is as good as one from scratch (Bu 2025: t_mix)."""

    steps: int  # t_mix, rounded up to an evaluation; where it is not known, it is more than this
    is_known: bool
    switch_step: int  # at which the pilot grew
    reason: str


@dataclass(frozen=True)
class Flattening:
    """From when on the small model learns no more in a second than the target does."""

    step: int | None  # None: not in the pilot, or not known
    reason: str


@dataclass(frozen=True)
class Control:
    """The small model that never grew, at equal reference time."""

    verdict: str  # "ahead", "behind" or "unknown"
    nats: float  # its loss less the other's; NaN where not known
    reason: str


@dataclass(frozen=True)
class Growth:
    """A pilot's losses around its growth, and those of one from scratch; at the constant rate."""

    switch_step: int
    small: Sequence[Point]  # of its first model
    grown: Sequence[Point]
    scratch: Sequence[Point]
    names: str  # of the two pilots, for people

    @property
    def gaps(self) -> list[tuple[int, float]]:
        """Nats behind scratch at the same step, by steps after the switch."""
        gaps = []
        for point in self.grown:
            step = point.costs["steps"]
            gap = point.loss - _loss_at(self.scratch, "steps", step)
            if math.isfinite(gap):
                gaps.append((round(step) - self.switch_step, gap))
        return gaps

    @property
    def lag(self) -> float:
        """Nats that the small model was behind scratch at the switch; NaN where nobody knows."""
        losses = (
            _loss_at(curve, "steps", self.switch_step) for curve in (self.small, self.scratch)
        )
        return next(losses) - next(losses)


def mixing(growth: Growth, tolerance: float) -> Mixing:
    """From the first evaluation on from which the grown model never lags by more than `tolerance`.

    Where the small model did not lag at the switch there was nothing to catch up, and what
    followed says nothing of a later switch.
    """
    gaps, switch_step, names = growth.gaps, growth.switch_step, growth.names
    if not gaps:
        reason = f"no loss of both at the constant rate after the switch ({names})"
        return Mixing(0, False, switch_step, reason)
    held = _settled([gap <= tolerance for _, gap in gaps])
    if held == len(gaps):
        steps, gap = gaps[-1]
        reason = (
            f"not mixed in the pilot: {steps:,} steps after the switch it is {_ahead(gap)} scratch "
            f"({names})"
        )
        return Mixing(steps, False, switch_step, reason)
    steps, gap = gaps[held]
    if growth.lag <= tolerance:
        reason = (
            f"at its switch the small model was {_ahead(growth.lag)} scratch: there was nothing to "
            f"catch up, which says nothing of a later switch; lengthen the pilots ({names})"
        )
        return Mixing(0, False, switch_step, reason)
    reason = (
        f"{steps:,} steps after the switch it is {_ahead(gap)} scratch, and from there on never "
        f"more than {tolerance:g} nats behind at the same step ({names})"
    )
    return Mixing(steps, True, switch_step, reason)


def flattening(small: Sequence[Point], scratch: Sequence[Point]) -> Flattening:
    """From which step on the target makes the small model's progress in no more seconds.

    Compared over the same range of losses, as both learn the faster the worse they still are.
    """
    starts, ends, shares = [], [], []
    for before, after in pairwise(small):
        seconds = after.costs[TIME] - before.costs[TIME]
        theirs = _seconds_to(scratch, after.loss) - _seconds_to(scratch, before.loss)
        if math.isfinite(theirs) and math.isfinite(seconds):
            starts.append(before)
            ends.append(after)
            shares.append(theirs / seconds)  # of its speed to the target's
    if not shares:
        return Flattening(None, "its losses and the target's do not overlap in two evaluations")
    held = _settled([share <= 1 for share in shares])
    if held == len(shares):
        reason = (
            f"at its last loss that the target reaches, {ends[-1].loss:.3f} at step "
            f"{ends[-1].costs['steps']:,.0f}, it still learns {shares[-1]:.1f} times as fast per "
            "second"
        )
        return Flattening(None, reason)
    step = round(starts[held].costs["steps"])
    reason = (
        f"from step {step:,} (loss {starts[held].loss:.3f}) on it learns no faster per second than "
        "the target does at the same loss: an earlier switch may be as good"
    )
    return Flattening(step, reason)


def judge_control(alone: Sequence[Sequence[Point]], rival: Point, name: str) -> Control:
    """`alone`: losses of each run that never grew; `rival`: what they are held against.

    Of several runs that one counts whose loss is known nearest to the rival's time.
    """
    cost = rival.costs[TIME]
    known = [
        (seconds, loss)
        for points in alone
        if (seconds := _nearest_seconds(points, cost)) > 0
        and math.isfinite(loss := _loss_at(points, TIME, seconds))
    ]
    if not cost > 0:  # NaN, too
        return Control("unknown", math.nan, f"nobody timed {name}")
    if not known:
        reason = f"no pilot trains it alone: train it for as long as {name}, {cost:,.0f} s"
        return Control("unknown", math.nan, reason)
    seconds, loss = min(known, key=lambda one: abs(math.log(one[0] / cost)))
    share, nats = seconds / cost, loss - rival.loss
    losses = f"loss {loss:.3f} after {seconds:,.0f} s, {name} {rival.loss:.3f} after {cost:,.0f} s"
    if nats <= 0 and share <= 1 / ABOUT_EQUAL:
        return Control("ahead", nats, losses)
    if nats > 0 and share >= ABOUT_EQUAL:
        return Control("behind", nats, losses)
    advice = "train it for as long" if share < 1 else "evaluate it earlier, too"
    return Control("unknown", nats, f"{losses}: {advice}")


def _ahead(gap: float) -> str:
    return f"{abs(gap):.3f} nats {'behind' if gap > 0 else 'ahead of'}"


def _settled(claims: Sequence[bool]) -> int:
    """Index from which on all hold; their number where the last one does not."""
    return max((index + 1 for index, holds in enumerate(claims) if not holds), default=0)


def _loss_at(points: Sequence[Point], axis: str, cost: float) -> float:
    """Between two evaluations linear in the logarithm of the cost; NaN outside."""
    known = [(p.costs[axis], p.loss) for p in points if p.costs[axis] > 0]
    if not known or not cost > 0:
        return math.nan
    costs, losses = zip(*known, strict=True)
    return float(np.interp(math.log(cost), np.log(costs), losses, math.nan, math.nan))


def _seconds_to(points: Sequence[Point], loss: float) -> float:
    """When the curve first came down to a loss; NaN outside."""
    seconds: list[float] = []
    losses: list[float] = []
    for point in points:
        if point.costs[TIME] > 0 and (not losses or point.loss < losses[-1]):
            seconds.append(point.costs[TIME])
            losses.append(point.loss)
    if not losses:
        return math.nan
    return float(np.interp(loss, losses[::-1], seconds[::-1], math.nan, math.nan))


def _nearest_seconds(points: Sequence[Point], seconds: float) -> float:
    """`seconds`, or the nearest that the points reach; NaN without any."""
    known = [p.costs[TIME] for p in points if p.costs[TIME] > 0]
    return min(max(seconds, min(known)), max(known)) if known else math.nan
