"""Learning rates against closed forms; stages against counting."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking.config import LearningRateConfig, Recipe, Rewarm, Stage
from stacking.schedule import (
    StagePosition,
    base_rate,
    learning_rate,
    rewarm_factor,
    stage_at,
    stage_rates,
    stage_start,
)

PEAK = 0.003
STAGES = tuple(Stage(num_hidden_layers=n, steps=s) for n, s in ((1, 5), (2, 1), (4, 7)))


def rates(config: LearningRateConfig, total: int, until: int | None = None) -> list[float]:
    return [learning_rate(step, config, total) for step in range(until or total)]


def test_warm_up_wastes_no_step_and_ends_at_peak() -> None:
    config = LearningRateConfig(schedule="constant", peak=PEAK, warmup_steps=4)
    assert rates(config, 7) == pytest.approx([PEAK * n / 4 for n in (1, 2, 3, 4, 4, 4, 4)])


def test_linear_falls_to_end_at_total_steps() -> None:
    config = LearningRateConfig(schedule="linear", peak=PEAK, warmup_steps=3, end=0.001)
    expected = [0.001 + (PEAK - 0.001) * (11 - step) / 8 for step in range(3, 11)]
    assert rates(config, 11)[3:] == pytest.approx(expected)
    assert learning_rate(3, config, 11) == PEAK
    assert learning_rate(11, config, 11) == 0.001


def test_cosine_follows_half_a_cosine() -> None:
    config = LearningRateConfig(schedule="cosine", peak=PEAK, warmup_steps=2, end=0.0005)
    expected = [
        0.0005 + (PEAK - 0.0005) * (1 + math.cos(math.pi * (step - 2) / 12)) / 2
        for step in range(2, 14)
    ]
    assert rates(config, 14)[2:] == pytest.approx(expected)
    assert learning_rate(8, config, 14) == pytest.approx((PEAK + 0.0005) / 2)


def test_wsd_stays_at_peak_and_decays_linearly_at_the_end() -> None:
    config = LearningRateConfig(schedule="wsd", peak=PEAK, warmup_steps=2, decay_steps=4)
    shares = [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert rates(config, 10) == pytest.approx([PEAK * share for share in shares])


def test_piecewise_is_the_published_curve_of_the_2019_run() -> None:
    corners = ((0, 1e-7), (10_000, 8e-4), (50_000, 5.5e-4), (120_000, 3e-4), (400_000, 1.95e-4))
    config = LearningRateConfig(schedule="piecewise", peak=8e-4, points=corners)
    for step, rate in corners:
        assert learning_rate(step, config, 400_000) == pytest.approx(rate)
    assert learning_rate(30_000, config, 400_000) == pytest.approx((8e-4 + 5.5e-4) / 2)
    assert learning_rate(5_000, config, 400_000) == pytest.approx((1e-7 + 8e-4) / 2)
    # Its last stage falls to 0 over 800,000 updates and is left after 280,000.
    assert learning_rate(399_999, config, 400_000) == pytest.approx(3e-4 * (1 - 28 / 80), rel=1e-4)


def test_piecewise_holds_its_outermost_rates() -> None:
    config = LearningRateConfig(schedule="piecewise", peak=0.5, points=((3, 0.25), (5, 0.5)))
    assert rates(config, 8) == [0.25, 0.25, 0.25, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_own_total_steps_end_the_decay_before_or_after_the_run() -> None:
    short = LearningRateConfig(schedule="linear", peak=PEAK, total_steps=5, end=0.001)
    assert rates(short, 9)[4:] == pytest.approx([0.0014, 0.001, 0.001, 0.001, 0.001])
    long = LearningRateConfig(schedule="linear", peak=PEAK, total_steps=18)
    assert learning_rate(9, long, 9) == pytest.approx(PEAK / 2)


@st.composite
def falling_schedules(draw: st.DrawFn) -> tuple[LearningRateConfig, int]:
    """Any schedule with a warm-up and a fall, and its number of steps."""
    total = draw(st.integers(2, 400))
    warmup = draw(st.integers(0, total - 1))
    kind = draw(st.sampled_from(["linear", "cosine", "constant", "wsd"]))
    peak = draw(st.floats(1e-6, 1.0))
    end = 0.0 if kind == "constant" else peak * draw(st.floats(0, 1))
    decay = draw(st.integers(1, total - warmup)) if kind == "wsd" else 0
    config = LearningRateConfig.model_validate(
        {
            "schedule": kind,
            "peak": peak,
            "warmup_steps": warmup,
            "end": end,
            "decay_steps": decay,
        }
    )
    return config, total


@settings(deadline=None)
@given(falling_schedules())
def test_rates_rise_through_warm_up_then_never_rise(case: tuple[LearningRateConfig, int]) -> None:
    config, total = case
    values = rates(config, total, total + 2)
    warmup = values[: config.warmup_steps]
    slack = config.peak * 1e-12
    assert all(a < b for a, b in zip(warmup, warmup[1:], strict=False))
    rest = values[config.warmup_steps :]
    assert all(a >= b - slack for a, b in zip(rest, rest[1:], strict=False))
    assert all(config.end - slack <= value <= config.peak + slack for value in rest)
    assert min(values) >= 0
    assert all(value > 0 for value in values[:total])


@settings(deadline=None)
@given(falling_schedules())
def test_rates_have_no_jump(case: tuple[LearningRateConfig, int]) -> None:
    config, total = case
    values = rates(config, total, total + 2)
    ramps = [config.warmup_steps or total, config.decay_steps or total - config.warmup_steps]
    # The steepest a ramp over n steps can be: linear 1/n of its height, cosine pi/2 times that.
    largest = config.peak * max(1 / n for n in ramps) * math.pi / 2
    steps = [abs(b - a) for a, b in zip(values, values[1:], strict=False)]
    assert max(steps) <= largest * (1 + 1e-9)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 300), min_size=2, max_size=6, unique=True),
    st.data(),
)
def test_piecewise_stays_between_its_neighbouring_corners(
    steps: list[int], data: st.DataObject
) -> None:
    values = data.draw(st.lists(st.floats(1e-7, 1), min_size=len(steps), max_size=len(steps)))
    corners = tuple(zip(sorted(steps), values, strict=True))
    config = LearningRateConfig(schedule="piecewise", peak=max(values), points=corners)
    for (left, a), (right, b) in zip(corners, corners[1:], strict=False):
        for step in range(left, right + 1):
            rate = learning_rate(step, config, 300)
            assert min(a, b) * (1 - 1e-12) <= rate <= max(a, b) * (1 + 1e-12)


def test_stages_are_found_by_counting_their_steps() -> None:
    counted = [
        (stage, step, step == config.steps - 1)
        for stage, config in enumerate(STAGES)
        for step in range(config.steps)
    ]
    found = [stage_at(step, STAGES) for step in range(13)]
    assert found == [StagePosition(*position) for position in counted]
    assert [stage_start(stage, STAGES) for stage in range(4)] == [0, 5, 6, 13]


def test_a_step_outside_of_all_stages_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="step 13 lies after the last stage's end, 13"):
        stage_at(13, STAGES)
    with pytest.raises(AssertionError, match="negative"):
        stage_at(-1, STAGES)


def test_rewarming_is_a_ramp_to_a_factor_of_all_or_of_the_new_parameters() -> None:
    everything = Rewarm(parameters="all", steps=4)
    assert [rewarm_factor(s, everything, is_new=False) for s in range(6)] == [
        0.25, 0.5, 0.75, 1.0, 1.0, 1.0,
    ]  # fmt: skip
    new = Rewarm(parameters="new", steps=2, start=1.0, factor=1.3)
    assert [rewarm_factor(s, new, is_new=True) for s in range(4)] == pytest.approx(
        [1.15, 1.3, 1.3, 1.3]
    )
    assert {rewarm_factor(s, new, is_new=False) for s in range(4)} == {1.0}
    at_once = Rewarm(parameters="new", factor=1.25)
    assert rewarm_factor(0, at_once, is_new=True) == 1.25
    assert rewarm_factor(0, None, is_new=True) == 1.0


def test_a_stages_rates_are_the_schedules_times_its_factors() -> None:
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "model": {"vocab_size": 50, "num_hidden_layers": 2},
            "learning_rate": {"schedule": "linear", "peak": 0.01, "warmup_steps": 2},
            "stages": [
                {"num_hidden_layers": 1, "steps": 4},
                {
                    "num_hidden_layers": 2,
                    "steps": 6,
                    "rewarm": {"parameters": "new", "start": 1.0, "factor": 1.5, "steps": 5},
                },
            ],
        }
    )
    for step in range(recipe.total_steps):
        base = learning_rate(step, recipe.learning_rate, recipe.total_steps)
        factor = 1.0 if step < 4 else min(1.5, 1.0 + 0.5 * (step - 3) / 5)
        assert stage_rates(recipe, step) == pytest.approx((base, base * factor))


def by_stages(schedule: dict[str, object], steps: list[int]) -> Recipe:
    """A recipe of stages of so many steps, the second of which has a factor."""
    stages: list[dict[str, object]] = [{"num_hidden_layers": 1, "steps": n} for n in steps]
    stages[1]["rewarm"] = {"parameters": "new", "start": 1.0, "factor": 1.5}
    model = {"vocab_size": 50, "num_hidden_layers": 1}
    document = {"name": "x", "model": model, "learning_rate": schedule, "stages": stages}
    return Recipe.model_validate(document)


@pytest.mark.parametrize(
    "schedule",
    [
        {"schedule": "linear", "warmup_steps": 2, "end": 1e-4},
        {"schedule": "cosine", "warmup_steps": 3},
        {"schedule": "constant", "warmup_steps": 3},
        {"schedule": "wsd", "warmup_steps": 1, "decay_steps": 3},
    ],
    ids=lambda schedule: schedule["schedule"],
)
def test_a_schedule_of_stages_is_that_of_a_run_for_each_of_them(
    schedule: dict[str, object],
) -> None:
    steps = [5, 11, 4]
    recipe = by_stages({**schedule, "peak": PEAK, "scope": "stage"}, steps)
    alone = LearningRateConfig.model_validate({**schedule, "peak": PEAK})
    expected = [learning_rate(step, alone, total) for total in steps for step in range(total)]
    found = [stage_rates(recipe, step) for step in range(recipe.total_steps)]
    assert [old for old, _ in found] == pytest.approx(expected)
    factors = [1.0] * 5 + [1.5] * 11 + [1.0] * 4
    assert [new / old for old, new in found] == pytest.approx(factors)
    whole = by_stages({**schedule, "peak": PEAK}, steps)
    assert [stage_rates(whole, step) for step in range(20)] != found
    assert [base_rate(whole, step) for step in range(20)] == rates(alone, 20)
