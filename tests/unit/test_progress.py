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


class Terminal(io.StringIO):
    """Somebody looks, or Open MPI says so."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_mpis", [False, True])
def test_a_terminal_of_open_mpi_gets_plain_lines(
    monkeypatch: pytest.MonkeyPatch, is_mpis: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    if is_mpis:
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    with ProgressReporter(total_steps=50, num_stages=3) as progress:
        progress.step(20, 1, 4, "loss 6.123", 125.9)
    assert ("\x1b[" in terminal.getvalue()) is not is_mpis
    assert ("left 2:05" in terminal.getvalue().splitlines()[-1]) or not is_mpis
