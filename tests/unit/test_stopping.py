"""The first signal is a wish, the second is obeyed."""

import os
import signal
import time

import pytest

from stacking.errors import ConfigError
from stacking.stopping import StopLimits, StopRequest, parse_duration


def test_the_first_signal_is_remembered_and_the_second_is_obeyed() -> None:
    def second_sigint() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with StopRequest() as stop:
        assert not stop.is_requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_requested
        with pytest.raises(KeyboardInterrupt):
            second_sigint()


def test_handlers_are_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_after_sigint_is_the_same_wish() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_requested


def test_a_time_limit_is_a_wish_when_it_is_over() -> None:
    with StopRequest(0.2) as stop:
        assert not stop.is_requested
        time.sleep(0.25)
        assert stop.is_requested
    with StopRequest(3600.0) as stop:
        assert not stop.is_requested


@pytest.mark.parametrize(("steps", "last"), [(None, 9), (4, 4), (20, 9)])
def test_a_session_ends_at_its_limit_or_with_the_recipe(steps: int | None, last: int) -> None:
    assert StopLimits(steps=steps).last_step(9) == last


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("90m", 5400), ("1d12h", 129600), ("45s", 45), ("1h1m1s", 3661)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "2", "h", "2 h", "-2h", "1m2h", "2h30", "1.5h", "9" * 5000 + "d"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--time-limit: got .*; allowed: days, hours"):
        parse_duration(text)


def test_limits_that_leave_nothing_to_do_are_refused() -> None:
    with pytest.raises(ConfigError, match="--max-steps: got 0; allowed: 1 or more"):
        StopLimits(steps=0)
    with pytest.raises(ConfigError, match="--time-limit: got no time"):
        StopLimits(parse_duration("0s"))
