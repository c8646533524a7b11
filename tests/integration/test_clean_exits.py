"""How jobs end: by every launcher, without a compiler, on signals and limits, when a rank dies.

That a job of the real launcher leaves no process is checked wherever one is run: `launching.alone`.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import (
    LAUNCH,
    alone,
    deepspeed_command,
    environment,
    free_port,
    of_session,
    pretrain,
    ranks_of_session,
    rows,
)
from same_run import arguments, engine_json
from warm_jobs import Job, WarmJobs

STEPS = ("stages.0.steps=3", "stages.1.steps=2", "stages.2.steps=1")
LONG = ("stages.0.steps=100000", "checkpoint.every_steps=100000")
NOTICED_SECONDS = 30.0  # in which a job whose rank died has ended
OBEYED_SECONDS = 5.0

# -- launchers -----------------------------------------------------------------------------------


@pytest.fixture
def short(tiny_data: Path, tmp_path: Path) -> list[object]:
    """The words of a command that trains six steps into tmp_path / "run"."""
    return arguments(tiny_data, tmp_path / "run", engine_json(tmp_path, 1), STEPS)


def without_tools(folder: Path) -> dict[str, str]:
    """A PATH with the system's commands but no compiler and no ninja, and an empty op folder."""
    commands, tools = folder / "bin", ("cc", "gcc", "g++", "c++", "clang", "ld", "ninja", "nvcc")
    commands.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for path in Path(place).iterdir() if Path(place).is_dir() else ():
            link = commands / path.name
            if not link.exists() and not any(tool in path.name for tool in tools):
                link.symlink_to(path)
    (folder / "ops").mkdir()
    drop = {"CC": "", "CXX": "", "CUDA_HOME": ""}
    return {"PATH": str(commands), "TORCH_EXTENSIONS_DIR": str(folder / "ops"), **drop}


@pytest.mark.slow
def test_torchrun_starts_a_job_where_there_is_no_compiler_and_no_op_is_compiled(
    short: list[object], tmp_path: Path
) -> None:
    variables = without_tools(tmp_path)
    assert not any(shutil.which(tool, path=variables["PATH"]) for tool in ("cc", "g++", "ninja"))
    options = ["--nproc-per-node=2", f"--master-port={free_port()}"]
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    done = alone([*command, str(LAUNCH / "pretrain.py"), *map(str, short)], variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done: 6 steps" in done.stdout
    assert list((tmp_path / "ops").iterdir()) == []


@pytest.mark.slow
def test_mpirun_starts_a_job(short: list[object]) -> None:
    if shutil.which("mpirun") is None:
        pytest.skip("needs the program mpirun")
    pytest.importorskip("mpi4py", reason="a job under mpirun needs the package mpi4py")
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable]
    done = alone([*command, str(LAUNCH / "pretrain.py"), *map(str, short)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done: 6 steps" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [3, pytest.param(10, marks=pytest.mark.soak)])
def test_jobs_in_a_row_exit_cleanly(tiny_data: Path, tmp_path: Path, jobs: int) -> None:
    """gloo aborts at random where a process group is left to the interpreter's end."""
    for number in range(jobs):
        run_dir = tmp_path / f"run{number}"
        done = pretrain(2, *arguments(tiny_data, run_dir, engine_json(tmp_path, 1), STEPS))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert "terminate called" not in done.stderr


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_launchers_job_and_leaves_no_process(
    tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = arguments(tiny_data, run_dir, engine_json(tmp_path, 1), LONG)
    process = subprocess.Popen(
        deepspeed_command(2, *words), env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: has_trained(run_dir), 120)
        os.kill(ranks_of_session(process.pid)[1], signal.SIGKILL)
        assert process.wait(NOTICED_SECONDS) != 0
        wait_until(lambda: not of_session(process.pid), OBEYED_SECONDS)
    finally:
        for pid in [process.pid, *of_session(process.pid)]:
            if process.poll() is None or pid != process.pid:
                os.kill(pid, signal.SIGKILL)
        process.wait()


# -- signals and limits ----------------------------------------------------------------------------


@pytest.fixture
def long_job(warm_jobs: WarmJobs, tiny_data: Path, tmp_path: Path) -> Callable[..., Job]:
    """Return `(*words) -> job` that has begun a very long training in tmp_path / "run"."""

    def start(*words: object) -> Job:
        command = arguments(tiny_data, tmp_path / "run", engine_json(tmp_path, 1), LONG)
        job = warm_jobs.start([*command, *words], tmp_path)
        wait_until(lambda: has_trained(tmp_path / "run") or not job.is_running, 60)
        return job

    return start


def has_trained(run_dir: Path) -> bool:
    path = run_dir / "metrics.jsonl"
    return path.exists() and b'"event": "train"' in path.read_bytes()


def wait_until(is_true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "rank"),
    [
        (signal.SIGTERM, None),
        (signal.SIGINT, 1),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, None, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_or_all_ends_all_after_the_step_committed_and_resumable(
    warm_jobs: WarmJobs,
    tiny_data: Path,
    tmp_path: Path,
    long_job: Callable[..., Job],
    number: signal.Signals,
    rank: int | None,
) -> None:
    job = long_job()
    job.kill(rank, number)
    assert job.wait(30) == [3, 3], job.output() + job.errors()
    assert job.errors() == ""
    step = rows(tmp_path / "run", "train")[-1]["global_step"]
    assert f"stopped after step {step}, everything is saved" in job.output()
    assert [path.parent.name for path in tmp_path.glob("run/checkpoints/*/COMMITTED")] == [
        f"step_{step:08d}"
    ]
    words = arguments(tiny_data, tmp_path / "run", engine_json(tmp_path, 1), LONG)
    codes, again = warm_jobs.run([*words, "--max-steps", int(str(step)) + 1], tmp_path)
    assert codes == [3, 3]
    assert f"resuming from step_{step:08d}" in again.output()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_second_signal_is_obeyed_at_once_even_if_another_rank_hangs(
    long_job: Callable[..., Job], number: signal.Signals
) -> None:
    """The rank waits inside a collective, where Python runs no handler."""
    job = long_job()
    job.kill(1, signal.SIGSTOP)
    time.sleep(0.3)  # until the other one waits for it
    job.kill(0, number)
    time.sleep(0.2)
    assert job.poll() == [None, None]
    job.kill(0, number)
    try:
        wait_until(lambda: job.poll()[0] is not None, OBEYED_SECONDS)
        assert job.poll()[0] == 128 + number
    finally:
        job.kill()
        job.wait()


def test_a_time_limit_ends_the_job_committed_and_resumable(
    tmp_path: Path, long_job: Callable[..., Job]
) -> None:
    job = long_job("--time-limit", "1s")
    assert job.wait(30) == [3, 3], job.output() + job.errors()
    assert "everything is saved; the same command continues" in job.output()
    assert list(tmp_path.glob("run/checkpoints/step_*/COMMITTED"))


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_when_a_rank_dies_the_other_one_ends_by_itself(
    long_job: Callable[..., Job], victim: int
) -> None:
    job = long_job()
    job.kill(victim)
    codes = job.wait(NOTICED_SECONDS)
    assert codes[victim] == -9
    assert codes[1 - victim] not in (0, 3)
