"""data_prep.isolated: a crash or a hang costs the job, not the program."""

import os
import time

from data_prep.isolated import Isolated


def test_results_come_back_from_one_process() -> None:
    runner: Isolated[int, int] = Isolated(abs)
    with runner as isolated:
        assert [isolated.run(job, 60) for job in (-3, 4)] == [3, 4]


def test_crash_is_none_and_the_next_job_runs() -> None:
    with Isolated(_pid_or_exit) as isolated:
        first = isolated.run(0, 60)
        assert first not in (None, os.getpid())
        assert isolated.run(0, 60) == first
        assert isolated.run(139, 60) is None
        assert isolated.run(0, 60) not in (None, first)


def test_hang_is_given_up() -> None:
    start = time.monotonic()
    with Isolated(time.sleep) as isolated:
        assert isolated.run(300, 0.2) is None
    assert time.monotonic() - start < 60


def _pid_or_exit(code: int) -> int:
    if code:
        os._exit(code)
    return os.getpid()
