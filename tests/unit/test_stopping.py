"""The first signal is a wish, the second is obeyed."""

import os
import signal

import pytest

from stacking.stopping import StopRequest


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
