"""stacking.report_spikes: a curve with a known spike gives its height and its length."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from stacking.report_spikes import PEAK_WINDOWS, WINDOWS, Spike, Window, mean_loss, rise

GROWTH = 100


def windows(losses: list[float], begin: int = 0, steps: int = 10) -> list[Window]:
    return [Window(begin + steps * (i + 1), steps, loss) for i, loss in enumerate(losses)]


@st.composite
def known_spikes(draw: DrawFn) -> tuple[list[float], list[float], float, int]:
    """Losses before and after, the height, and the windows to recovery.

    A plateau, then a fall so deep that one low window outweighs all high ones of a mean.
    """
    level = draw(st.floats(2.0, 9.0))
    height = draw(st.floats(0.01, 3.0))
    high = draw(st.integers(1, PEAK_WINDOWS))
    before = [level] * draw(st.integers(1, 12))
    after = [level + height] * high + [level - WINDOWS * height] * draw(st.integers(1, 9))
    return before, after, height, high + 1


@given(known_spikes(), st.integers(1, 50))
def test_a_known_spike_is_found(
    known: tuple[list[float], list[float], float, int], steps: int
) -> None:
    before, after, height, recovery = known
    old, new = windows(before, GROWTH - steps * len(before), steps), windows(after, GROWTH, steps)
    level, highest, back_at = rise(old, new, GROWTH)
    assert level == pytest.approx(before[0])
    assert highest - level == pytest.approx(height)
    assert back_at == GROWTH + recovery * steps


@given(st.lists(st.floats(0.1, 5.0), min_size=1, max_size=30), st.floats(0.001, 2.0))
def test_a_loss_that_stays_above_has_not_recovered(rises: list[float], level: float) -> None:
    old = windows([level] * 3)
    new = windows([level + 0.1 + r for r in rises], GROWTH)
    before, highest, back_at = rise(old, new, GROWTH)
    assert back_at is None
    assert highest - before == pytest.approx(0.1 + max(rises[:PEAK_WINDOWS]))


@given(st.lists(st.floats(1.0, 5.0), min_size=1, max_size=30))
def test_a_loss_that_never_rises_recovers_at_once(losses: list[float]) -> None:
    new = windows([loss - 0.01 for loss in losses], GROWTH)
    level = max(losses)
    before, highest, back_at = rise(windows([level]), new, GROWTH)
    assert back_at == GROWTH
    assert highest <= before


@given(st.data())
def test_recovery_is_where_the_smoothed_loss_first_is_back(data: st.DataObject) -> None:
    """Against a definition written down again, on any curve."""
    floats = st.floats(1.0, 9.0)
    old = windows(data.draw(st.lists(floats, min_size=1, max_size=9)))
    new = windows(data.draw(st.lists(floats, min_size=1, max_size=40)), GROWTH)
    count = data.draw(st.integers(1, 6))
    before, highest, back_at = rise(old, new, GROWTH, count)
    level = sum(w.loss for w in old[-count:]) / len(old[-count:])
    assert before == pytest.approx(level)
    first = [w.loss for w in new[:PEAK_WINDOWS]]
    assert highest == max(first)
    if highest <= before:
        assert back_at == GROWTH
        return
    peak = first.index(highest)
    for index in range(peak, len(new)):
        of_mean = [w.loss for w in new[max(0, index + 1 - count) : index + 1]]
        is_back = sum(of_mean) / len(of_mean) <= before - 1e-9
        if is_back:
            assert back_at is not None
            assert back_at <= new[index].global_step
            break
        if back_at == new[index].global_step:  # on the line, up to rounding
            assert sum(of_mean) / len(of_mean) == pytest.approx(before)
            break
    else:
        assert back_at is None


def test_the_loss_before_is_that_of_the_last_windows_by_their_steps() -> None:
    old = [Window(10, 10, 9.0), Window(20, 10, 4.0), Window(22, 2, 6.0)]
    assert rise(old, windows([5.0], 22), 22, 2)[0] == pytest.approx((40 + 12) / 12)
    assert mean_loss(old[1:]) == pytest.approx(52 / 12)


def test_a_spike_is_looked_for_in_the_first_windows_only() -> None:
    noise = [5.1] + [5.0] * PEAK_WINDOWS + [8.0]
    assert rise(windows([5.05]), windows(noise, GROWTH), GROWTH)[1] == 5.1


def test_unknown_losses_are_passed_by() -> None:
    new = windows([math.nan, 6.0, 4.0], GROWTH)
    assert rise(windows([5.0, math.nan]), new, GROWTH, 1) == (5.0, 6.0, GROWTH + 30)
    for old, later in (([], [5.0]), ([5.0], []), ([math.nan], [5.0])):
        before, highest, back_at = rise(windows(old), windows(later, GROWTH), GROWTH)
        assert math.isnan(before)
        assert math.isnan(highest)
        assert back_at is None


@pytest.mark.parametrize(
    ("highest", "back_at", "is_over", "words"),
    [
        (6.0, 140, True, "recovered in 40 steps"),
        (4.0, 100, True, "never rose"),
        (6.0, None, True, "not recovered in the stage's 200 steps"),
        (6.0, None, False, "not recovered yet, after 200 steps"),
        (math.nan, None, False, "not known yet"),
    ],
)
def test_recovery_in_words(highest: float, back_at: int | None, is_over: bool, words: str) -> None:
    spike = Spike(GROWTH, 5.0, 0.1, highest, 0.5, back_at, 300, is_over)
    assert spike.recovery == words
