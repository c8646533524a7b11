"""Jobs in processes: their results, their faults, and that no process is left over."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import environment, of_session

from stacking.errors import ConfigError
from stacking.side_by_side import JobLostError, side_by_side

THREE = ["one: got 1; allowed: 2", "two: got 2; allowed: 1"]
Job = tuple[str, Path]


def work(job: Job) -> str:
    """By its name: answer at once, after the others, with a fault, or not at all."""
    name, folder = job
    if name == "waits":
        while not (folder / "go").exists():
            time.sleep(0.01)
    if name == "errs":
        raise ConfigError(THREE)
    if name == "dies":
        while not (folder / "go").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "hangs":
        (folder / f"hangs{os.getpid()}").touch()
        time.sleep(300)
    return f"{name} {os.environ['OMP_NUM_THREADS']}"


def children() -> set[int]:
    """Living children of this process."""
    paths = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for path in paths for pid in path.read_text().split()}


def wait_until_gone(pids: set[int], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while pids & children() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not pids & children()


@pytest.fixture
def all_gone() -> Iterator[None]:
    """No process that a test has started outlives it, but Python's own resource tracker."""
    before = children()
    yield
    tracker = {pid for pid in children() - before if "tracker" in _words(pid)}
    wait_until_gone(children() - before - tracker)


def _words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize("processes", [1, 3])
def test_nothing_to_do_starts_nothing(processes: int) -> None:
    assert list(side_by_side(work, [], processes)) == []


def test_one_process_is_this_one() -> None:
    found = list(side_by_side(_pid, [1, 2], 1))
    assert found == [os.getpid()] * 2


def _pid(_: int) -> int:
    return os.getpid()


@pytest.mark.slow
@pytest.mark.usefixtures("all_gone")
def test_results_come_as_they_are_ready_and_a_single_job_has_a_process_too(tmp_path: Path) -> None:
    """A job that this process ran would leave its process group to those of the next call."""
    jobs = [("waits", tmp_path), ("a", tmp_path), ("b", tmp_path)]
    found = []
    for answer in side_by_side(work, jobs, 2):
        found.append(answer)
        if len(found) == 2:
            (tmp_path / "go").touch()
    assert [answer.split()[0] for answer in found] == ["a", "b", "waits"]
    assert next(iter(side_by_side(_pid, [1], 2))) != os.getpid()


@pytest.mark.usefixtures("all_gone")
def test_the_fault_of_a_job_comes_with_its_message_and_ends_the_others(tmp_path: Path) -> None:
    jobs = [("errs", tmp_path), ("hangs", tmp_path)]
    with pytest.raises(ConfigError) as caught:
        list(side_by_side(work, jobs, 2))
    assert str(caught.value) == str(ConfigError(THREE))


@pytest.mark.slow
@pytest.mark.usefixtures("all_gone")
def test_a_process_that_is_killed_is_told_after_what_was_finished(tmp_path: Path) -> None:
    answers = side_by_side(work, [("dies", tmp_path), ("a", tmp_path)], 2)
    assert next(answers).split()[0] == "a"
    (tmp_path / "go").touch()
    with pytest.raises(JobLostError, match="finished jobs are kept"):
        next(answers)


PARENT = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from stacking.side_by_side import side_by_side
from test_side_by_side import work

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try:
        list(side_by_side(work, [("hangs", folder)] * 2, 2))
    except KeyboardInterrupt:
        sys.exit("stopped")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_or_a_kill_of_the_command_leaves_no_process(
    number: signal.Signals, tmp_path: Path
) -> None:
    """Ctrl-C reaches all processes of the terminal, and the command alone speaks of it."""
    (tmp_path / "parent.py").write_text(PARENT)
    here = Path(__file__).resolve()
    places = [str(here.parent), str(here.parents[1] / "integration"), str(here.parents[2])]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), str(tmp_path), *places], env=environment(),
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("hangs*"))) < 2 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.kill()
        _, errors = process.communicate(timeout=60)
        while of_session(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not of_session(process.pid)
    finally:
        for pid in of_session(process.pid):
            os.kill(pid, signal.SIGKILL)
    if number == signal.SIGINT:
        assert errors == "stopped\n"
        assert process.returncode == 1
