"""What scratch's loss costs, and intervals that hold the truth as often as they say."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from run_folders import scratch_law

from stacking.comparison import measure_of, seed_errors, speedup_of
from stacking.comparison_costs import Point
from stacking.comparison_frontier import Frontier, Noise, interval
from stacking.comparison_groups import Group, Result
from stacking.comparison_runs import Run
from stacking.comparison_seeds import seed_effects

SIGMA = 0.02  # nats, between seeds
COSTS, GROWN_COST, TRUTH = (50.0, 100.0, 200.0, 400.0, 800.0), 205.0, 2.0


def group_of(name: str, losses: np.ndarray, cost: float, family: int) -> Group:
    """Finished runs of these final losses [seeds], whose folders nobody reads."""
    runs = [SimpleNamespace(recipe=SimpleNamespace(seed=seed)) for seed in range(len(losses))]
    results = tuple(Result(cast(Run, run), [Point({"steps": cost}, float(loss))], "")
                    for run, loss in zip(runs, losses, strict=True))  # fmt: skip
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


@cache
def coverage(design: str, seeds: int, tries: int, alike: float = 0.0) -> tuple[float, float]:
    """The share of intervals that hold TRUTH, and their median width.

    `alike`: standard deviation of what a seed does to all recipes.
    """
    generator, held, widths = np.random.default_rng(7), 0, []
    for _ in range(tries):
        plain = simulated(generator, seeds, design)
        effects = generator.normal(0.0, alike, seeds)
        plain = [group_of(g.name, np.array(g.losses) + effects, g.cost("steps"), g.family)
                 for g in plain]  # fmt: skip
        families = [group.family for group in plain]
        taken = seed_effects([group.seed_losses for group in plain], families)
        groups = [replace(group, seed_effects=taken) for group in plain]
        noise = Noise.of([group.losses for group in groups], families, len(taken))
        measure = measure_of(groups[:-1], "steps", noise)
        errors = seed_errors(noise, groups[-1], groups)
        found = speedup_of(groups[-1], "steps", measure, errors).interval
        held += found.low <= TRUTH <= found.high
        widths.append(found.high - found.low)
    return held / tries, float(np.median(widths))


@pytest.mark.slow
@pytest.mark.parametrize("design", ["single runs", "a trunk"])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_of_95_percent_hold_the_truth_in_93_to_97(design: str, seeds: int) -> None:
    """Whether scratch's lengths are runs of their own or decay branches of a trunk."""
    assert 0.93 <= coverage(design, seeds, 1000)[0] <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("design", ["single runs", "a trunk"])
def test_what_seeds_do_to_all_recipes_alike_widens_no_interval(design: str) -> None:
    share, width = coverage(design, 3, 1000, alike=5 * SIGMA)
    assert 0.93 <= share <= 0.97
    assert width == pytest.approx(coverage(design, 3, 1000)[1], rel=0.15)


def test_seed_effects_are_found_and_add_up_to_nothing() -> None:
    found = seed_effects([[(1, 4.0), (2, 4.1), (3, 4.5)], [(1, 5.0), (2, 5.1), (3, 5.5)],
                          [(3, 6.3)]], [0, 1, 2])  # fmt: skip
    assert found == pytest.approx({1: -0.2, 2: -0.1, 3: 0.3})


def test_members_of_a_family_weigh_as_one() -> None:
    """Three branches and a run of its own disagree about the seeds: half way between them."""
    branches = [[(1, 4.0), (2, 4.2), (3, 4.4)]] * 3
    own = [(1, 5.0), (2, 5.0), (3, 5.0)]
    found = seed_effects([*branches, own], [0, 0, 0, 1])
    assert found == pytest.approx({1: -0.1, 2: 0.0, 3: 0.1})


@pytest.mark.parametrize(
    "samples",
    [[], [[(1, 4.0), (2, 4.1)]], [[(1, 4.0), (2, 4.1)], [(1, 5.0), (2, 5.1)]],
     [[(1, 4.0), (2, 4.1)]] * 3 + [[(3, 4.0), (4, 4.1)]] * 3,
     [[(1, 4.0)], [(2, 5.0)], [(3, 5.0)]]],
)  # fmt: skip
def test_seeds_that_too_few_recipes_have_in_common_tell_nothing(
    samples: list[list[tuple[int, float]]],
) -> None:
    assert seed_effects(samples, list(range(len(samples)))) == {}


def test_noise_is_as_large_when_effects_were_taken_out_of_it() -> None:
    """Of 400 recipes of two seeds; taking the seeds' part out eats none of the rest."""
    generator = np.random.default_rng(5)
    losses = generator.normal(4.0, SIGMA, (400, 2)) + [0.5, -0.5]
    samples = [[(seed, float(loss)) for seed, loss in enumerate(row)] for row in losses]
    effects = seed_effects(samples, list(range(400)))
    assert effects == pytest.approx({0: 0.5, 1: -0.5}, abs=0.005)
    cleaned = [[loss - effects[seed] for seed, loss in sample] for sample in samples]
    noise = Noise.of(cleaned, [], len(effects))
    assert noise.freedom == pytest.approx(399.0)
    assert noise.residuals.std() == pytest.approx(SIGMA, rel=0.1)
    few = Noise.of([[1.0, 1.1, 1.3], [2.0, 2.2, 2.1]], [], 3)
    as_they_come = Noise.of([[1.0, 1.1, 1.3], [2.0, 2.2, 2.1]])
    assert (as_they_come.freedom, few.freedom) == (4.0, 2.0)
    assert few.residuals == pytest.approx(as_they_come.residuals * math.sqrt(2))


def test_a_few_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    assert 0.9 <= coverage("a trunk", 3, 60)[0] <= 1.0


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
