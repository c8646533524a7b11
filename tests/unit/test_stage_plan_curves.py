"""When a grown pilot has mixed, when a small one flattens, and who is ahead at equal time."""

import math
from collections.abc import Sequence

import pytest

from stacking.comparison_costs import Point
from stacking.stage_plan_curves import Growth, Mixing, flattening, judge_control, mixing


def curve(losses: Sequence[float], seconds: float = 1.0, start: int = 100) -> list[Point]:
    """An evaluation every 100 steps, from step `start` on, of `seconds` each."""
    steps = [start + 100 * index for index in range(len(losses))]
    return [
        Point({"steps": float(step), "reference_seconds": step * seconds}, loss)
        for step, loss in zip(steps, losses, strict=True)
    ]


SCRATCH = [5.0, 4.5, 4.2, 4.0, 3.9, 3.8]  # at steps 100 to 600


def mixed(
    grown: Sequence[Point], tolerance: float, switch_step: int, small: Sequence[Point] = ()
) -> Mixing:
    """After growth at `switch_step`; nobody knows by how much the small model lagged."""
    return mixing(Growth(switch_step, small, grown, curve(SCRATCH), "a against b"), tolerance)


@pytest.mark.parametrize(
    ("gaps", "steps", "is_known"),
    [
        ([0.5, 0.1, 0.01], 300, True),
        ([0.5, 0.02, 0.01], 200, True),  # just within
        ([-0.1, -0.2, -0.3], 100, True),  # better than scratch
        ([0.5, 0.01, 0.3], 300, False),  # relapsed at its end
        ([0.01, 0.5, 0.01], 300, True),  # a touch is not mixing
        ([0.5, 0.4, 0.3], 300, False),
    ],
)
def test_a_grown_model_has_mixed_when_it_never_lags_again(
    gaps: Sequence[float], steps: int, is_known: bool
) -> None:
    losses = [loss + gap for loss, gap in zip(SCRATCH[3:], gaps, strict=True)]
    found = mixed(curve(losses, start=400), 0.0200001, 300)
    assert (found.steps, found.is_known) == (steps, is_known)
    assert "a against b" in found.reason


def test_losses_between_evaluations_are_linear_in_the_logarithm_of_the_step() -> None:
    at = math.exp((math.log(100) + math.log(200)) / 2)
    point = Point({"steps": at, "reference_seconds": at}, 4.75 + 0.019)
    assert mixed([point], 0.02, 100).is_known
    point = Point({"steps": at, "reference_seconds": at}, 4.75 + 0.021)
    assert not mixed([point], 0.02, 100).is_known


def test_steps_that_scratch_never_made_say_nothing() -> None:
    found = mixed(curve([3.0, 3.0], start=700), 0.02, 600)
    assert (found.steps, found.is_known) == (0, False)
    found = mixed(curve([3.9, 9.0], start=600), 0.2, 500)
    assert (found.steps, found.is_known) == (100, True)  # what comes after is not compared


@pytest.mark.parametrize(("lag", "is_known"), [(0.1, True), (0.01, False), (-0.2, False)])
def test_a_small_model_that_did_not_lag_at_the_switch_shows_no_mixing(
    lag: float, is_known: bool
) -> None:
    small = curve([loss + lag for loss in SCRATCH[:4]])
    found = mixed(curve(SCRATCH[3:], start=400), 0.02, 300, small)
    assert found.is_known == is_known
    assert found.steps == (100 if is_known else 0)
    assert ("nothing to catch up" in found.reason) == (not is_known)


def test_the_small_model_flattens_where_the_target_makes_its_progress_as_fast() -> None:
    """Scratch: 0.005 nats a second; small: twice that down to a loss of 5, then half of it."""
    scratch = curve([6.0, 5.5, 5.0, 4.5, 4.0])
    small = curve([6.0, 5.9, 5.8, 5.775, 5.75], seconds=0.1)
    found = flattening(small, scratch)
    assert found.step == 300
    assert "loss 5.800" in found.reason


def test_a_small_model_that_is_still_faster_has_not_flattened() -> None:
    scratch = curve([6.0, 5.5, 5.0])
    found = flattening(curve([6.0, 5.9, 5.8], seconds=0.1), scratch)
    assert found.step is None
    assert "5.800 at step 300, it still learns 2.0 times as fast" in found.reason
    assert "do not overlap" in flattening(curve([9.0, 8.0]), scratch).reason
    assert "do not overlap" in flattening([], scratch).reason
    assert "do not overlap" in flattening(curve([6.0, 5.9]), []).reason


def test_a_small_model_that_unlearns_has_flattened() -> None:
    assert flattening(curve([5.5, 5.6, 5.7]), curve([6.0, 5.5, 5.0])).step == 100


def test_a_loss_that_the_target_reaches_twice_counts_when_it_is_first_reached() -> None:
    """To 5.0 after 200 s; 300 s later it is there again."""
    bumpy = curve([6.0, 5.0, 5.9, 5.5, 5.0, 4.9])
    found = flattening(curve([6.0, 5.0], seconds=0.9), bumpy)
    assert found.step is None
    assert "1.1 times as fast" in found.reason


RIVAL = Point({"steps": 100.0, "reference_seconds": 100.0}, 4.0)


@pytest.mark.parametrize(
    ("steps", "loss", "verdict"),
    [(100, 4.1, "behind"), (100, 3.9, "ahead"), (100, 4.0, "ahead"), (50, 4.1, "unknown"),
     (50, 3.9, "ahead"), (300, 4.1, "behind"), (300, 3.9, "unknown"), (96, 4.1, "behind"),
     (104, 3.9, "ahead")],
)  # fmt: skip
def test_the_control_is_judged_at_equal_time(steps: int, loss: float, verdict: str) -> None:
    found = judge_control([curve([loss], start=steps)], RIVAL, "grown")
    assert found.verdict == verdict
    assert found.nats == pytest.approx(loss - 4.0)


def test_of_controls_the_one_nearest_in_time_counts() -> None:
    runs = [curve([3.0], start=900), curve([4.5, 4.1], start=50), curve([3.5], start=20)]
    found = judge_control(runs, RIVAL, "grown")
    assert found.verdict == "behind"  # between 4.5 after 50 s and 4.1 after 150 s
    assert 0.1 < found.nats < 0.5


def test_without_a_control_or_its_time_nothing_is_said_of_it() -> None:
    assert "train it for as long as grown, 100 s" in judge_control([], RIVAL, "grown").reason
    untimed = Point({"steps": 1.0, "reference_seconds": math.nan}, 4.0)
    assert judge_control([[untimed]], RIVAL, "grown").verdict == "unknown"
    assert "nobody timed grown" in judge_control([curve([4.0])], untimed, "grown").reason
