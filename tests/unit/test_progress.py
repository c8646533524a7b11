"""Progress: plain lines without a terminal, and all that people look for in each."""

import io

import pytest

from stacking.progress import ProgressReporter


def test_a_plain_line_has_stage_step_numbers_and_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ProgressReporter(total_steps=50, num_stages=3) as progress:
        progress.step(20, 1, 4, "loss 6.123  lr 1.00e-03  900 tokens/s", 125.9)
        progress.say("grown [from 2 to 4] layers")
    printed = capsys.readouterr().out
    line = "stage 2/3 (4 layers)  step 20/50  loss 6.123  lr 1.00e-03  900 tokens/s  left 2:05"
    assert line in printed.splitlines()
    assert "grown [from 2 to 4] layers" in printed


class NobodyReads(io.StringIO):
    """A pipe whose reader has gone, as after `| head`."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_who_has_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", NobodyReads())
    with ProgressReporter(total_steps=50, num_stages=3) as progress:
        progress.say("one")
        progress.say("two")
