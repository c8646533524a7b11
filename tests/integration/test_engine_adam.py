"""Adam in the engine against one written by hand: cohorts of different age side by side."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from engines import CASES, STILL, Case, build, fresh_weights, quick_and_slow, state_of, train
from hand_written_adam import HandWrittenAdam, gradients, worst_share
from ranks import run_on_ranks
from torch import Tensor

from stacking import distributed, engine
from stacking.snapshot import Snapshot

STEPS, RATE, NEW_RATE = 20, 1e-3, 3e-3
OLD, SEEDED = 500, 37  # step counts
MOST_DEVIATION = {"fp32": 1e-3, "bf16": 0.05, "bf16_fp32": 0.05}
"""Of a parameter's way and of a moment; both by hand with the same rounding of the forward."""


@dataclass(frozen=True)
class Comparison:
    """One engine beside the hand-written Adam, after the same steps."""

    weights: float  # largest deviation of a parameter, as a share of its way
    exp_avg: float  # of a moment, as a share of its size
    exp_avg_sq: float
    counts_are_equal: bool
    new_names_are_kept: bool
    clipped_steps: int
    first_way: float  # of a new parameter in the first step, the largest share of that by hand


def cohort(name: str) -> str:
    """Old with both moments, seeded with the second one alone, or new and fresh."""
    if name.startswith("encoder.layers.1."):
        return "new"
    return "seeded" if "head" in name else "old"


def mixed() -> Snapshot:
    """Three cohorts; the moments have the size of gradients."""
    weights = fresh_weights(STILL)
    generator = torch.Generator().manual_seed(11)
    steps = {n: {"old": OLD, "seeded": SEEDED}[cohort(n)] for n in weights if cohort(n) != "new"}
    mean = {n: 1e-3 * torch.randn(weights[n].shape, generator=generator) for n in steps}
    square = {n: 1e-5 * (0.5 + torch.rand(weights[n].shape, generator=generator)) for n in steps}
    for name in steps:
        if cohort(name) == "seeded":
            mean[name].zero_()
    new = frozenset(name for name in weights if cohort(name) == "new")
    return Snapshot(weights, {"exp_avg": mean, "exp_avg_sq": square}, steps, new)


STARTS = {"fresh": lambda: Snapshot(fresh_weights(STILL)), "mixed": mixed}


def compare(start: Snapshot, zero_stage: int, precision: str) -> Comparison:
    """Train `start` in the engine and by hand."""
    built = build(zero_stage, precision, start, STILL)
    train(built, range(1), RATE, NEW_RATE)
    first = state_of(built)
    train(built, range(1, STEPS), RATE, NEW_RATE)
    end = state_of(built)
    built.destroy()
    by_hand = HandWrittenAdam(start)
    dtype = torch.float64 if precision == "fp32" else torch.bfloat16
    first_by_hand: dict[str, Tensor] = {}
    for step in range(STEPS):
        found = gradients(by_hand.weights, [*start.weights], step, dtype)
        by_hand.step(found, RATE, NEW_RATE)
        first_by_hand = first_by_hand or dict(by_hand.weights)
    new = start.new_names or start.weights
    return Comparison(
        weights=worst_share(end.weights, by_hand.weights, since=start.weights),
        exp_avg=worst_share(end.moments["exp_avg"], by_hand.moments["exp_avg"]),
        exp_avg_sq=worst_share(end.moments["exp_avg_sq"], by_hand.moments["exp_avg_sq"]),
        counts_are_equal=end.optimizer_steps == by_hand.counts,
        new_names_are_kept=end.new_names == start.new_names,
        clipped_steps=by_hand.clipped_steps,
        first_way=max(
            way(name, start, first.weights) / way(name, start, first_by_hand) for name in new
        ),
    )


def way(name: str, start: Snapshot, weights: Mapping[str, Tensor]) -> float:
    """How far a parameter has come."""
    return float((weights[name].double() - start.weights[name].double()).norm())


EVERYWHERE = [(*case, kind, ranks) for ranks in (1, 2) for case in CASES for kind in STARTS]
QUICK = [
    (1, "bf16", "mixed", 1), (3, "bf16", "fresh", 1), (0, "fp32", "mixed", 2),
    (1, "fp32", "mixed", 2), (2, "fp32", "fresh", 2), (3, "fp32", "mixed", 2),
    (2, "bf16", "mixed", 2),
]  # fmt: skip
"""Every ZeRO stage with every precision; the other cases are slow ones."""


def compare_all(cases: list[Case]) -> dict[Case, Comparison]:
    """In one process group."""
    engine.start()
    found = {case: compare(STARTS[case[2]](), *case[:2]) for case in cases}
    distributed.shut_down()
    return found


@functools.cache
def compared_on(ranks: int, is_quick: bool) -> list[dict[Case, Comparison]]:
    """By rank; the slow cases in processes of their own."""
    cases = [case for case in EVERYWHERE if case[3] == ranks and (case in QUICK) == is_quick]
    return run_on_ranks(compare_all, ranks, cases)  # type: ignore[return-value]


def compared(case: Case) -> list[Comparison]:
    """By rank."""
    return [answers[case] for answers in compared_on(case[3], case in QUICK)]


@pytest.mark.parametrize("case", quick_and_slow(EVERYWHERE, QUICK))
def test_each_cohort_steps_as_adam_written_by_hand(case: Case) -> None:
    most = MOST_DEVIATION[case[1]]
    for found in compared(case):
        assert found.clipped_steps > STEPS / 2
        assert found.counts_are_equal
        assert found.new_names_are_kept
        assert found.weights < most
        assert found.exp_avg < most
        assert found.exp_avg_sq < most


MIXED = [case for case in EVERYWHERE if case[2] == "mixed"]


@pytest.mark.parametrize("case", quick_and_slow(MIXED, QUICK))
def test_new_parameters_beside_old_ones_do_not_leap(case: Case) -> None:
    # The trap: the same fresh moments, with the step count of the old parameters.
    start = mixed()
    found = gradients(start.weights, [*start.weights], 0)
    apart, shared = HandWrittenAdam(start), HandWrittenAdam(start)
    shared.counts |= dict.fromkeys(start.new_names, 5000)
    for by_hand in (apart, shared):
        by_hand.step(found, RATE, NEW_RATE)
    leaps = [way(n, start, shared.weights) / way(n, start, apart.weights) for n in start.new_names]
    assert max(leaps) > 3
    for found_here in compared(case):
        assert found_here.first_way == pytest.approx(1, abs=0.01)
