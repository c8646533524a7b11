"""What scratch's loss costs, and intervals that hold the truth as often as they say."""

import math
from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest
from run_folders import scratch_law

from stacking.comparison import measure_of, seed_errors, speedup_of
from stacking.comparison_costs import Point
from stacking.comparison_frontier import Frontier, Noise, interval
from stacking.comparison_groups import Group, Result
from stacking.comparison_runs import Run

SIGMA = 0.02  # nats, between seeds
COSTS, GROWN_COST, TRUTH = (50.0, 100.0, 200.0, 400.0, 800.0), 205.0, 2.0


def group_of(name: str, losses: np.ndarray, cost: float, family: int) -> Group:
    """Finished runs of these final losses [seeds], whose folders nobody reads."""
    points = [Point({"steps": cost}, float(loss)) for loss in losses]
    results = tuple(Result(cast(Run, None), [point], "") for point in points)
    return Group(name, "grown" if name == "grown" else "scratch", results, family)


def simulated(generator: np.random.Generator, seeds: int, design: str) -> list[Group]:
    """Scratch of several lengths, and a grown recipe that is TRUTH times as fast."""
    shared = generator.normal(0.0, SIGMA, seeds)
    groups = []
    for family, cost in enumerate(COSTS if design == "a trunk" else COSTS[::2]):
        own = generator.normal(0.0, SIGMA, seeds)
        noise = shared + 0.15 * own if design == "a trunk" else own
        losses = scratch_law(cost) + noise
        groups.append(group_of(str(cost), losses, cost, 0 if design == "a trunk" else family))
    losses = scratch_law(TRUTH * GROWN_COST) + generator.normal(0.0, SIGMA, seeds)
    return [*groups, group_of("grown", losses, GROWN_COST, 99)]


def coverage(design: str, seeds: int, tries: int) -> float:
    """The share of intervals that hold TRUTH."""
    generator, held = np.random.default_rng(7), 0
    for _ in range(tries):
        groups = simulated(generator, seeds, design)
        noise = Noise.of([group.losses for group in groups], [group.family for group in groups])
        measure = measure_of(groups[:-1], "steps", noise)
        errors = seed_errors(noise, groups[-1], groups)
        found = speedup_of(groups[-1], "steps", measure, errors).interval
        held += found.low <= TRUTH <= found.high
    return held / tries


@pytest.mark.slow
@pytest.mark.parametrize("design", ["single runs", "a trunk"])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_of_95_percent_hold_the_truth_in_93_to_97(design: str, seeds: int) -> None:
    """Whether scratch's lengths are runs of their own or decay branches of a trunk."""
    assert 0.93 <= coverage(design, seeds, 1000) <= 0.97


def test_a_few_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    assert 0.9 <= coverage("a trunk", 3, 60) <= 1.0


def test_one_recipe_alone_has_the_interval_of_students_t() -> None:
    """Of 10 seeds; 2.262: t at 97.5 % with 9 degrees of freedom."""
    losses = np.random.default_rng(3).normal(4.0, SIGMA, 10)
    held = interval(Noise.of([losses.tolist()]).draws(10, 1))
    half = 2.262 * losses.std(ddof=1) / math.sqrt(10)
    assert held.high == pytest.approx(half, rel=0.06)
    assert held.low == pytest.approx(-half, rel=0.06)


def test_branches_of_one_trunk_count_as_one_recipe() -> None:
    losses = [1.0, 1.1, 1.3]
    one = Noise.of([losses])
    five = Noise.of([losses] * 5, [4] * 5)
    apart = Noise.of([losses] * 5)
    assert [one.freedom, five.freedom, apart.freedom] == pytest.approx([2.0, 2.0, 10.0])
    assert five.weights.sum() == pytest.approx(1.0)
    mixed = Noise.of([losses, losses, [2.0, 2.1, 2.6]], [1, 1, 2])
    assert mixed.weights[:6].sum() == pytest.approx(0.5)  # the pair weighs as the single one


def streams(noise: Noise) -> Iterator[np.ndarray]:
    yield noise.draws(3, 1)
    yield noise.draws(3, 2)


def test_streams_differ_and_repeat() -> None:
    noise = Noise.of([[1.0, 1.1, 1.3], [2.0, 2.2, 2.1]])
    first, second = streams(noise)
    assert (first != second).mean() > 0.5
    assert all(np.array_equal(a, b) for a, b in zip(streams(noise), (first, second), strict=True))


def test_a_bound_beyond_the_frontier_is_left_open() -> None:
    frontier = Frontier.of([(10.0, 5.0), (100.0, 4.0), (50.0, 6.0), (math.nan, 3.0)])
    assert frontier.places == (0, 1)
    costs = frontier.cost_of(np.array([5.5, 5.0, 4.5, 4.0, 3.9, math.nan]))
    expected = [0.0, 10.0, 10**1.5, 100.0, math.inf, math.nan]
    assert costs == pytest.approx(expected, nan_ok=True)
    assert frontier.loss_at(10**1.5) == pytest.approx(4.5)
    assert frontier.loss_at(100.0) == pytest.approx(4.0)
    assert math.isnan(frontier.loss_at(101.0))
    held = interval(np.array([1.0, 2.0, math.inf, math.inf]))
    assert (held.low, held.high) == (1.0, math.inf)


def test_a_frontier_whose_losses_are_off_is_read_where_it_then_lies() -> None:
    frontier = Frontier.of([(10.0, 5.0), (100.0, 4.0), (1000.0, 3.0)])
    errors = np.array([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.0, -1.5, 0.0], [0.0, 1.5, 0.0]])
    costs = frontier.costs_of(np.full(4, 4.5), errors)
    # In the third the middle one beats the longest; in the fourth the shortest beats it.
    assert costs == pytest.approx([10**1.5, 100.0, 10 ** (1 + 0.5 / 2.5), 10**2.25])
    assert frontier.losses_at(100.0, errors) == pytest.approx([4.0, 4.5, 2.5, 5.0])
