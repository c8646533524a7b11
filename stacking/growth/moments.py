"""Moments at a switch, Adam's above all: the history with which each grown number starts.

Four policies (a stage's `moments`):

    reset    nothing has a history (Gong et al. 2019, section 4.1)
    keep     old numbers keep their moments and count, new ones start afresh (Kaddour et al. 2023)
    grow     all copies get the moments, mapped as gradients map (double.py --double-optimizer)
    seed_v   as keep, but a copy starts with the mapped second moment and a first moment of 0

A tensor has one step count for Adam's bias correction. Where a whole tensor is new, its count is 0
and it trains in a parameter group of its own. Where a tensor is widened its new numbers share the
old count: with a second moment of 0 they would step (1 - b1^k) / sqrt(1 - b2^k) times the rate, up
to 6.5 times at b2 = 0.999. So inside a widened tensor every policy but `reset` seeds exp_avg_sq:
a copy with the mapped one, a fresh number with the mean of the tensor's numbers that have one.

Muon has one moment, the mean of gradients (momentum_buffer), and corrects nothing by its count. It
grows as exp_avg does; a copy under `seed_v` starts with 0, as under `keep`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from stacking.growth.contract import Kind
from stacking.snapshot import MOMENTS, MOMENTUM

Policy = Literal["reset", "keep", "grow", "seed_v"]


class TensorMap(Protocol):
    """The part of GrowthPlan that moments need."""

    def grow(self, tensors: Mapping[str, Tensor], *, kind: Kind) -> dict[str, Tensor]:
        """Tensors of the small model turned into tensors of the large one."""


@dataclass(frozen=True)
class Carried:
    """What the grown model's optimizer starts with.

    Attributes:
        moments: "exp_avg" and "exp_avg_sq", or "momentum_buffer", by parameter; only parameters
            with a history.
        optimizer_steps: the optimizer's count of these parameters.
        new_names: parameters of which no number existed before.
    """

    moments: dict[str, dict[str, Tensor]]
    optimizer_steps: dict[str, int]
    new_names: frozenset[str]


def carry_moments(
    plan: TensorMap,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
    optimizer_steps: Mapping[str, int],
    policy: Policy,
) -> Carried:
    """The moments of the grown model by `policy`; pure, the same on all ranks.

    Args:
        plan: the growth.
        weights: the small model's; only their shapes are read.
        moments: of the small model, fp32; a parameter that was frozen has none.
        optimizer_steps: the counts of the small model's parameters.
        policy: see the module.
    """
    ones = {name: torch.ones_like(tensor) for name, tensor in weights.items()}
    new_names = frozenset(
        name for name, flags in plan.grow(ones, kind="is_old").items() if not flags.any()
    )
    carried: dict[str, dict[str, Tensor]] = {}
    steps: dict[str, int] = {}
    for keys in (MOMENTS, (MOMENTUM,)):
        if policy != "reset" and keys[0] in moments:
            given = {key: moments[key] for key in keys}
            grown, counts = _carry_kind(plan, ones, given, optimizer_steps, policy)
            carried |= grown
            steps |= counts
    return Carried(carried, steps, new_names)


def _carry_kind(
    plan: TensorMap,
    ones: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
    optimizer_steps: Mapping[str, int],
    policy: Policy,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, int]]:
    """Grown moments and counts of the parameters of one optimizer, by its names of the moments."""
    first, *second = moments
    has_history = {
        name: tensor if name in moments[first] else torch.zeros_like(tensor)
        for name, tensor in ones.items()
    }
    is_old = plan.grow(has_history, kind="is_old")
    origins = plan.grow(has_history, kind="exp_avg_sq")
    counts = _counts(plan, has_history, origins, optimizer_steps)
    mean = plan.grow(_filled(moments[first], has_history), kind="exp_avg")
    # A copy needs a second moment at once, a momentum of 0 is no history.
    copies_start = policy == "grow" or (policy == "seed_v" and bool(second))
    names = [n for n, old in is_old.items() if counts[n] and (copies_start or bool(old.any()))]
    carried = {first: {n: mean[n] if policy == "grow" else mean[n] * is_old[n] for n in names}}
    for key in second:
        square = plan.grow(_filled(moments[key], has_history), kind="exp_avg_sq")
        carried[key] = {name: _seeded(square[name], origins[name] > 0) for name in names}
    return carried, {name: counts[name] for name in names}


def _filled(moments: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros where a parameter has no moments: growth maps whole models."""
    return {
        name: moments[name] if name in moments else torch.zeros_like(tensor)
        for name, tensor in like.items()
    }


def _counts(
    plan: TensorMap,
    has_history: Mapping[str, Tensor],
    origins: Mapping[str, Tensor],
    optimizer_steps: Mapping[str, int],
) -> dict[str, int]:
    """Adam's count of each grown tensor: that of the tensors which it comes from.

    The map is linear, so a grown constant over a grown 1 is the constant, wherever the number has
    an origin. Of several the largest: both moments are then warm, and a count too small would
    enlarge the first one.
    """
    scaled = {name: flags * optimizer_steps.get(name, 0) for name, flags in has_history.items()}
    tops = plan.grow(scaled, kind="exp_avg_sq")
    counts = {}
    for name, origin in origins.items():
        ratios = tops[name][origin > 0] / origin[origin > 0]
        counts[name] = round(float(ratios.max())) if ratios.numel() else 0
    return counts


def _seeded(square: Tensor, has_origin: Tensor) -> Tensor:
    """exp_avg_sq with the mean of its numbers that have an origin in place of the others."""
    if bool(has_origin.all()):
        return square
    return torch.where(has_origin, square, square[has_origin].mean())
